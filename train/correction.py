"""Corrections for rollouts from another distribution than the trainer's: pure importance weights.

Off by default where the quantized model is what ships: a full correction turns the gradient into that of the BF16
policy, whose improvement is not what is deployed.
"""

from __future__ import annotations

from torch import Tensor


def token_tis(old: Tensor, rollout: Tensor, *, cap: float) -> Tensor:
    """Token-level truncated importance sampling: w_t = min(exp(p_t - q_t), C) (Ionides 2008; used for RL by TIS).

    Args:
        old: [N, T] trainer log-probs before the update, nats.
        rollout: [N, T] log-probs of the engine that sampled, nats.
        cap: C > 0.

    Returns:
        [N, T] weights in (0, C], without gradient.
    """
    return (old - rollout).detach().exp().clamp(max=cap)
