"""What learns, in FP32, behind the BF16 module that computes: the weights themselves, or low-rank adapters of them.

The rest of the trainer asks for BF16 weights and hands gradients over; it does not know which of the two it has.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from train.config import TrainConfig


class Masters(Protocol):
    """FP32 parameters, and the BF16 weights that they stand for.

    Attributes:
        parameters: name to FP32 leaf: what the optimizer updates and a checkpoint holds.
        trained: names of the module's parameters whose gradient is wanted; the others are frozen.
    """

    parameters: dict[str, Tensor]
    trained: frozenset[str]

    @property
    def base(self) -> str | None:
        """Digest of the weights that the parameters are a change of; None where they are the weights."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Name to BF16 weight, the module's named parameters, in shards where those are; not to be changed in place."""
        ...

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add dL/dW of a trained weight, BF16, to the gradients of the parameters it is made of, in FP32."""
        ...


class FullWeights:
    """Every weight of the module has an FP32 master of its own. See Masters."""

    base = None

    def __init__(self, module: Any) -> None:
        self.parameters = {name: p.detach().float().clone().requires_grad_() for name, p in module.named_parameters()}
        self.trained = frozenset(self.parameters)

    def weights(self) -> dict[str, Tensor]:
        """See Masters: the rounding of the masters."""
        return {name: master.detach().to(torch.bfloat16) for name, master in self.parameters.items()}

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """See Masters."""
        add_gradient(self.parameters[name], gradient.float())


def masters_of(module: Any, config: TrainConfig, *, seed: int) -> Masters:
    """The masters that a config asks for, from a module as it was loaded.

    Args:
        module: a causal LM, in its checkpoint's dtype.
        config: with or without `lora`.
        seed: what new adapters are drawn from.

    Raises:
        LoraError: `train.lora.modules` names what cannot be adapted in this model.
    """
    if config.lora is None:
        return FullWeights(module)
    from train.lora import Adapters  # only now: peft takes a second to import

    return Adapters(module, config.lora, seed=seed)


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Accumulate in FP32; the gradient becomes the parameter's own where it has none yet."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
