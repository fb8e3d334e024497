"""Compression streams: its memory is bounded by the largest layer, not by the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant.config import TargetSpec
from quant.target import Target

ROWS, WIDTH, LAYERS = 6144, 2048, 4


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still alive.

    Attributes:
        peak: most bytes at any time, without those of `given`.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired() and ref not in self.given}
        self.peak = max(self.peak, sum(self.held.values()))
        return made


@pytest.mark.parametrize(
    "name", ["int4-g128", "int4-g128-asym", "int8", "fp8-dynamic", "fp8-block", "fp8-static", "nvfp4-a16"]
)
def test_peak_extra_memory_is_at_most_three_layers(name) -> None:
    """Four layers of 24 MiB, compressed and thrown away one by one: never more than 3 layers' bytes besides the
    model's own are alive, output included."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(WIDTH, ROWS, bias=False, device="meta") for _ in range(LAYERS)])
    target = Target.for_model(TargetSpec.load(name), model)
    weights = [(f"layers.{i}.weight", torch.randn(ROWS, WIDTH).bfloat16()) for i in range(LAYERS)]
    scales = dict.fromkeys(target.static_scales, torch.ones(1))
    with Live([weight for _, weight in weights]) as live:
        for _ in target.compress(iter(weights), scales):
            pass
    layer = weights[0][1].nbytes
    assert live.peak <= 3 * layer
    assert live.peak > layer / 4  # it does count: the packed output alone is that much
