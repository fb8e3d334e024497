"""Routing replay: the trainer sends every token to the experts that the rollout engine sent it to.

Near a tie, two implementations of one Mixture-of-Experts model choose other experts for the same token, and that noise
is a part of the discrepancy that has nothing to do with quantization. In replay the choice is the engine's and all else
the trainer's: the gate weights are its own router's softmax probabilities, gathered at the engine's ids and
renormalized as the model does it, so the gradient still reaches the router. Sources: R3, arXiv 2510.11370; GSPO,
arXiv 2507.18071. Left out: families other than Qwen3-MoE, whose routers score in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from quant.errors import BoresightError

OWN_CHOICE = -1  # in place of an expert's id: let the router choose


class RoutingError(BoresightError):
    """A model whose routing cannot be replayed, or expert ids that do not fit it."""


def replayable_layers(module: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers with a router that `replay` can force, by index; dense layers are not among them.

    Raises:
        RoutingError: the model has none.
    """
    decoder: Any = module.get_submodule("model")
    found = {i: layer for i, layer in enumerate(decoder.layers) if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock)}
    if not found:
        raise RoutingError(f"routing replay knows the router of Qwen3-MoE models only, got {type(module).__name__}")
    return found


def padded(records: Sequence[Tensor], width: int) -> Tensor:
    """Engine records of n sequences as one tensor for `replay`; positions without a record keep the router's choice.

    Args:
        records: n tensors [positions, layers, k], positions <= width, aligned with the sequences' first tokens.
        width: L.

    Returns:
        [layers, n, L, k] int64.
    """
    _, layers, k = records[0].shape
    experts = torch.full((layers, len(records), width, k), OWN_CHOICE)
    for row, record in enumerate(records):
        experts[:, row, : len(record)] = record.transpose(0, 1).long()
    return experts


@contextmanager
def replay(module: nn.Module, experts: Tensor) -> Iterator[None]:
    """Force the experts in every forward pass inside this context.

    With gradient checkpointing the recomputation replays too, though backward runs after the context has been left.

    Args:
        module: a Qwen3-MoE causal LM.
        experts: [layers, n, L, k] integer, for a forward pass of n rows of L tokens; a token's k ids are distinct, or
            all `OWN_CHOICE`. One entry per decoder layer; those of dense layers are not read.

    Raises:
        RoutingError: another model; experts that do not fit it; a forward pass of other than n * L tokens.
    """
    layers = replayable_layers(module)
    _check(experts, module)
    with ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(_replayed(layer, experts[index].flatten(0, 1).long()))
        yield


def _check(experts: Tensor, module: Any) -> None:
    """Raise what `replay` says about its experts."""
    config = module.config
    layers, count, k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
    if experts.dim() != 4 or (experts.shape[0], experts.shape[3]) != (layers, k) or experts.is_floating_point():
        raise RoutingError(
            f"experts must be integers [layers={layers}, n, L, k={k}], got {experts.dtype} {list(experts.shape)}"
        )
    chosen = experts[list(replayable_layers(module))].long()
    own = chosen == OWN_CHOICE
    if (~own & ((chosen < 0) | (chosen >= count))).any():
        raise RoutingError(
            f"expert ids must be in [0, {count}) or {OWN_CHOICE}, got {int(chosen.min())} to {int(chosen.max())}"
        )
    ordered = chosen.sort(-1).values
    repeated = (ordered.diff(dim=-1) == 0).any(-1)
    if (own.any(-1) != own.all(-1)).any() or (repeated & ~own.all(-1)).any():
        raise RoutingError(f"a token's {k} expert ids must be distinct or all {OWN_CHOICE}: this is not a routing")


@contextmanager
def _replayed(layer: Any, ids: Tensor) -> Iterator[None]:
    """Force one decoder layer's experts [tokens, k], in the recomputation of a checkpointed layer too."""
    if not (layer.gradient_checkpointing and layer.training):  # the condition under which transformers checkpoints
        with _forced(layer.mlp.gate, ids):
            yield
        return
    checkpoint = layer._gradient_checkpointing_func

    def replaying(function: Callable[..., Any], *args: Any) -> Any:
        def forced(*inputs: Any) -> Any:
            with _forced(layer.mlp.gate, ids):
                return function(*inputs)

        return checkpoint(forced, *args)

    layer._gradient_checkpointing_func = replaying
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


@contextmanager
def _forced(router: Qwen3MoeTopKRouter, ids: Tensor) -> Iterator[None]:
    """Replace the router's choice by ids [tokens, k]; its weights are computed as `Qwen3MoeTopKRouter.forward` does."""

    def choose(module: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, own = output
        if len(ids) != len(own):
            raise RoutingError(f"experts were given for {len(ids)} tokens, the forward pass has {len(own)}")
        given = ids.to(own.device)
        chosen = torch.where(given == OWN_CHOICE, own, given)
        weights = logits.softmax(-1, dtype=torch.float).gather(1, chosen)
        if module.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen

    hook = router.register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()
