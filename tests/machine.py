"""What this machine's kernels run, asked of `quant.hardware`: a test about quantized kernels in general takes the
nearest target there is, a test about one kernel is skipped without it. With AVX-512 and VNNI nothing is replaced and
nothing skipped (tests/test_machine.py)."""

from __future__ import annotations

from typing import Any

import pytest

from quant.config import QuantConfig, TargetSpec, shipped
from quant.hardware import Device, detect_device, unsupported_reason

DEVICE = detect_device()


def runs(quant: QuantConfig, device: Device = DEVICE) -> bool:
    """Whether the device has the kernels for a dense model."""
    return unsupported_reason(quant.spec(), device) is None


def first_that_runs(*targets: str, device: Device = DEVICE) -> str:
    """The first of these targets that the device has kernels for."""
    return next(target for target in targets if runs(QuantConfig(target=target), device))


def needs(quant: QuantConfig, device: Device = DEVICE) -> pytest.MarkDecorator:
    """Skips a test where the device has no kernel for this; the reason names the instructions that are missing."""
    reason = unsupported_reason(quant.spec(), device)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def case(quant: QuantConfig, device: Device = DEVICE) -> Any:
    """A parameter that `needs` its target."""
    return pytest.param(quant, marks=needs(quant, device), id=f"{quant.target}-{quant.kv_cache or 'bf16'}")


def on_cpus() -> list[QuantConfig]:
    """Every shipped target that some CPU without AMX runs."""
    without_amx = [name for name in shipped() if "amx_tile" not in (TargetSpec.load(name).needs.cpu or ("amx_tile",))]
    return [QuantConfig(target=name) for name in without_amx]


# vLLM's kernels for AVX-512 without BF16 instructions (Intel before Cooper Lake) cut BF16 numbers off; others round
CUTS_OFF = "avx512f" in DEVICE.flags and "avx512_bf16" not in DEVICE.flags
# W4A16; without AVX-512 the same INT4 weights, under INT8 activations
INT4 = first_that_runs("int4-g128", "w4a8")
# the suffix of its codes in a checkpoint
CODES = "weight_packed" if INT4 == "int4-g128" else "weight"
# for claims that are the same of any quantized kernel: vLLM's W4A8 kernel is slow on CPUs
QUANTIZED = first_that_runs("int4-g128", "fp8-dynamic")
KV = QuantConfig(target="int4-g64", kv_cache="fp8")
