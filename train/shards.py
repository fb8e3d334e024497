"""Weights in shards: Q(W) of a rank's own rows, and W in one piece for whoever sends it.

FSDP2 splits a weight by its rows (stacked experts by experts), and most targets give every row scales of its own, so
a rank quantizes its share of W alone: nothing is sent, and the bits are those of the whole matrix. Where a scale
reaches over more rows than a shard has, a fused layer is gathered, quantized and divided again, one at a time. In a
world of one nothing is in shards, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quant.modules import engine_layer, matrices
from quant.target import Target
from train.distributed import World, divided, whole


class Lent(Mapping[str, Tensor]):
    """Tensors in the host's memory that are lent to a device, each for as long as its borrower keeps it."""

    def __init__(self, held: Mapping[str, Tensor], device: torch.device) -> None:
        self._held = held
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def gathered(weights: Mapping[str, Tensor], world: World, device: torch.device) -> Mapping[str, Tensor]:
    """The weights in one piece, for the first rank; all ranks must ask at the same time.

    Args:
        weights: name to tensor, sharded over the ranks.
        world: the ranks.
        device: what the first rank works on.

    Returns:
        On the first rank name to tensor on that device, kept in the host's memory; on the others nothing. In a world
        of one the weights themselves.
    """
    if world.size == 1:
        return weights
    held: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        one = whole(tensor)
        if world.first:
            held[name] = one.cpu()
    return Lent(held, device)


def deployed(target: Target, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`target.deployed(weights)`, sharded as the weights are, with the same bits; all ranks must ask at the same time.

    Args:
        target: the deployment target.
        weights: name to BF16 weight, all in shards or none.
    """
    shards = {name: tensor for name, tensor in weights.items() if isinstance(tensor, DTensor)}
    if not shards:
        return target.deployed(weights)
    apart = {name: tensor for name, tensor in shards.items() if splits(target, name, tensor)}
    own = target.deployed({name: tensor.to_local() for name, tensor in apart.items() if tensor.to_local().numel()})
    # a rank may have no row of a matrix; its share of Q(W) is as empty as that of W
    found = {name: _like(own.get(name, tensor.to_local()), tensor) for name, tensor in apart.items()}
    rest = {
        name: tensor for name, tensor in shards.items() if name not in apart and _is_quantized(target, name, tensor)
    }
    for _, layer in groupby(rest, key=lambda name: engine_layer(name)):
        pieces = target.deployed({name: whole(rest[name]) for name in layer})
        found |= {name: divided(piece, rest[name]) for name, piece in pieces.items()}
    return {name: found[name] for name in weights if name in found}


def splits(target: Target, name: str, tensor: DTensor) -> bool:
    """Whether every rank can quantize its share of a weight alone: the share is of whole experts that are quantized
    alike, or of whole runs of the rows that share scales.

    Args:
        target: the deployment target.
        name: of the weight, as in `model.named_parameters()`.
        tensor: it, split along its first dimension.
    """
    parts = _quantized_parts(target, name, tensor)
    if not any(parts) or not all(parts) or target.rows_per_scale is None:
        return False
    per_rank = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.ndim == 3 or per_rank % target.rows_per_scale == 0


def _is_quantized(target: Target, name: str, tensor: DTensor) -> bool:
    return any(_quantized_parts(target, name, tensor))


def _quantized_parts(target: Target, name: str, tensor: DTensor) -> list[bool]:
    shape = torch.empty(tensor.shape, device="meta")
    return [part.removesuffix(".weight") in target.shapes for part, _ in matrices(name, shape)]


def _like(local: Tensor, tensor: DTensor) -> DTensor:
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
