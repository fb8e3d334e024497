"""What runs in vLLM's worker: the probe tells every code at every scale, and each repair of the reload is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.export import export, read_tensors
from quant.target import Target
from quant.verify import VerificationError, fingerprint
from tests.block_kernel import choose_block_kernel
from tests.machine import case, needs
from tests.tiny import WORDS, tiny_model
from train.config import RolloutConfig
from train.sync import verify
from train.vllm_engine import VllmEngine
from train.warmstart import character_tokenizer

pytestmark = pytest.mark.engine
ROLLOUT = RolloutConfig(prompts=1, group_size=2, max_tokens=8, max_model_len=64, kv_cache_gib=0.02)
INT8, W4A8 = QuantConfig(target="int8"), QuantConfig(target="w4a8")
BLOCKS = QuantConfig(target="fp8-block")
MODULE = "model.layers.1.mlp.down_proj"


def start(folder: Path, model: Any, target: Target | None) -> VllmEngine:
    """An engine on a model, deployed to the target or as it is."""
    model.save_pretrained(folder / "model")
    character_tokenizer([WORDS]).save_pretrained(folder / "model")
    if target is None:
        return VllmEngine(folder / "model", ROLLOUT, seed=0)
    export(model.named_parameters(), target, model_dir=folder / "model", out=folder / "export", source_step=0)
    return VllmEngine(folder / "export", ROLLOUT, seed=0)


def compressed(quant: QuantConfig, *, seed: int) -> tuple[Target, dict[str, Tensor]]:
    model = tiny_model(seed=seed, head_dim=128)  # keys and values of a block of rows
    target = Target.for_model(quant.spec(), model)
    return target, dict(target.compress(model.named_parameters()))


def expected(tensors: Mapping[str, Tensor], target: Target | None) -> dict[str, str]:
    """What must be read back, told from the checkpoint tensors by compressed-tensors' own decompression."""
    shapes = target.shapes if target else {}
    prints = {name: fingerprint(t) for name, t in tensors.items() if name.rpartition(".")[0] not in shapes}
    if target is not None:
        prints |= {f"{module}.weight": fingerprint(target.dequantized(module, tensors)) for module in shapes}
    return prints


@pytest.mark.parametrize("quant", [*map(case, (INT8, QuantConfig(target="fp8-dynamic"), W4A8)), BLOCKS])
def test_every_code_is_told_at_every_scale(tmp_path, quant, monkeypatch) -> None:
    """Through kernels that quantize activations: a matrix with every code of the format in every row, at scales from
    2^-30 to 2^9 with random mantissas, is read back as its exact BF16 dequantization. The product of FP8 blocks is a
    stand-in here (tests/block_kernel.py)."""
    if quant == BLOCKS:
        choose_block_kernel(monkeypatch)
    target, tensors = compressed(quant, seed=0)
    engine = start(tmp_path, tiny_model(seed=0, head_dim=128), target)
    codes, scales = tensors[f"{MODULE}.weight"], tensors[f"{MODULE}.weight_scale"]
    if codes.dtype == torch.int8:
        bits = 4 if quant == W4A8 else 8
        every = (torch.arange(codes.shape[1]) % 2**bits - 2 ** (bits - 1)).to(torch.int8)
    else:
        every = torch.arange(codes.shape[1]).to(torch.uint8).view(torch.float8_e4m3fn)
        every = torch.where(every.float().isnan(), 1.0, every.float()).to(torch.float8_e4m3fn)
    exponents = torch.linspace(-30, 9, len(scales)).round()[:, None]
    wide = torch.ldexp(1 + torch.rand(scales.shape), exponents).to(scales.dtype)
    sent = {**tensors, f"{MODULE}.weight": every.expand_as(codes).clone(), f"{MODULE}.weight_scale": wide}
    engine.load(sent)
    verify(engine, expected(sent, target), target)
    assert engine.read_back().fingerprints[f"{MODULE}.weight"] == fingerprint(target.dequantized(MODULE, sent))


def reload_alone(engine: VllmEngine, tensors: dict[str, Tensor]) -> None:
    """vLLM's own reload, without our repairs."""
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})


@needs(W4A8)
def test_vllm_reload_alone_garbles_w4a8_and_it_is_caught(tmp_path) -> None:
    """vLLM reads W4A8 codes from a parameter that its reload leaves unwritten: all 14 matrices are named; our load
    right after puts them right."""
    target, tensors = compressed(W4A8, seed=1)
    engine = start(tmp_path, tiny_model(seed=0, head_dim=128), target)
    reload_alone(engine, tensors)
    with pytest.raises(VerificationError, match=r"14 of \d+ tensors differ"):
        verify(engine, expected(tensors, target), target)
    engine.load(tensors)
    verify(engine, expected(tensors, target), target)


@needs(INT8)
def test_an_int8_layer_that_was_not_sent_survives(tmp_path) -> None:
    """One layer's new weights alone, twice: the engine holds them and the old ones of all other layers."""
    target, old = compressed(INT8, seed=0)
    _, new = compressed(INT8, seed=1)
    engine = start(tmp_path, tiny_model(seed=0, head_dim=128), target)
    sent = {name: tensor for name, tensor in new.items() if name.startswith(MODULE)}
    for _ in range(2):
        engine.load(sent)
        verify(engine, expected({**old, **sent}, target), target)


@pytest.mark.mixture
def test_vllm_reload_alone_leaves_experts_unpacked_and_it_is_caught(tmp_path) -> None:
    """vLLM's reload writes BF16 experts in the checkpoint's order where the kernel reads its own: all 48 are named."""
    model = tiny_model(family="qwen3-moe", seed=0)
    engine = start(tmp_path, model, None)
    model.save_pretrained(tmp_path / "again")
    tensors = dict(read_tensors(tmp_path / "again"))
    verify(engine, expected(tensors, None), None)
    reload_alone(engine, tensors)
    with pytest.raises(VerificationError, match=r"48 of \d+ tensors differ: model\.layers\.0\.mlp\.experts\.0"):
        verify(engine, expected(tensors, None), None)
    engine.load(tensors)
    verify(engine, expected(tensors, None), None)


def test_more_prompt_tokens_than_a_step_takes_are_sampled(tmp_path) -> None:
    """Six seeded prompts of 900 tokens, over the 4,096 that a step takes: each is computed whole, in its turn, and
    gives what it gives alone. Split between two steps, vLLM's seeded sampler on a CPU would end the engine."""
    model = tiny_model(max_position_embeddings=1024)
    model.save_pretrained(tmp_path)
    character_tokenizer([WORDS]).save_pretrained(tmp_path)
    config = RolloutConfig(prompts=6, group_size=2, max_tokens=8, max_model_len=1024, kv_cache_gib=0.1)
    engine = VllmEngine(tmp_path, config, seed=0)
    prompts, seeds = [[5 + (i + j) % 50 for j in range(900)] for i in range(6)], list(range(6))
    together = engine.generate(prompts, seeds)
    alone = [engine.generate([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone
