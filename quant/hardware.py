"""Can this machine run the target? Answered without torch, before any minute of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant.config import TargetSpec


@dataclass(frozen=True)
class Device:
    """Where engine and trainer will run.

    Attributes:
        kind: "cpu" or "cuda".
        name: as the vendor names it.
        capability: CUDA compute capability (major, minor); (0, 0) on a CPU.
        flags: CPU instruction sets, empty on a GPU.
    """

    kind: str
    name: str
    capability: tuple[int, int]
    flags: frozenset[str]


def detect_device() -> Device:
    """The first NVIDIA GPU through NVML, else the CPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        if pynvml.nvmlDeviceGetCount() > 0:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            return Device(
                "cuda",
                str(pynvml.nvmlDeviceGetName(handle)),
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                frozenset(),
            )
    except pynvml.NVMLError:
        pass  # no driver: a CPU machine
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return Device("cpu", fields.get("model name", "unknown CPU"), (0, 0), frozenset(fields.get("flags", "").split()))


def unsupported_reason(spec: TargetSpec, device: Device) -> str | None:
    """Why the device cannot run the target's kernels, or None when it can.

    W4A16 needs AVX-512 on a CPU (vLLM's CPUWNA16 kernel) and compute capability 8.0 on a GPU (Marlin).
    """
    if device.kind == "cuda" and device.capability < (8, 0):
        return f"{spec.name} needs a GPU of compute capability 8.0 or newer; {device.name} has {device.capability}"
    if device.kind == "cpu" and "avx512f" not in device.flags:
        return f"{spec.name} needs a CPU with AVX-512 (vLLM's 4-bit kernel); {device.name} has none"
    return None
