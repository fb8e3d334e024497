"""No test is lost to what a machine lacks without anybody knowing: which run where."""

import pytest

from quant.config import QuantConfig
from quant.hardware import Device
from tests.machine import KV, case, first_that_runs, needs, on_cpus

AVX512 = Device("cpu", "Genoa", (0, 0), frozenset({"avx2", "avx512f", "avx512_vnni"}))
AVX2 = Device("cpu", "Zen 3", (0, 0), frozenset({"avx2"}))


def not_skipped(device: Device) -> set[str]:
    """The ids of the CPU targets that are not skipped on a device."""
    cases = [case(quant, device) for quant in (*on_cpus(), KV)]
    return {one.id for one in cases if not any(mark.args[0] for mark in one.marks)}


def test_a_cpu_with_avx512_skips_no_target() -> None:
    """Nine targets and the FP8 KV cache, by name; and INT4 is W4A16 there, not its replacement."""
    assert not_skipped(AVX512) == {
        "fp8-dynamic-bf16", "int4-channel-bf16", "int4-g128-bf16", "int4-g128-asym-bf16", "int4-g128-mixed-bf16",
        "int4-g32-bf16", "int4-g64-bf16", "int8-bf16", "w4a8-bf16", "int4-g64-fp8",
    }  # fmt: skip
    assert first_that_runs("int4-g128", "w4a8", device=AVX512) == "int4-g128"


def test_a_cpu_with_avx2_alone_tests_what_it_has_and_says_what_it_lacks() -> None:
    """FP8 and W4A8 run; the others' reasons name the instruction sets."""
    assert not_skipped(AVX2) == {"fp8-dynamic-bf16", "w4a8-bf16"}
    assert first_that_runs("int4-g128", "w4a8", device=AVX2) == "w4a8"
    reason = needs(QuantConfig(target="int8"), AVX2).kwargs["reason"]
    assert "needs a CPU with avx512f, avx512_vnni; Zen 3 has none" in reason
    with pytest.raises(StopIteration):
        first_that_runs("int4-g128", "int8", device=AVX2)
