"""A mixture's quantized experts on a GPU: synced, read back from the Triton kernel's tensors, and computed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.config import QuantConfig
from quant.hardware import detect_device, unsupported_reason
from quant.verify import VerificationError
from tests.integration.test_sync import PROMPTS, SEEDS, Case
from train.vllm_engine import VllmEngine
from train.vllm_experts import expert_weights

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.mixture,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# the most that the product may be off, relative to its norm: BF16 rounding, or activations in 8 bits (twice)
FORMATS = {"bf16": 0.01, "int4-g32": 0.01, "int4-g128": 0.01, "int8": 0.05, "fp8-dynamic": 0.1, "fp8-block": 0.1}


def case(name: str, seed: int) -> Case:
    quant = None if name == "bf16" else QuantConfig(target=name)
    if quant and (reason := unsupported_reason(quant.spec(), detect_device(), experts=True)):
        pytest.skip(reason)
    return Case(seed, quant, family="qwen3-moe")


@pytest.mark.parametrize("name", FORMATS)
def test_a_synced_mixture_equals_a_fresh_one(tmp_path, name) -> None:
    """From seed 0 to 1 and back, twice, verified each time: tokens and log-probs are a fresh engine's, bit for bit; one
    flipped bit of one expert is found, and its matrix named."""
    old, new = case(name, 0), case(name, 1)
    engine = old.start(tmp_path)
    expected, before = new.start(tmp_path).generate(PROMPTS, SEEDS), engine.generate(PROMPTS, SEEDS)
    assert before != expected
    for _ in range(2):
        new.sync_to(engine)
        assert engine.generate(PROMPTS, SEEDS) == expected
        old.sync_to(engine)
        assert engine.generate(PROMPTS, SEEDS) == before
    kernels = {kernel for module, kernel in engine.read_back().kernels.items() if ".experts." in module}
    assert {kernel.rpartition("/")[2] for kernel in kernels} <= {"TritonExperts", "TritonWNA16Experts"}
    load, expert = engine.load, "model.layers.1.mlp.experts.2.down_proj"

    def corrupting(tensors: Any) -> None:
        leaf = next(leaf for leaf in ("weight", "weight_packed") if f"{expert}.{leaf}" in tensors)
        flipped = tensors[f"{expert}.{leaf}"].clone()
        flipped.view(torch.uint8).flatten()[0] ^= 1
        load({**tensors, f"{expert}.{leaf}": flipped})

    engine.load = corrupting
    with pytest.raises(VerificationError, match=rf"1 of \d+ tensors differ: {expert}\.weight$"):
        new.sync_to(engine)


def errors_of_every_expert(engine: VllmEngine) -> list[float]:
    """How far the kernel's own answer is from down(silu(gate x) * up x) with the matrices read back, relative, for
    each expert of the second layer alone on the same 32 tokens."""

    def ask(worker: Any) -> list[float]:
        layer = worker.model_runner.get_model().model.layers[1].mlp.experts.routed_experts
        device = layer.w13_weight.device
        read = {name: weight.float() for name, weight in expert_weights(layer, "e")}
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
        found = []
        for expert in range(layer.global_num_experts):
            gate, up, down = (read[f"e.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            wanted = (torch.nn.functional.silu(x.float() @ gate.t()) * (x.float() @ up.t())) @ down.t()
            chosen = torch.full((32, 1), expert, dtype=torch.int32, device=device)
            ones = torch.ones(32, 1, device=device)
            answer = layer.quant_method.apply(layer, x, ones, chosen, None, None).float()
            found.append(((answer - wanted).norm() / wanted.norm()).item())
        return found

    with torch.inference_mode():
        return engine._llm.collective_rpc(ask)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_computes_with_what_is_read_back(tmp_path, name) -> None:
    """Each expert's product is its read-back matrices', to the rounding of activations: a layout that was read wrongly
    (halves swapped, nibbles in another order, a scale of another row) would be off by about its whole norm."""
    old, new = case(name, 0), case(name, 1)
    engine = old.start(tmp_path)
    for held in (old, new):
        held.sync_to(engine)
        assert max(errors_of_every_expert(engine)) < FORMATS[name]


def test_another_backend_is_refused(tmp_path, monkeypatch) -> None:
    """INT4 experts on Marlin, which shuffles them: the sync names the layer and the backend."""
    monkeypatch.setattr("train.vllm_engine.MOE_BACKEND", "marlin")
    held = case("int4-g128", 0)
    engine = held.start(tmp_path)
    with pytest.raises(VerificationError, match=r"layers\.0\.mlp\.experts: .*WNA16MoEMethod/MarlinExperts"):
        held.sync_to(engine)
