"""A worker that holds other weights than it was sent, for tests: alone in the second replica, when a file is there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from train.vllm_worker import WeightSync

FLIP = "TEST_FLIP"  # environment variable with the file's path
MATRIX = "model.layers.0.mlp.down_proj.weight"


class FlipsInReplica1(WeightSync):
    """One bit of one matrix's codes, after that file was made."""

    def boresight_load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        wrong = self.parallel_config.data_parallel_index == 1 and Path(os.environ[FLIP]).exists()
        super().boresight_load(
            (name, _flipped(value) if wrong and self._is_it(name) else value) for name, value in tensors
        )

    def _is_it(self, name: str) -> bool:
        return name in (MATRIX, f"{MATRIX}_packed")


def _flipped(codes: Tensor) -> Tensor:
    other = codes.clone()
    other.view(torch.uint8)[3, 0] ^= 1
    return other
