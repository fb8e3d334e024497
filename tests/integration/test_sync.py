"""Weight sync on the real engine: bit-exact with a fresh engine, and every planted fault is caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.config import TargetSpec
from quant.export import export
from quant.target import Target
from quant.verify import VerificationError
from tests.tiny import tiny_folder, tiny_model
from train.config import RolloutConfig
from train.discrepancy import mismatch_metrics
from train.records import TokenBatch
from train.sync import sync
from train.timing import Stopwatch
from train.vllm_engine import VllmEngine

pytestmark = pytest.mark.engine
SPEC = TargetSpec.load("int4-g128")
ROLLOUT = RolloutConfig(prompts=4, group_size=4, max_tokens=12, max_model_len=64)
PROMPTS = [[5, 9, 30], [7, 7, 7, 7, 7], [40], [12, 13, 14, 15]]
SEEDS = [1, 2, 3, 4]


def start(folder: Path, *, seed: int, tied: bool = False, deployed: bool = True) -> VllmEngine:
    """A fresh engine on an export (or on the BF16 folder) of the tiny model of that seed."""
    model_dir = tiny_folder(folder / f"model-{seed}", seed=seed, tied=tied)
    if not deployed:
        return VllmEngine(model_dir, ROLLOUT, seed=0)
    model = tiny_model(seed=seed, tied=tied)
    out = folder / f"export-{seed}"
    export(model.named_parameters(), Target.for_model(SPEC, model), model_dir=model_dir, out=out, source_step=0)
    return VllmEngine(out, ROLLOUT, seed=0)


def synced_to(engine: VllmEngine, *, seed: int, tied: bool = False):
    model = tiny_model(seed=seed, tied=tied)
    target = Target.for_model(SPEC, model)
    return sync(dict(model.named_parameters()), target, engine, step=0, previous=None, clock=Stopwatch())


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> VllmEngine:
    return start(tmp_path_factory.mktemp("untied"), seed=0)


@pytest.mark.parametrize("tied", [False, True])
def test_synced_engine_equals_a_fresh_one(engine, tmp_path, tied) -> None:
    """After a sync from seed 0 to seed 1, tokens and log-probs are those of an engine started on seed 1, bit for bit,
    over repeated syncs, with tied embeddings too (vLLM's own reload leaves their head stale on a CPU)."""
    if tied:
        engine = start(tmp_path, seed=0, tied=True)
    fresh = start(tmp_path, seed=1, tied=tied)
    expected = fresh.generate(PROMPTS, SEEDS)
    before = synced_to(engine, seed=0, tied=tied)
    assert engine.generate(PROMPTS, SEEDS) != expected
    for _ in range(2):
        after = synced_to(engine, seed=1, tied=tied)
        assert engine.generate(PROMPTS, SEEDS) == expected
    assert before.tensors.keys() == after.tensors.keys()


def test_rollouts_are_reproducible_and_distinct(engine) -> None:
    """The same seeds give the same completions in any batch; the G completions of a prompt differ."""
    synced_to(engine, seed=0)
    groups = engine.generate(PROMPTS, SEEDS)
    assert engine.generate(PROMPTS[2:], SEEDS[2:]) == groups[2:]
    assert all(len({c.token_ids for c in group}) > 1 for group in groups)
    assert all(len(c.token_ids) == len(c.logprobs) for group in groups for c in group)


def test_reported_logprobs_are_those_of_the_deployed_weights(engine) -> None:
    """A transformers forward on Q(W) agrees with the engine's log-probs to BF16 noise, on BF16 weights it does not:
    the engine's k3 to the dequantized model is under a twentieth of its k3 to the BF16 model."""
    from train.config import TaskConfig, TrainConfig
    from train.policy import Policy

    model = tiny_model(seed=0, outlier_scale=16)
    target = Target.for_model(SPEC, model)
    weights = dict(model.named_parameters())
    held = sync(weights, target, engine, step=0, previous=None, clock=Stopwatch())
    completions = [c for group in engine.generate(PROMPTS, SEEDS) for c in group]
    batch = TokenBatch.collate([p for p in PROMPTS for _ in range(4)], completions)
    config = TrainConfig(task=TaskConfig(source="jsonl", name="x"), rollout=ROLLOUT, steps=1, microbatch_tokens=100)
    policy = Policy(tiny_model(seed=0, outlier_scale=16), config)
    gaps = []
    for at in (weights, {**weights, **held.deployed}):
        policy.run_at(at)
        gaps.append(mismatch_metrics(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)["k3"])
    assert gaps[1] < gaps[0] / 20
    assert gaps[1] < 1e-3


def test_a_stale_engine_is_caught(engine, monkeypatch) -> None:
    """An engine that silently keeps its old weights stops the run, and the message counts the tensors."""
    synced_to(engine, seed=0)
    monkeypatch.setattr(engine, "load", lambda tensors: None)
    with pytest.raises(VerificationError, match=r"read back from the rollout engine: \d+ of \d+ tensors differ"):
        synced_to(engine, seed=1)


def test_one_flipped_bit_is_caught(engine, monkeypatch) -> None:
    """One bit of one packed code, flipped on the way to the engine, is found and its matrix is named."""
    load = engine.load

    def corrupting(tensors):
        name = "model.layers.1.mlp.down_proj.weight_packed"
        flipped = tensors[name].clone()
        flipped[3, 4] ^= 1 << 9
        load({**tensors, name: flipped})

    monkeypatch.setattr(engine, "load", corrupting)
    with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ: model\.layers\.1\.mlp\.down_proj\.weight$"):
        synced_to(engine, seed=0)
    monkeypatch.undo()
    synced_to(engine, seed=0)


def test_swapped_scales_are_caught(engine, monkeypatch) -> None:
    """Scales of two layers exchanged: both matrices are named."""
    load = engine.load

    def swapping(tensors):
        one, two = (f"model.layers.{i}.self_attn.o_proj.weight_scale" for i in (0, 1))
        load({**tensors, one: tensors[two], two: tensors[one]})

    monkeypatch.setattr(engine, "load", swapping)
    with pytest.raises(VerificationError, match=r"2 of .*layers\.0\.self_attn\.o_proj.*layers\.1\.self_attn\.o_proj"):
        synced_to(engine, seed=0)
    monkeypatch.undo()
    synced_to(engine, seed=0)


def test_vllm_reload_alone_leaves_a_tied_head_stale_and_it_is_caught(tmp_path, monkeypatch) -> None:
    """Without our repair, vLLM's reload keeps the old head of a tied model: the read-back says so."""
    engine = start(tmp_path, seed=0, tied=True)

    def plain_reload(tensors):
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})

    monkeypatch.setattr(engine, "load", plain_reload)
    with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ: lm_head\.weight"):
        synced_to(engine, seed=1, tied=True)


def test_a_bf16_kernel_where_int4_was_asked_for_is_caught(tmp_path, monkeypatch) -> None:
    """An engine that computes with Q(W), but through BF16 kernels, is not the deployment target."""
    engine = start(tmp_path, seed=0, deployed=False)
    model = tiny_model(seed=0)
    target = Target.for_model(SPEC, model)
    weights = dict(model.named_parameters())
    deployed = target.dequantize(dict(target.compress(weights.items())))
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda tensors: load({**weights, **deployed}))
    with pytest.raises(VerificationError, match=r"q_proj runs on Unquantized\w+, not on a quantized kernel"):
        sync(weights, target, engine, step=0, previous=None, clock=Stopwatch())


def test_a_bf16_engine_syncs_too(tmp_path) -> None:
    """The baseline arm's engine: BF16 weights read back bit for bit."""
    engine = start(tmp_path, seed=0, deployed=False)
    weights = dict(tiny_model(seed=5).named_parameters())
    held = sync(weights, None, engine, step=3, previous=None, clock=Stopwatch())
    assert held.deployed == {}
    assert torch.equal(held.tensors["lm_head.weight"], weights["lm_head.weight"])
