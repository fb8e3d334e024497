"""Can this machine run the target? Answered without torch, before any minute of work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quant.config import QuantArgs, TargetSpec, shipped

FP8_CACHE = "avx512f"  # what vLLM's attention over FP8 keys and values needs of a CPU


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


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU machine."""
    if detect_device().kind == "cpu":
        return []
    import pynvml

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]


def unsupported_reason(spec: TargetSpec, device: Device, *, experts: bool = False) -> str | None:
    """Why the device cannot run the target's kernels, and the nearest it can; None when it can.

    Args:
        spec: the target.
        device: where the engine runs.
        experts: whether the target quantizes a mixture's experts; vLLM's CPU kernels for those need AMX.
    """
    reason, cache = _unmet(spec, device, experts=experts), _unmet_cache(spec, device)
    if reason is None:
        return f'{spec.name} {cache}; set quant.kv_cache = "bf16"' if cache else None
    near = nearest(spec, device, experts=experts)
    without = experts and _unmet(spec, device, experts=False) is None
    instead = "keep the experts in BF16 with quant.ignore" if without else "no shipped target runs on it"
    advice = f"the nearest target it can run is {near}" if near else instead
    return f"{spec.name} {reason}; {advice}" + (', with quant.kv_cache = "bf16"' if cache else "")


def unread_reason(spec: TargetSpec, device: Device, *, experts: bool = False) -> str | None:
    """What of a live engine that holds the target cannot be read back exactly there yet; None where everything can.

    Args:
        spec: the target.
        device: where the engine runs.
        experts: whether the target quantizes a mixture's experts; for those `train.vllm_experts` knows these layouts.
    """
    weights, inputs = spec.weights, spec.input_activations
    # vLLM's CPU kernel for blocks keeps activations in BF16, and its products are rounded once more
    if not spec.read_back or (device.kind == "cpu" and weights.strategy == "block"):
        return "its kernel's weights"
    nibbles = weights.type == "int" and weights.symmetric and weights.strategy == "group" and inputs is None
    if experts and (device.kind == "cpu" or not (nibbles if weights.num_bits == 4 else inputs is not None)):
        return "its kernel's experts"
    return None


def nearest(spec: TargetSpec, device: Device, *, experts: bool = False) -> str | None:
    """The shipped target most like this one that the device can run; None if there is none.

    Likeness, in this order: bits of the weights, their type, whether activations are quantized, granularity.
    """

    def distance(other: TargetSpec) -> tuple[object, ...]:
        ours, theirs = spec.weights, other.weights
        return (
            ours.num_bits != theirs.num_bits,
            (spec.input_activations is None) != (other.input_activations is None),
            ours.type != theirs.type,
            abs(_grain(ours) - _grain(theirs)),
            (other.calibrated, other.keep_first_layers, other.name),
        )

    runnable = [other for other in map(TargetSpec.load, shipped()) if _unmet(other, device, experts=experts) is None]
    return min(runnable, key=distance).name if runnable else None


def _grain(args: QuantArgs) -> int:
    """Columns under one scale, for comparing; a whole row or tensor counts as very long."""
    return args.group_size or (args.block_structure or (0, 1 << 16))[1]


def _unmet(spec: TargetSpec, device: Device, *, experts: bool) -> str | None:
    if device.kind == "cuda":
        if spec.needs.cuda is None:
            return "has no kernel for an NVIDIA GPU in vLLM"
        if device.capability < spec.needs.cuda:
            needed, found = (".".join(map(str, pair)) for pair in (spec.needs.cuda, device.capability))
            return f"needs a GPU of compute capability {needed} or newer; {device.name} has {found}"
        return None
    if spec.needs.cpu is None:
        return "has no CPU kernel in vLLM, it needs a GPU"
    needed = dict.fromkeys((*spec.needs.cpu, *(("amx_tile",) if experts else ())))
    what = "for a mixture's experts needs" if experts else "needs"
    return _missing(what, needed, device)


def _unmet_cache(spec: TargetSpec, device: Device) -> str | None:
    if spec.kv_cache == "bf16" or device.kind == "cuda":
        return None
    return _missing("with an FP8 KV cache needs", (FP8_CACHE,), device)


def _missing(what: str, needed: Iterable[str], device: Device) -> str | None:
    missing = [flag for flag in needed if flag not in device.flags]
    return f"{what} a CPU with {', '.join(missing)}; {device.name} has none" if missing else None
