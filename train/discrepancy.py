"""Train-versus-deployed discrepancy: pure functions of old (trainer) and rollout (deployed engine) log-probs.

Notation: p_t = old log-prob, q_t = rollout log-prob, l_t = p_t - q_t, rho_t = exp(l_t). Nothing here carries a
gradient: the deployed engine is a black box. Shapes are [N, T], log-probs in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import BoresightError

LOG_RATIO_BOUND = 20.0  # l is clamped to +-20 before exp in chi2, so that one token cannot overflow the metric
BOUNDS = (0.5, 5.0)  # rho outside counts as out of bounds; IcePop's, arXiv 2510.18855


class MismatchError(BoresightError):
    """Trainer and rollout engine differ where they must be equal bit for bit."""


def probability_difference(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """delta_t = |exp(p_t) - exp(q_t)|, the absolute probability difference of the sampled token.

    Source: arXiv 2606.08779 (DCMDP), the constraint's cost.

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens.

    Returns:
        [N, T] in [0, 1], 0 where the mask is 0, without gradient.
    """
    return (old.detach().exp() - rollout.exp()).abs() * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's ones, a scalar; NaN for an empty mask."""
    return (values * mask).sum() / mask.sum()


def mismatch_metrics(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, float]:
    """Every mismatch metric the field logs, both directions, in one pass over [N, T].

    prob_diff mean, std, max of delta_t; k1 = mean(-l); k2 = mean(l^2 / 2); k3 = mean(exp(l) - l - 1), an estimate of
    KL(rollout || trainer) from rollout samples; k3_reverse = mean(exp(-l) + l - 1); logp_abs_diff mean and max |l|;
    correlation, Pearson, of exp(p) and exp(q); ppl_ratio = mean over sequences of exp(mean q - mean p);
    chi2_token = mean(rho^2) - 1; chi2_seq = mean over sequences of exp(2 sum l) - 1; ess = 1 / mean((rho / mean
    rho)^2), the effective sample size as a share of the tokens; out_of_bounds, the share of tokens whose rho is outside
    `BOUNDS`.

    Sources: arXiv 2606.08779 (delta), the k1/k2/k3 estimators of Schulman (2020), arXiv 2512.23075 (chi2, k3 masks),
    arXiv 2510.18855 (bounds).

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens; every row has at least one.

    Returns:
        Name to value; NaN stays NaN (a broken log-prob must show).
    """
    keep = mask.bool()
    p, q = old.detach()[keep].double(), rollout[keep].double()
    ratio = p - q
    rho = ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    delta = (p.exp() - q.exp()).abs()
    rows = ((old.detach() - rollout) * mask).double()
    lengths = mask.sum(1).double()
    sequence = rows.sum(1)
    metrics = {
        "prob_diff_mean": delta.mean(),
        "prob_diff_std": delta.std(correction=0),
        "prob_diff_max": delta.max(),
        "k1": -ratio.mean(),
        "k2": ratio.square().mean() / 2,
        "k3": (ratio.exp() - ratio - 1).mean(),
        "k3_reverse": ((-ratio).exp() + ratio - 1).mean(),
        "logp_abs_diff": ratio.abs().mean(),
        "logp_abs_diff_max": ratio.abs().max(),
        "correlation": _pearson(p.exp(), q.exp()),
        "ppl_ratio": (-sequence / lengths).exp().mean(),
        "chi2_token": rho.square().mean() - 1,
        "chi2_seq": (2 * sequence).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().mean() - 1,
        "ess": 1 / (rho / rho.mean()).square().mean(),
        "out_of_bounds": torch.where(ratio.isnan(), ratio, ((rho < BOUNDS[0]) | (rho > BOUNDS[1])).double()).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def require_no_mismatch(old: Tensor, rollout: Tensor, mask: Tensor) -> None:
    """Every response token's log-prob is the same number, bit for bit, on both sides (arXiv 2605.14220).

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats.
        mask: [N, T], 1 on response tokens.

    Raises:
        MismatchError: the message has the number of differing tokens (NaN differs) and the largest |p_t - q_t|.
    """
    keep = mask.bool()
    p, q = old.detach()[keep], rollout[keep]
    differing = int((p != q).sum())
    if differing:
        raise MismatchError(
            f"the exact engine's log-probs differ from the trainer's on {differing} of {len(p)} tokens, at most by "
            f"{(p - q).abs().max().item():.3g}; they must be equal bit for bit"
        )


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of two [K] vectors; 1 when they are equal, constant vectors included."""
    if torch.equal(x, y):
        return torch.ones((), dtype=x.dtype)
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm())
