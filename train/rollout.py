"""What a rollout engine must do. One file per engine implements it; the trainer knows no other side of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from train.records import Completion

CPU_BATCH_TOKENS = 4096  # of a CPU engine's step, at least: many short prompts at once


@dataclass(frozen=True)
class EngineWeights:
    """What an engine computes with, read back through its own kernels.

    Attributes:
        fingerprints: checkpoint tensor name to `quant.verify.fingerprint` of the effective BF16 weight.
        kernels: module name to the kernel that multiplies with it.
    """

    fingerprints: Mapping[str, str]
    kernels: Mapping[str, str]


class RolloutEngine(Protocol):
    """An inference engine that serves the deployment target.

    Attributes:
        version: loads so far: the number of the weights it holds, which every completion names.
    """

    version: int

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by these checkpoint-format tensors, and forget everything derived from the old ones."""
        ...

    def read_back(self) -> EngineWeights:
        """What the engine now computes with."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """Sample G completions per prompt.

        Args:
            prompts: P prompts' token ids.
            seeds: P seeds; completion g of prompt p depends on (seeds[p], g), its prompt and the weights alone.

        Returns:
            P groups of G completions; with experts where `routing_replay` asks for them.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What the engine itself has to say about the last `generate`, for a step's row."""
        ...
