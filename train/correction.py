"""Corrections for rollouts from another distribution than the trainer's: importance weights and masks, pure.

Off by default where the quantized model is what ships: a full correction turns the gradient into that of the BF16
policy, whose improvement is not what is deployed.

Notation: l_t = p_t - q_t, rho_t = exp(l_t); p_t is the trainer's log-prob before the update, q_t that of the engine
that sampled, nats. Shapes are [N, T]; nothing here carries a gradient. A mask is 1 where a token is kept and 0 where it
is dropped from the *numerator* of the loss: denominators never shrink, or dropping would raise the weight of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.config import CorrectionConfig


def token_tis(old: Tensor, rollout: Tensor, *, cap: float) -> Tensor:
    """Token-level truncated importance sampling: w_t = min(rho_t, C) (Ionides 2008; used for RL by TIS).

    Args:
        old: [N, T] trainer log-probs before the update, nats.
        rollout: [N, T] log-probs of the engine that sampled, nats.
        cap: C > 0.

    Returns:
        [N, T] weights in (0, C].
    """
    return (old - rollout).detach().exp().clamp(max=cap)


def sequence_tis(old: Tensor, rollout: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Sequence-level truncated importance sampling: w = min(prod_t rho_t, C) on every token of the sequence.

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens.
        cap: C > 0.

    Returns:
        [N, T] weights in [0, C], constant along a row.
    """
    return _log_ratio(old, rollout, mask).sum(1, keepdim=True).exp().clamp(max=cap).expand_as(mask)


def token_masked(old: Tensor, rollout: Tensor, *, low: float, high: float) -> Tensor:
    """Masked importance sampling: w_t = rho_t if low <= rho_t <= high, else 0.

    With the bounds alpha = 0.5 and beta = 5 it is IcePop (arXiv 2510.18855).

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        low: lower bound, included.
        high: upper bound, included.

    Returns:
        [N, T] weights, 0 or in [low, high].
    """
    return _inside((old - rollout).detach().exp(), low, high)


def sequence_masked(old: Tensor, rollout: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """Sequence-level masked importance sampling: w = prod_t rho_t if inside [low, high], else 0, on every token.

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens.
        low: lower bound, included.
        high: upper bound, included.

    Returns:
        [N, T] weights, 0 or in [low, high], constant along a row.
    """
    return _inside(_log_ratio(old, rollout, mask).sum(1, keepdim=True).exp(), low, high).expand_as(mask)


def geometric_mask(old: Tensor, rollout: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """Keep a sequence if exp(mean_t l_t), the geometric mean of its ratios, is inside [low, high].

    Returns:
        [N, T] of 0 and 1, constant along a row.
    """
    ratio = _row_mean(_log_ratio(old, rollout, mask), mask).exp()
    return _kept((ratio >= low) & (ratio <= high), mask)


def veto_mask(old: Tensor, rollout: Tensor, mask: Tensor, *, threshold: float) -> Tensor:
    """Drop a sequence that has any rho_t < threshold: a token that the trainer would all but never have written.

    Returns:
        [N, T] of 0 and 1, constant along a row.
    """
    return _kept(_log_ratio(old, rollout, mask).exp().amin(1, keepdim=True) >= threshold, mask)


def max_k2_mask(old: Tensor, rollout: Tensor, mask: Tensor, *, limit: float) -> Tensor:
    """Trust region masking (arXiv 2512.23075): keep a sequence if max_t k2_t <= limit, k2_t = l_t^2 / 2.

    Returns:
        [N, T] of 0 and 1, constant along a row.
    """
    return _kept((_log_ratio(old, rollout, mask).square() / 2).amax(1, keepdim=True) <= limit, mask)


def mean_k3_mask(old: Tensor, rollout: Tensor, mask: Tensor, *, limit: float) -> Tensor:
    """Trust region masking (arXiv 2512.23075): keep a sequence if mean_t k3_t <= limit, k3_t = exp(l_t) - l_t - 1.

    Returns:
        [N, T] of 0 and 1, constant along a row.
    """
    ratio = _log_ratio(old, rollout, mask)
    return _kept(_row_mean(torch.expm1(ratio) - ratio, mask) <= limit, mask)


def mean_k1_mask(old: Tensor, rollout: Tensor, mask: Tensor, *, limit: float) -> Tensor:
    """Keep a sequence if |mean_t k1_t| <= limit, k1_t = -l_t: sequence rejection by k1 (arXiv 2605.14220).

    k1 has a sign and its errors cancel along a sequence; the absolute value, our reading, rejects both directions.

    Returns:
        [N, T] of 0 and 1, constant along a row.
    """
    return _kept(_row_mean(_log_ratio(old, rollout, mask), mask).abs() <= limit, mask)


def correction_weights(config: CorrectionConfig, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor | None:
    """The weight times every mask that the config asks for.

    Trust region masking is `masks = ["max-k2", "mean-k3"]`, or one of both; the remedy of arXiv 2605.14220 is
    `weight = "token-tis"` with `masks = ["mean-k3"]` or `["mean-k1"]`.

    Args:
        config: the `[train.correction]` table.
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens.

    Returns:
        [N, T] >= 0, without gradient; None where nothing is corrected.
    """
    factors = []
    low, high = config.bounds or (0.0, float("inf"))
    match config.weight:
        case "token-tis":
            factors.append(token_tis(old, rollout, cap=config.cap))
        case "sequence-tis":
            factors.append(sequence_tis(old, rollout, mask, cap=config.cap))
        case "token-masked" | "icepop":
            factors.append(token_masked(old, rollout, low=low, high=high))
        case "sequence-masked":
            factors.append(sequence_masked(old, rollout, mask, low=low, high=high))
    for name in config.masks:
        match name:
            case "geometric":
                low, high = config.geometric
                factors.append(geometric_mask(old, rollout, mask, low=low, high=high))
            case "veto":
                factors.append(veto_mask(old, rollout, mask, threshold=config.veto))
            case "max-k2":
                factors.append(max_k2_mask(old, rollout, mask, limit=config.max_k2))
            case "mean-k3":
                factors.append(mean_k3_mask(old, rollout, mask, limit=config.mean_k3))
            case "mean-k1":
                factors.append(mean_k1_mask(old, rollout, mask, limit=config.mean_k1))
    if not factors:
        return None
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def correction_sums(weights: Tensor, mask: Tensor) -> dict[str, float]:
    """What a correction did to a micro-batch, as sums that add up over micro-batches.

    Returns:
        "weight", the sum of the tokens' weights; "masked_tokens", those of weight 0; "masked_sequences", those all of
        whose tokens have weight 0; "sequences", those with a token.
    """
    zero = ((weights == 0) & mask.bool()).sum(1)
    lengths = mask.bool().sum(1)
    return {
        "weight": float((weights * mask).sum()),
        "masked_tokens": float(zero.sum()),
        "masked_sequences": float(((zero == lengths) & (lengths > 0)).sum()),
        "sequences": float((lengths > 0).sum()),
    }


def _log_ratio(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """l_t, 0 behind the mask whatever stands there."""
    return torch.where(mask.bool(), (old - rollout).detach(), 0.0)


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[N, 1] mean over a row's tokens of values that are 0 behind the mask; 0 for a row without tokens."""
    return values.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where it is inside the bounds, else 0."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _kept(rows: Tensor, mask: Tensor) -> Tensor:
    """[N, 1] decisions as a mask of the shape [N, T]."""
    return rows.to(mask.dtype).expand_as(mask)
