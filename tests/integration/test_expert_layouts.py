"""A mixture's experts as a GPU's kernel reads them: vLLM's own layers hold them on a CPU, and they are read back.

vLLM is made to take its Triton backend here, which has no CPU kernel: its method, weight loader, conversion and reload
are the real ones; alone the product is left out, so nothing is generated. That the kernel computes with what its
tensors say is for tests/gpu to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.verify import VerificationError
from tests.block_kernel import choose_block_kernel
from tests.integration.test_sync import Case
from train.sync import sync
from train.timing import Stopwatch
from train.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.mixture]
EXPERT = "model.layers.1.mlp.experts.2.down_proj"
# attention in BF16 where not every CPU has its quantized kernels
ATTENTION = (r"re:.*self_attn.*",)
FORMATS = ["bf16", "fp8-dynamic", "fp8-block", "int8", "int4-g32", "int4-g128"]


def case(name: str, seed: int) -> Case:
    quant = None if name == "bf16" else QuantConfig(target=name, ignore=() if "fp8" in name else ATTENTION)
    return Case(seed, quant, family="qwen3-moe")


@dataclass(frozen=True)
class Held:
    """An engine and the format of its experts."""

    name: str
    engine: VllmEngine

    def sync(self, seed: int) -> None:
        case(self.name, seed).sync_to(self.engine)

    def experts(self, layer: int) -> Any:
        """vLLM's layer."""
        find: Callable[[Any], Any] = lambda worker: worker.model_runner.get_model()  # noqa: E731
        return self.engine._llm.collective_rpc(find)[0].model.layers[layer].mlp.experts.routed_experts


def choose_triton(patch: pytest.MonkeyPatch) -> None:
    """What a card with all of Triton's formats would say, and no product."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts, TritonWNA16Experts
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16, unquantized

    for oracle, backends in (
        (fp8, fp8.Fp8MoeBackend), (int8, int8.Int8MoeBackend), (int_wna16, int_wna16.WNA16MoEBackend),
        (unquantized, unquantized.UnquantizedMoeBackend),
    ):  # fmt: skip
        patch.setattr(oracle, "_get_priority_backends", lambda *_, only=backends.TRITON: [only])
    for experts in (TritonExperts, TritonWNA16Experts):
        patch.setattr(experts, "is_supported_config", staticmethod(lambda *_: (True, None)))
    patch.setattr(modular_kernel.FusedMoEKernel, "apply", lambda _, hidden_states, *__, **___: hidden_states * 0)


@pytest.fixture(scope="module", params=FORMATS)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """An engine on seed 0; tests sync it to what they need."""
    with pytest.MonkeyPatch.context() as patch:
        choose_triton(patch)
        choose_block_kernel(patch)
        yield Held(request.param, case(request.param, 0).start(tmp_path_factory.mktemp(request.param)))


def test_experts_are_read_back_exactly_after_every_sync(held) -> None:
    """From seed 0 to 1 and back, twice: all 48 matrices of 16 experts, unpacked from what the kernel reads, are Q(W)
    bit for bit, on the quantized kernel where there is a target."""
    for seed in (1, 0, 1, 0):
        held.sync(seed)
    kernels = {kernel for name, kernel in held.engine.read_back().kernels.items() if ".experts." in name}
    method = {"bf16": "UnquantizedFusedMoE", "int8": "CompressedTensorsW8A8Int8MoE"}.get(
        held.name, f"CompressedTensors{'W8A8Fp8' if 'fp8' in held.name else 'WNA16'}MoE"
    )
    assert kernels == {f"{method}Method/Triton{'WNA16' if 'int4' in held.name else ''}Experts"}
    assert sum(".experts." in name for name in held.engine.read_back().fingerprints) == 48


def test_one_layer_that_moved_is_sent_alone(held) -> None:
    """One row of one expert's gate is doubled, and its scale with it: one layer of experts is sent, less than half of
    the bytes; everything is verified, also the layer whose kernel was put aside for the load and had nothing sent."""
    start = case(held.name, 0)
    first, weights = start.sync_to(held.engine), start.weights
    weights["model.layers.0.mlp.experts.gate_up_proj"][5, 3] *= 2
    again = sync(weights, start.target, held.engine, step=1, previous=first, clock=Stopwatch())
    assert 0 < again.sent < 0.5


def sending(patch: pytest.MonkeyPatch, engine: VllmEngine, change: Callable[[dict[str, Tensor]], None]) -> None:
    """From now on, what is sent is changed on the way."""
    load = engine.load

    def changed(tensors: Mapping[str, Tensor]) -> None:
        sent = {name: tensor.clone() for name, tensor in tensors.items()}
        change(sent)
        load(sent)

    patch.setattr(engine, "load", changed)


def only_expert() -> Any:
    return pytest.raises(VerificationError, match=rf"1 of \d+ tensors differ: {EXPERT}\.weight$")


@pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
def test_one_flipped_bit_of_one_expert_is_caught(held, monkeypatch, leaf) -> None:
    """The lowest bit of one code, or the highest of one scale's mantissa: that expert's matrix is named, alone."""

    def flip(tensors: dict[str, Tensor]) -> None:
        name = f"{EXPERT}.{leaf}" if f"{EXPERT}.{leaf}" in tensors else f"{EXPERT}.weight_packed"
        tensors[name].view(torch.uint8).flatten()[0 if leaf == "weight" else -2] ^= 1 if leaf == "weight" else 64

    if leaf == "weight_scale" and held.name == "bf16":
        pytest.skip("it has no scales")
    sending(monkeypatch, held.engine, flip)
    with only_expert():
        held.sync(1)
    monkeypatch.undo()
    held.sync(1)


def test_a_stale_expert_is_caught(held, monkeypatch) -> None:
    """One expert's matrix is the last sync's: it is named, alone."""
    held.sync(0)
    old = case(held.name, 0)
    before = dict(old.target.compress(old.weights.items())) if old.target else None

    def keep(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith(f"{EXPERT}."):
                stack = old.weights["model.layers.1.mlp.experts.down_proj"]
                tensors[name] = before[name] if before else stack[2]

    sending(monkeypatch, held.engine, keep)
    with only_expert():
        held.sync(1)
    monkeypatch.undo()
    held.sync(1)


def test_scales_that_only_the_kernel_still_holds_are_caught(held) -> None:
    """The layer has the new scales, its kernel multiplies with others: every down projection of the layer is named."""
    if held.name == "bf16":
        pytest.skip("it has no scales")
    held.sync(0)
    kernel = held.experts(1).quant_method.moe_kernel.fused_experts
    right = kernel.w2_scale
    kernel.quant_config._w2.scale = right * 2
    try:
        found = held.engine.read_back().fingerprints
    finally:
        kernel.quant_config._w2.scale = right
    expected = held.engine.read_back().fingerprints
    wrong = [name for name in expected if found[name] != expected[name]]
    assert wrong == [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]


def test_a_backend_that_is_not_known_is_refused(held) -> None:
    """A kernel of another class, even one derived from a known one, is named with its layer; nothing is guessed."""
    kernel = held.experts(1).quant_method.moe_kernel.fused_experts
    known = type(kernel)
    kernel.__class__ = type("MarlinExperts", (known,), {})
    try:
        with pytest.raises(
            VerificationError,
            match=r"^model\.layers\.1\.mlp\.experts: no exact read-back of experts that \w+Method/MarlinExperts",
        ):
            held.engine.read_back()
    finally:
        kernel.__class__ = known
    held.engine.read_back()


def test_a_padded_layout_is_refused(held, monkeypatch) -> None:
    """Rows that the checkpoint has not, as other backends add them: refused, with the shape that was found."""
    layer = held.experts(0)
    padded = torch.cat((layer.w13_weight, layer.w13_weight[:, :2]), 1)
    rows = 130 if held.name == "bf16" else 258
    monkeypatch.setitem(layer._parameters, "w13_weight", torch.nn.Parameter(padded, requires_grad=False))
    with pytest.raises(VerificationError, match=rf"^model\.layers\.0\.mlp\.experts.*\({rows}, "):
        held.engine.read_back()
