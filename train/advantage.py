"""Advantages: what each sampled token is credited with. Pure; gradient-free."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # the GRPO papers' epsilon, for a group whose rewards hardly differ


def group_advantages(rewards: Tensor, *, normalize_std: bool) -> Tensor:
    """A_i = r_i - mean(r), divided by the group's std when asked (GRPO, arXiv 2402.03300; without: arXiv 2503.20783).

    Args:
        rewards: [P, G], any unit.

    Returns:
        [P, G]; a group whose rewards are all equal gets exactly 0.
    """
    # equal rewards must give exactly 0; the mean of equal floats can be off by one rounding
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))
    if not normalize_std:
        return centred
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


def penalized_advantages(
    advantages: Tensor,
    delta: Tensor,
    *,
    multiplier: float,
    tolerance: float,
    penalty: Literal["full", "excess", "hinge"],
) -> Tensor:
    """A_t <- A_t - lambda * penalty_t, the advantage form of the constraint (arXiv 2606.08779).

    penalty_t is delta_t (full), delta_t - c (excess) or max(delta_t - c, 0) (hinge).

    Args:
        advantages: [N, T], after group normalization.
        delta: [N, T], probability differences in [0, 1], without gradient.
        multiplier: lambda.
        tolerance: c, in delta's unit.

    Returns:
        [N, T].
    """
    cost = {"full": delta, "excess": delta - tolerance, "hinge": (delta - tolerance).clamp(min=0)}[penalty]
    return advantages - multiplier * cost
