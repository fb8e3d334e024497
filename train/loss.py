"""The policy loss: pure, tensors in, (sum, metrics) out."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """-sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t), with r_t = exp(logp_t - p_t).

    The *sum*, so that micro-batches add up: the caller divides by the token count of the whole optimizer step, never
    by that of a micro-batch. Sources: PPO clip (arXiv 1707.06347), GRPO (arXiv 2402.03300), asymmetric clip and token
    mean (arXiv 2503.14476).

    Args:
        logprobs: [N, T] log pi_theta of the sampled tokens, nats, with gradient.
        old: [N, T] p_t, nats.
        advantages: [N, T].
        mask: [N, T], 1 on response tokens.
        clip_low: lower clip distance.
        clip_high: upper clip distance.
        weights: [N, T] importance weights without gradient; None is 1.

    Returns:
        The summed loss (scalar, with gradient) and the sums "clipped" (tokens whose clip was active) and "tokens".
    """
    # padding holds log-prob 0 on both sides; masking the difference first keeps exp finite there
    ratio = ((logprobs - old) * mask).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped) * mask
    if weights is not None:
        objective = objective * weights
    active = ((clipped < unclipped) * mask).sum()
    return -objective.sum(), {"clipped": float(active), "tokens": float(mask.sum())}
