"""Weight sync on the real engine: bit-exact with a fresh engine, and every planted fault is caught."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibrate import static_scales
from quant.config import QuantConfig
from quant.export import export
from quant.target import Target
from quant.verify import VerificationError
from tests.machine import CODES, INT4, KV, case, first_that_runs, needs, on_cpus
from tests.tiny import WORDS, Family, tiny_model
from train.config import RolloutConfig
from train.discrepancy import mismatch_metrics
from train.records import TokenBatch
from train.sync import Synced, sync
from train.timing import Stopwatch
from train.vllm_engine import VllmEngine
from train.warmstart import character_tokenizer

pytestmark = pytest.mark.engine
ROLLOUT = RolloutConfig(prompts=4, group_size=4, max_tokens=12, max_model_len=64, kv_cache_gib=0.02)
PROMPTS = [[5, 9, 30], [7, 7, 7, 7, 7], [40], [12, 13, 14, 15]]
SEEDS = [1, 2, 3, 4]
DEPLOYED = QuantConfig(target=INT4)
INT8 = QuantConfig(target="int8")


@dataclass(frozen=True)
class Case:
    """A model of some seed, its target and its calibrated scales; `start` and `sync_to` put it into an engine."""

    seed: int
    quant: QuantConfig | None = DEPLOYED
    tied: bool = False
    family: Family = "qwen3"

    @property
    def model(self) -> Any:
        shape = {"num_hidden_layers": 3} if self.quant and "mixed" in self.quant.target else {}
        if self.quant and "block" in self.quant.target:
            shape["head_dim"] = 128  # its keys' and values' rows are a block
        if self.quant and self.family == "qwen3-moe":
            shape["moe_intermediate_size"] = 128  # a block, and a group of INT4
        return tiny_model(family=self.family, tied=self.tied, seed=self.seed, **shape)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def target(self) -> Target | None:
        return Target.for_model(self.quant.spec(), self.model) if self.quant else None

    @property
    def scales(self) -> dict[str, torch.Tensor]:
        """Calibrated on a few tokens, so that two seeds have different ones."""
        if self.target is None:
            return {}
        return static_scales(self.model, self.target, [(torch.arange(2, 34)[None], torch.ones(1, 32))])

    def start(self, folder: Path) -> VllmEngine:
        """A fresh engine on an export of this model, or on its BF16 folder."""
        model_dir = folder / f"model-{self.seed}"
        self.model.save_pretrained(model_dir)
        character_tokenizer([WORDS]).save_pretrained(model_dir)
        if self.target is None:
            return VllmEngine(model_dir, ROLLOUT, seed=0)
        out = folder / f"export-{self.seed}"
        export(self.weights.items(), self.target, model_dir=model_dir, out=out, source_step=0, scales=self.scales)
        return VllmEngine(out, ROLLOUT, seed=0)

    def sync_to(self, engine: VllmEngine, previous: Synced | None = None) -> Synced:
        return sync(self.weights, self.target, engine, step=0, previous=previous, clock=Stopwatch(), scales=self.scales)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> VllmEngine:
    """INT4, seed 0, untied; tests sync it to what they need."""
    return Case(0).start(tmp_path_factory.mktemp("untied"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quant", [*map(case, (*on_cpus(), KV)), pytest.param(None, id="bf16")])
def test_synced_engine_equals_a_fresh_one(tmp_path, quant, tied) -> None:
    """Every target that runs on a CPU, tied and untied: after a sync from seed 0 to seed 1, tokens and log-probs are
    those of an engine started on seed 1, bit for bit, over repeated cycles, and quantized kernels are at work."""
    old, new = Case(0, quant, tied), Case(1, quant, tied)
    engine = old.start(tmp_path)
    expected = new.start(tmp_path).generate(PROMPTS, SEEDS)
    before = engine.generate(PROMPTS, SEEDS)
    assert before != expected
    for _ in range(2):
        held = new.sync_to(engine)
        assert engine.generate(PROMPTS, SEEDS) == expected
        assert held.sent == 1.0
        old.sync_to(engine)
        assert engine.generate(PROMPTS, SEEDS) == before


@pytest.mark.parametrize("family", ["llama", "qwen2", pytest.param("qwen3-moe", marks=pytest.mark.mixture)])
def test_other_families_sync(tmp_path, family) -> None:
    """Llama, Qwen2 (biases on q, k, v) and Qwen3-MoE (BF16 experts, INT4 attention): synced is fresh, bit for bit."""
    quant = QuantConfig(target=first_that_runs("int4-g32", INT4), ignore=(r"re:.*experts.*",))
    engine, new = Case(0, quant, family=family).start(tmp_path), Case(1, quant, family=family)
    expected = new.start(tmp_path).generate(PROMPTS, SEEDS)
    assert engine.generate(PROMPTS, SEEDS) != expected
    for _ in range(2):
        new.sync_to(engine)
        assert engine.generate(PROMPTS, SEEDS) == expected


@pytest.mark.mixture
def test_a_bf16_mixture_syncs_and_one_flipped_bit_of_one_expert_is_caught(tmp_path, monkeypatch) -> None:
    """BF16 rollouts of a mixture: every expert is read back from the buffers that the kernel reads."""
    engine, new = Case(0, None, family="qwen3-moe").start(tmp_path), Case(1, None, family="qwen3-moe")
    expected = new.start(tmp_path).generate(PROMPTS, SEEDS)
    new.sync_to(engine)
    assert engine.generate(PROMPTS, SEEDS) == expected
    load, name = engine.load, "model.layers.1.mlp.experts.2.down_proj.weight"

    def corrupting(tensors):
        flipped = tensors[name].clone()
        flipped.view(torch.int16)[3, 4] ^= 1
        load({**tensors, name: flipped})

    monkeypatch.setattr(engine, "load", corrupting)
    with pytest.raises(
        VerificationError, match=r"1 of \d+ tensors differ: model\.layers\.1\.mlp\.experts\.2\.down_proj"
    ):
        new.sync_to(engine)


@pytest.mark.parametrize("quant", map(case, (DEPLOYED, INT8, KV)))
def test_only_changed_layers_are_sent(tmp_path, quant) -> None:
    """One code of one layer moved: that layer's tensors are sent, less than a tenth of the bytes, the rest stays, and
    the engine equals a fresh one; nothing moved: nothing is sent, and all is verified."""
    start = Case(0, quant)
    engine = start.start(tmp_path)
    first = start.sync_to(engine)
    weights, target = start.weights, start.target
    assert target is not None
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] *= -3
    again = sync(weights, target, engine, step=1, previous=first, clock=Stopwatch(), scales=start.scales)
    assert 0 < again.sent < 0.25
    assert again.changed is not None
    assert 0 < again.changed < 0.01
    export(
        weights.items(), target, model_dir=tmp_path / "model-0", out=tmp_path / "moved", source_step=1,
        scales=start.scales,
    )  # fmt: skip
    fresh = VllmEngine(tmp_path / "moved", ROLLOUT, seed=0)
    assert engine.generate(PROMPTS, SEEDS) == fresh.generate(PROMPTS, SEEDS)
    idle = sync(weights, target, engine, step=2, previous=again, clock=Stopwatch(), scales=start.scales)
    assert (idle.sent, idle.changed) == (0.0, 0.0)


def test_rollouts_are_reproducible_and_distinct(engine) -> None:
    """The same seeds give the same completions in any batch; the G completions of a prompt differ."""
    Case(0).sync_to(engine)
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
    target = Target.for_model(DEPLOYED.spec(), model)
    weights = dict(model.named_parameters())
    sync(weights, target, engine, step=0, previous=None, clock=Stopwatch())
    completions = [c for group in engine.generate(PROMPTS, SEEDS) for c in group]
    batch = TokenBatch.collate([p for p in PROMPTS for _ in range(4)], completions)
    config = TrainConfig(task=TaskConfig(source="jsonl", name="x"), rollout=ROLLOUT, steps=1, microbatch_tokens=100)
    policy = Policy(tiny_model(seed=0, outlier_scale=16), config)
    gaps = []
    for at in (weights, {**weights, **target.deployed(weights)}):
        policy.run_at(at)
        gaps.append(mismatch_metrics(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)["k3"])
    assert gaps[1] < gaps[0] / 20
    assert gaps[1] < 1e-3


def test_a_stale_engine_is_caught(engine, monkeypatch) -> None:
    """An engine that silently keeps its old weights stops the run, and the message counts the tensors."""
    Case(0).sync_to(engine)
    monkeypatch.setattr(engine, "load", lambda tensors: None)
    with pytest.raises(VerificationError, match=r"read back from the rollout engine: \d+ of \d+ tensors differ"):
        Case(1).sync_to(engine)


def test_one_flipped_bit_is_caught(engine, monkeypatch) -> None:
    """One bit of one code, flipped on the way to the engine, is found and its matrix is named."""
    load = engine.load

    def corrupting(tensors):
        name = f"model.layers.1.mlp.down_proj.{CODES}"
        flipped = tensors[name].clone()
        flipped[3, 4] ^= 2
        load({**tensors, name: flipped})

    monkeypatch.setattr(engine, "load", corrupting)
    with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ: model\.layers\.1\.mlp\.down_proj\.weight$"):
        Case(0).sync_to(engine)
    monkeypatch.undo()
    Case(0).sync_to(engine)


def test_swapped_scales_are_caught(engine, monkeypatch) -> None:
    """Scales of two layers exchanged: both matrices are named."""
    load = engine.load

    def swapping(tensors):
        one, two = (f"model.layers.{i}.self_attn.o_proj.weight_scale" for i in (0, 1))
        load({**tensors, one: tensors[two], two: tensors[one]})

    monkeypatch.setattr(engine, "load", swapping)
    with pytest.raises(VerificationError, match=r"2 of .*layers\.0\.self_attn\.o_proj.*layers\.1\.self_attn\.o_proj"):
        Case(0).sync_to(engine)
    monkeypatch.undo()
    Case(0).sync_to(engine)


@needs(QuantConfig(target="int4-g128"))  # without AVX-512 vLLM multiplies with the BF16 head itself, not a packed copy
def test_vllm_reload_alone_leaves_a_tied_head_stale_and_it_is_caught(tmp_path, monkeypatch) -> None:
    """Without our repair, vLLM's reload keeps the old head of a tied model: the read-back says so."""
    engine = Case(0, tied=True).start(tmp_path)

    def plain_reload(tensors):
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})

    monkeypatch.setattr(engine, "load", plain_reload)
    with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ: lm_head\.weight"):
        Case(1, tied=True).sync_to(engine)


def test_an_engine_one_version_behind_is_caught(engine, monkeypatch) -> None:
    """The engine loads what the sync before sent, always one version late: the first sync that differs says so."""
    load, late = engine.load, []

    def lagging(tensors):
        late.append(tensors)
        load(late[-2] if len(late) > 1 else tensors)

    Case(0).sync_to(engine)
    monkeypatch.setattr(engine, "load", lagging)
    Case(0).sync_to(engine)
    with pytest.raises(VerificationError, match=r"read back from the rollout engine: \d+ of \d+ tensors differ"):
        Case(1).sync_to(engine)
    monkeypatch.undo()
    Case(0).sync_to(engine)


@needs(QuantConfig(target="int4-g64"))
def test_a_wrong_group_size_is_caught(tmp_path, monkeypatch) -> None:
    """Scales of groups of 128 stretched over an engine with groups of 64: every matrix whose halves differ is named.
    The engine takes them, the shapes fit."""
    fine, coarse = Case(0, QuantConfig(target="int4-g64")), Case(0, QuantConfig(target="int4-g128"))
    engine = fine.start(tmp_path)
    assert coarse.target is not None
    stretched = {
        name: tensor.repeat_interleave(2, 1) if name.endswith("weight_scale") else tensor
        for name, tensor in coarse.target.compress(coarse.weights.items())
    }
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda tensors: load(stretched))
    with pytest.raises(VerificationError, match=r"14 of \d+ tensors differ"):
        fine.sync_to(engine)


@needs(KV)
def test_scales_of_the_cache_one_version_behind_are_caught(tmp_path, monkeypatch) -> None:
    """Static scales of an FP8 KV cache are part of what is synced and verified."""
    case = Case(0, KV)
    engine = case.start(tmp_path)
    load = engine.load
    old = {name: scale * 2 for name, scale in case.scales.items()}
    monkeypatch.setattr(engine, "load", lambda tensors: load({**tensors, **old}))
    with pytest.raises(VerificationError, match=r"4 of \d+ tensors differ: model\.layers\.0\.self_attn\.k_scale"):
        case.sync_to(engine)


def test_a_bf16_kernel_where_int4_was_asked_for_is_caught(tmp_path, monkeypatch) -> None:
    """An engine that computes with Q(W), but through BF16 kernels, is not the deployment target."""
    engine = Case(0, None).start(tmp_path)
    case = Case(0)
    assert case.target is not None
    deployed = case.target.deployed(case.weights)
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda tensors: load({**case.weights, **deployed}))
    with pytest.raises(VerificationError, match=r"q_proj runs on Unquantized\w+, not on a quantized kernel"):
        case.sync_to(engine)
