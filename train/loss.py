"""The policy losses: pure, tensors in, (sum, sums of metrics) out.

Every loss is a *sum*, so that micro-batches add up: the caller divides by the `denominator` of the whole optimizer
step, never by that of a micro-batch. Shapes are [N, T], log-probs in nats, r_t = exp(logp_t - anchor_t); the anchor is
p_t (the trainer before the update) or q_t (the engine that sampled).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from train.config import CorrectionConfig, LossConfig
from train.correction import correction_sums, correction_weights

Normalize = Literal["token-mean", "sequence-mean"]


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

    Sources: PPO clip (arXiv 1707.06347), GRPO (arXiv 2402.03300), asymmetric clip and token mean (DAPO, arXiv
    2503.14476).

    Args:
        logprobs: [N, T] log pi_theta of the sampled tokens, nats, with gradient.
        old: [N, T] the anchor, p_t or q_t, nats.
        advantages: [N, T].
        mask: [N, T], 1 on response tokens.
        clip_low: lower clip distance.
        clip_high: upper clip distance.
        weights: [N, T] importance weights without gradient; None is 1.

    Returns:
        The summed loss (scalar, with gradient) and the sums "clipped" (tokens whose clip was active) and "tokens".
    """
    ratio = _ratio(logprobs, old, mask)
    return _surrogate(ratio, ratio.clamp(1 - clip_low, 1 + clip_high), advantages, mask, weights)


def gspo_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`grpo_loss` with the sequence's ratio on every token: s_t = sg[s] pi_theta(y_t) / sg[pi_theta(y_t)].

    s = exp(mean_t (logp_t - p_t)), the length-normalized likelihood ratio; the gradient goes straight through to each
    token (GSPO-token, arXiv 2507.18071). Under a sequence mean it equals GSPO's, ds / d logp_t = s / |y|, where a
    sequence has one advantage. Arguments and returns as in `grpo_loss`.
    """
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    sequence = ((logprobs - old) * mask).sum(1, keepdim=True).detach() / lengths
    ratio = sequence.exp() * ((logprobs - logprobs.detach()) * mask).exp()
    return _surrogate(ratio, ratio.clamp(1 - clip_low, 1 + clip_high), advantages, mask, weights)


def qurl_loss(
    logprobs: Tensor,
    old: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """-sum_t w_t min(r_t A_t, clip(r_t, 1 - low, (1 + high) / rho_t) A_t), rho_t = exp(p_t - q_t).

    The upper clip adapts to the quantized engine (QuRL, arXiv 2602.13953): it holds pi_theta / mu, not pi_theta /
    pi_old, at 1 + high. The paper's weight is min(rho_t, C), `token_tis`. That the r under its fraction is rho_t is
    our reading; clip(x, a, b) is min(max(x, a), b), also where a > b. Other arguments and returns as in `grpo_loss`.

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
    """
    ratio = _ratio(logprobs, old, mask)
    highest = (1 + clip_high) / _ratio(old, rollout, mask).detach()
    return _surrogate(ratio, ratio.clamp(min=1 - clip_low).minimum(highest), advantages, mask, weights)


def reinforce_loss(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """-sum_t w_t A_t logp_t (Williams, 1992): neither ratio nor clip. Arguments and returns as in `grpo_loss`."""
    objective = logprobs * advantages * mask
    if weights is not None:
        objective = objective * weights
    return -objective.sum(), {"clipped": 0.0, "tokens": float(mask.sum())}


def reference_kl(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """k3_t = exp(d_t) - d_t - 1 with d_t = log pi_ref(y_t) - logp_t: KL(pi_theta || pi_ref), estimated per token.

    Source: the k3 estimator of Schulman (2020), as GRPO uses it (arXiv 2402.03300).

    Args:
        logprobs: [N, T] with gradient, nats.
        reference: [N, T] of the initial policy, nats.
        mask: [N, T].

    Returns:
        [N, T] >= 0 with gradient, 0 behind the mask.
    """
    distance = (reference - logprobs) * mask
    return distance.exp() - distance - 1


def policy_loss(
    loss: LossConfig,
    correction: CorrectionConfig,
    *,
    logprobs: Tensor,
    old: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss that the config asks for, corrected and with its KL, as a sum to be divided by `denominator`.

    "decoupled": p_t is the anchor and rho_t = exp(p_t - q_t) corrects from outside. "bypass": q_t is the anchor, so
    the ratio is pi_theta / mu, `old` is not used, and corrections see exp(logp_t - q_t) without its gradient.

    Args:
        loss: the `[train.loss]` table.
        correction: the `[train.correction]` table.
        logprobs: [N, T] with gradient, nats.
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        advantages: [N, T].
        mask: [N, T], 1 on the tokens that count.
        reference: [N, T] of the initial policy, nats; None is no KL.

    Returns:
        The sum (scalar, with gradient) and sums of metrics: "clipped", "tokens", "reference_kl" where there is one,
        and with a correction those of `correction_sums`.
    """
    decoupled = loss.ratio == "decoupled"
    anchor = old if decoupled else rollout
    weights = correction_weights(correction, old if decoupled else logprobs.detach(), rollout, mask)
    sums = {} if weights is None else correction_sums(weights, mask)
    share = None
    if loss.normalize == "sequence-mean":
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        weights = share if weights is None else weights * share
    if loss.name == "reinforce":
        total, clipping = reinforce_loss(logprobs, advantages, mask, weights=weights)
    else:
        assert loss.clip_low is not None, "the config fills it in"
        assert loss.clip_high is not None, "the config fills it in"
        clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
        if loss.name == "gspo":
            total, clipping = gspo_loss(logprobs, anchor, advantages, mask, weights=weights, **clip)
        elif loss.name == "qurl":
            total, clipping = qurl_loss(logprobs, old, rollout, advantages, mask, weights=weights, **clip)
        else:
            total, clipping = grpo_loss(logprobs, anchor, advantages, mask, weights=weights, **clip)
    if reference is not None:
        penalty = reference_kl(logprobs, reference, mask)
        sums["reference_kl"] = float(penalty.detach().sum())
        total = total + loss.reference_kl * (penalty if share is None else penalty * share).sum()
    return total, sums | clipping


def denominator(mask: Tensor, normalize: Normalize) -> Tensor:
    """What the sums of a whole optimizer step are divided by: its tokens, or its sequences; at least 1.

    Args:
        mask: [M, T] of all the step's sequences, 1 on the tokens that count, dropped by a correction or not.
    """
    count = mask.sum() if normalize == "token-mean" else mask.amax(1).sum()
    return count.clamp(min=1)


def loss_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """What `policy_loss` summed over a step's micro-batches, as means over its tokens and shares.

    Returns:
        "clip_fraction" (share of tokens whose clip was active); "reference_kl" (nats per token); with a correction
        "correction_weight" (mean over tokens, dropped ones included), "correction_masked_tokens" and
        "correction_masked_sequences" (shares of weight 0).
    """
    tokens = max(sums["tokens"], 1.0)  # every group may have been dropped
    metrics = {"clip_fraction": sums["clipped"] / tokens}
    if "reference_kl" in sums:
        metrics["reference_kl"] = sums["reference_kl"] / tokens
    if "weight" in sums:
        metrics["correction_weight"] = sums["weight"] / tokens
        metrics["correction_masked_tokens"] = sums["masked_tokens"] / tokens
        metrics["correction_masked_sequences"] = sums["masked_sequences"] / max(sums["sequences"], 1.0)
    return metrics


def _ratio(logprobs: Tensor, anchor: Tensor, mask: Tensor) -> Tensor:
    """exp(logp_t - anchor_t), 1 behind the mask."""
    # padding holds log-prob 0 on both sides; masking the difference first keeps exp finite there
    return ((logprobs - anchor) * mask).exp()


def _surrogate(
    ratio: Tensor, clipped_ratio: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """-sum_t w_t min(ratio A, clipped ratio A), and where the clip was active."""
    unclipped = ratio * advantages
    clipped = clipped_ratio * advantages
    objective = torch.minimum(unclipped, clipped) * mask
    if weights is not None:
        objective = objective * weights
    active = ((clipped < unclipped) * mask).sum()
    return -objective.sum(), {"clipped": float(active), "tokens": float(mask.sum())}
