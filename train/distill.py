"""`distill`: a pull of the deployed policy towards a BF16 one, through the quantizer. Ours, not a paper's.

Adds w lambda * mean_t KL(pi_V(. | t) || pi_Q(W)(. | t)) to the loss, pi_V constant; the gradient at Q(W) goes straight
through to W. The policy loss stays where the trainer runs: at W with w = 1 (`distill`), at the blend with w the
`distill_weight` (`blend+distill`). It moves W so that its *quantized* copy comes to say what V says. V is the weights
that training began with, or W itself; where the trainer runs at the blend, nothing keeps W's own policy good, and a
pull towards it can lead nowhere (docs/evidence.md). Distilling the other way (W towards the deployed policy) was
measured to be harmful.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from train.policy import Policy
from train.records import TokenBatch
from train.token_kl import kl_divergence


def pull(
    policy: Policy,
    batch: TokenBatch,
    rows: Sequence[int],
    *,
    teacher: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    deployed: Mapping[str, Tensor],
    scale: float | Tensor,
) -> float:
    """Add scale * d/dQ(W) sum_t KL(pi_teacher || pi_Q(W)) of these rows to the masters' gradient.

    A forward of the teacher without gradient, then forward and backward at Q(W); the hooks that move the module's
    gradient into the masters make it straight-through. Holds both logits of these rows' tokens, in BF16. Leaves the
    module at Q(W).

    Args:
        policy: at any weights, with no backward pass outstanding.
        batch: the step's N sequences.
        rows: a micro-batch of them.
        teacher: name to BF16 weight, all names: W, or the weights that training began with.
        weights: name to BF16 W, all names.
        deployed: name to BF16 Q(W), the quantized names.
        scale: lambda over the number of tokens of the optimizer step.

    Returns:
        The rows' sum of KL, nats, without the scale.
    """
    policy.run_at(teacher)
    with torch.no_grad():
        target = policy.token_logits(batch, rows)
    policy.run_at({**weights, **deployed})
    divergence = kl_divergence(target, policy.token_logits(batch, rows), policy.config.rollout.temperature)
    (scale * divergence).backward()
    return divergence.item()
