"""What the train-versus-deployed mismatch does to the policy loss, told apart by the advantage's sign: pure.

The usual metrics average over all tokens, and a failure that shifts every ratio one way stays small in a KL. In the
loss it does not cancel: it pushes tokens with a positive advantage one way and those with a negative one the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.discrepancy import LOG_RATIO_BOUND


def sign_skew(old: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, float | None]:
    """C_t = -(r_t - 1) A_t with r_t = exp(p_t - q_t): what the mismatch adds to a token's loss -A_t.

    Over the tokens of either sign, mean C; and the skew, mean C where A > 0 minus mean C where A < 0. With no mismatch
    all are 0. A ratio of 1 + e everywhere gives the skew -e (mean A+ + mean |A-|), where the mean of C over all tokens
    is 0 as soon as the advantages are centred.

    Source: arXiv 2605.14220 (the probe C and that its skew depends on the sign); the difference of means as its
    number is ours.

    Args:
        old: [N, T] p_t, nats.
        rollout: [N, T] q_t, nats; the difference is clamped to +-20.
        advantages: [N, T].
        mask: [N, T], 1 on response tokens.

    Returns:
        "mismatch_cost_positive", "mismatch_cost_negative", "mismatch_cost_skew", in units of the advantage; None where
        no token has that sign.
    """
    ratio = (old.detach() - rollout).double().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    cost = -torch.expm1(ratio) * advantages
    kept = mask.bool()
    positive, negative = (
        cost[kept & sign].mean().item() if (kept & sign).any() else None for sign in (advantages > 0, advantages < 0)
    )
    return {
        "mismatch_cost_positive": positive,
        "mismatch_cost_negative": negative,
        "mismatch_cost_skew": None if positive is None or negative is None else positive - negative,
    }
