"""Overlong reward shaping: a punishment that grows over the last tokens before the length limit. Pure."""

from __future__ import annotations

from torch import Tensor


def overlong_punishment(lengths: Tensor, *, limit: int, buffer: int, penalty: float) -> Tensor:
    """0 up to limit - buffer tokens, then linearly down to -penalty at the limit, and -penalty beyond it.

    -penalty * clip((length - (limit - buffer)) / buffer, 0, 1): DAPO's soft overlong punishment (arXiv 2503.14476),
    there with penalty 1.

    Args:
        lengths: [...] response lengths, tokens.
        limit: L_max > 0, tokens.
        buffer: L_cache in [1, limit], tokens.
        penalty: what is lost at the limit, in the reward's unit.

    Returns:
        [...] in [-penalty, 0], to be added to the rewards.
    """
    return -penalty * ((lengths - (limit - buffer)) / buffer).clamp(0, 1)
