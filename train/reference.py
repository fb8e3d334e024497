"""The initial policy, frozen: what a reference KL keeps the trained policy near, or Q(W) is pulled towards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.policy import Policy
from train.records import TokenBatch


class Reference:
    """A BF16 copy of the weights that a policy started from; it computes with the policy's own module.

    To be made before the policy's first `run_at` of other weights. A resumed run's too: a checkpoint fills the
    masters, the module still holds what was loaded.

    Attributes:
        weights: parameter name to BF16 tensor, on the policy's device, in shards over several ranks.
    """

    def __init__(self, policy: Policy) -> None:
        self.weights = {
            name: parameter.detach().to(torch.bfloat16, copy=True)
            for name, parameter in policy.module.named_parameters()
        }

    @torch.no_grad()
    def logprobs(self, policy: Policy, batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        """`Policy.logprobs` at these weights, [n, T] without gradient; the module gets its own back, untouched.

        Weights are exchanged by reference, so a graph made before is still good for its backward pass.
        """
        parameters = dict(policy.module.named_parameters())
        present = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.weights[name]
            return policy.logprobs(batch, rows)
        finally:
            for name, parameter in parameters.items():
                parameter.data = present[name]
