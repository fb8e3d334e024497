"""Known GPUs: what a plan and a check for another machine go by. Torch-free.

Compute and bandwidth are the vendor's data sheets (dense BF16 with FP32 accumulation, no sparsity), peak values that no
program reaches. Memory is what CUDA reports as a card's total, a little below the number in its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant.errors import BoresightError
from quant.hardware import Device
from quant.tables import shown


class UnknownGpuError(BoresightError, ValueError):
    """No GPU of that name is known here."""


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: as the command line takes it.
        title: as the vendor names it.
        capability: CUDA compute capability (major, minor).
        memory_gib: total memory as CUDA reports it, GiB.
        bf16_tflops: dense BF16 peak of the data sheet, 1e12 operations per second.
        memory_gbs: memory bandwidth of the data sheet, 1e9 bytes per second.
        link_gbs: to the other cards of its machine, one direction, 1e9 bytes per second: NVLink, or PCIe 4.0 x16.
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory_gib: float
    bf16_tflops: float
    memory_gbs: float
    link_gbs: float

    @property
    def device(self) -> Device:
        """What the kernels' needs are compared with."""
        return Device("cuda", self.title, self.capability, frozenset())

    def with_memory(self, gib: float) -> Gpu:
        """The card with another amount of memory."""
        return replace(self, memory_gib=gib)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", "NVIDIA H200 141 GB SXM", (9, 0), 139.7, 989.4, 4800, 450),
        Gpu("h100", "NVIDIA H100 80 GB SXM", (9, 0), 79.1, 989.4, 3350, 450),
        Gpu("a100-80", "NVIDIA A100 80 GB SXM", (8, 0), 79.1, 312, 2039, 300),
        Gpu("a100-40", "NVIDIA A100 40 GB SXM", (8, 0), 39.4, 312, 1555, 300),
        Gpu("l40s", "NVIDIA L40S 48 GB", (8, 9), 44.4, 362, 864, 32),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", (8, 9), 23.6, 165.2, 1008, 32),
    )
}


def known_gpu(name: str) -> Gpu:
    """A GPU by its short name, in any case.

    Raises:
        UnknownGpuError: names those that are known.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UnknownGpuError(f"no GPU {shown(name)} is known here; known: {', '.join(GPUS)}")
    return found
