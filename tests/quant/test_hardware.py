"""A target that a machine cannot run is refused with the reason and the nearest one it can run."""

import re

import pytest

from quant.config import QuantConfig, TargetSpec, shipped
from quant.hardware import Device, unread_reason, unsupported_reason

EPYC = Device("cpu", "EPYC", (0, 0), frozenset({"avx2", "avx512f", "avx512_vnni"}))
XEON = Device("cpu", "Xeon", (0, 0), frozenset({"avx2", "avx512f", "avx512_vnni", "amx_tile"}))
SKYLAKE = Device("cpu", "Skylake", (0, 0), frozenset({"avx2", "avx512f"}))
ZEN3 = Device("cpu", "Zen 3", (0, 0), frozenset({"avx2"}))
OLD = Device("cpu", "Celeron", (0, 0), frozenset({"sse4_2"}))
A100 = Device("cuda", "A100", (8, 0), frozenset())
H100 = Device("cuda", "H100", (9, 0), frozenset())
B200 = Device("cuda", "B200", (10, 0), frozenset())


@pytest.mark.parametrize(
    ("device", "runs"),
    [
        (EPYC, {"fp8-dynamic", "int4-channel", "int4-g128", "int4-g128-asym", "int4-g128-mixed",
                "int4-g32", "int4-g64", "int8", "w4a8"}),
        (SKYLAKE, {"fp8-dynamic", "int4-channel", "int4-g128", "int4-g128-asym", "int4-g128-mixed",
                   "int4-g32", "int4-g64", "w4a8"}),
        (ZEN3, {"fp8-dynamic", "w4a8"}),
        (OLD, set()),
        (A100, {"int4-channel", "int4-g128", "int4-g128-asym", "int4-g128-mixed", "int4-g32", "int4-g64", "int8",
                "mxfp4", "nvfp4-a16"}),
        (B200, set(shipped()) - {"w4a8"}),
    ],
)  # fmt: skip
def test_what_runs_where(device, runs) -> None:
    """The shipped targets a device can run are exactly these."""
    assert {name for name in shipped() if unsupported_reason(TargetSpec.load(name), device) is None} == runs


@pytest.mark.parametrize(
    ("name", "device", "says", "near"),
    [
        ("nvfp4", H100, r"needs a GPU of compute capability 10\.0 or newer; H100 has 9\.0", "w4a8-fp8"),
        ("mxfp8", H100, r"10\.0", "fp8-block"),
        ("fp8-block", EPYC, "needs a CPU with amx_tile; EPYC has none", "fp8-dynamic"),
        ("int4-g128", ZEN3, "needs a CPU with avx512f; Zen 3 has none", "w4a8"),
        ("int4-g32", ZEN3, "needs a CPU with avx512f", "w4a8"),
        ("int8", ZEN3, "needs a CPU with avx512f, avx512_vnni; Zen 3 has none", "fp8-dynamic"),
        ("int8", SKYLAKE, "needs a CPU with avx512_vnni; Skylake has none", "fp8-dynamic"),
        ("mxfp4", EPYC, "has no CPU kernel in vLLM, it needs a GPU", "int4-g32"),
        ("fp8-dynamic", A100, r"8\.9", "int8"),
        ("w4a8", A100, "has no kernel for an NVIDIA GPU", None),
    ],
)
def test_refusal_names_the_reason_and_the_nearest(name, device, says, near) -> None:
    """The nearest keeps the bits of the weights first, then quantized activations, then the type, then the grain."""
    reason = unsupported_reason(TargetSpec.load(name), device)
    assert reason is not None
    assert re.search(says, reason)
    if near is not None:
        assert reason.endswith(f"the nearest target it can run is {near}")


def test_quantized_experts_need_amx_on_a_cpu() -> None:
    """The same target runs for a dense model, not for a mixture's experts; with AMX, or on a GPU, for both."""
    spec = TargetSpec.load("int4-g128")
    assert unsupported_reason(spec, EPYC) is None
    reason = unsupported_reason(spec, EPYC, experts=True)
    assert reason is not None
    assert "for a mixture's experts needs a CPU with amx_tile" in reason
    assert reason.endswith("keep the experts in BF16 with quant.ignore")
    assert unsupported_reason(spec, XEON, experts=True) is None
    assert unsupported_reason(spec, H100, experts=True) is None


def test_an_fp8_cache_needs_avx512_on_a_cpu() -> None:
    """Whatever the weights: the line says what to set, beside another target where the CPU lacks that one's kernel too.
    On a GPU nothing more is asked."""
    for device in (EPYC, H100):
        assert unsupported_reason(QuantConfig(target="fp8-dynamic", kv_cache="fp8").spec(), device) is None
    assert unsupported_reason(QuantConfig(target="fp8-dynamic", kv_cache="fp8").spec(), ZEN3) == (
        'fp8-dynamic with an FP8 KV cache needs a CPU with avx512f; Zen 3 has none; set quant.kv_cache = "bf16"'
    )
    assert unsupported_reason(QuantConfig(target="int4-g128", kv_cache="fp8").spec(), ZEN3) == (
        "int4-g128 needs a CPU with avx512f; Zen 3 has none; the nearest target it can run is w4a8, with "
        'quant.kv_cache = "bf16"'
    )


def test_a_run_adds_to_its_target() -> None:
    """`[quant]` adds an FP8 KV cache and modules kept in BF16 to any target; what the file says stays."""
    spec = QuantConfig(target="int4-g64", kv_cache="fp8", ignore=("re:.*layers\\.0\\..*",)).spec()
    assert spec.kv_cache == "fp8"
    assert spec.calibrated
    assert spec.keeps("model.layers.0.mlp.up_proj")
    assert spec.keeps("lm_head")
    assert not spec.keeps("model.layers.1.mlp.up_proj")
    assert not TargetSpec.load("int4-g64").calibrated


def test_what_can_be_read_back() -> None:
    """Rollouts need a sync that can be proven: all targets but those whose activations have static scales, or groups
    without blocks of weights, or an integer weight under floating point activations. On a CPU no blocks either."""
    never = {"fp8-static", "mxfp8", "nvfp4", "w4a8-fp8"}
    assert {name for name in shipped() if unread_reason(TargetSpec.load(name), H100)} == never
    assert {name for name in shipped() if unread_reason(TargetSpec.load(name), XEON)} == never | {"fp8-block"}


def test_which_quantized_experts_can_be_read_back() -> None:
    """On a GPU those of 8 bits by rows or blocks and symmetric INT4 in groups, whose kernels read the checkpoint's own
    layout; on a CPU none: their kernels need AMX and pack."""
    read = {name for name in shipped() if unread_reason(TargetSpec.load(name), H100, experts=True) is None}
    assert read == {"fp8-dynamic", "fp8-block", "int8", "int4-g32", "int4-g64", "int4-g128", "int4-g128-mixed"}
    assert all(unread_reason(TargetSpec.load(name), XEON, experts=True) for name in shipped())
