"""What the first step measures for the constraint: the gap that nothing can close, the tolerance, the blocks' own gaps.

All of it by the trainer, on the tokens the engine has just sampled, at the weights it sampled them from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from train.attribution import blocks, with_quantized
from train.config import ConstraintConfig
from train.discrepancy import masked_mean, probability_difference
from train.policy import NonFiniteError, Policy
from train.records import TokenBatch


def tolerance_floor(
    policy: Policy, batch: TokenBatch, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor]
) -> float:
    """mean |p - q| with the trainer at Q(W): the part of the gap that no weights can close.

    Engine numerics, and where the target has them quantized activations and a quantized KV cache. Leaves the module
    at Q(W).

    Args:
        policy: the trainer.
        batch: the step's sequences, sampled from Q(W), with the engine's log-probs.
        weights: name to BF16 W, all names.
        deployed: name to BF16 Q(W), the quantized names.

    Returns:
        A mean absolute probability difference.

    Raises:
        NonFiniteError: a log-prob at Q(W) is not finite.
    """
    policy.run_at({**weights, **deployed})
    floor = _gap(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)
    if not math.isfinite(floor):
        raise NonFiniteError(
            "constraint.tolerance 'auto': the trainer's log-probs at the deployed weights are not finite"
        )
    return floor


def unblended_gap(policy: Policy, batch: TokenBatch, weights: Mapping[str, Tensor]) -> float:
    """mean |p - q| with the trainer at W: what a tolerance is a share of, also where the run begins at a blend.

    A share of the gap at the blend would be a tolerance that only this blend can hold. Leaves the module at W.
    """
    policy.run_at(weights)
    return _gap(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)


def first_tolerance(config: ConstraintConfig, gap: float, floor: float | None) -> float:
    """c: as given, else `tolerance_ratio` times the first gap, never below the floor where one was measured.

    Args:
        config: the constraint's table.
        gap: the first step's mean |probability difference|, of the policy at W.
        floor: `tolerance_floor`, in the same unit; with 'auto' and a target alone.
    """
    if isinstance(config.tolerance, float):
        return config.tolerance
    return max(config.tolerance_ratio * gap, floor or 0.0)


def block_gaps(
    policy: Policy, batch: TokenBatch, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor]
) -> dict[str, float]:
    """g_b: mean |probability difference| between the trainer at W and with block b alone at Q(W_b).

    One forward pass over the step's sequences per block, once in a run. Leaves the module at another block's weights.

    Returns:
        Transformer block to its gap; a quantized weight outside of blocks is one of its own.
    """
    policy.run_at(weights)
    whole = policy.all_logprobs(batch)
    gaps = {}
    for block, names in blocks(deployed).items():
        policy.run_at(with_quantized(weights, deployed, names))
        gaps[block] = _gap(policy.all_logprobs(batch), whole, batch.mask)
    return gaps


def _gap(one: Tensor, other: Tensor, mask: Tensor) -> float:
    return masked_mean(probability_difference(one, other, mask), mask).item()
