"""Planned state and copies of the weights against the tensors that a real policy and a real training step hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.plan.activations import Activations
from pipeline.plan.memory import Part, Sizes, engine_memory, kv_bytes_per_token, peak, trainer_parts
from pipeline.plan.packed import packed_size
from pipeline.plan.shape import shape_of
from quant.config import QuantConfig
from quant.target import Target
from quant.verify import fingerprint
from tests.quant.test_memory import Live
from tests.tiny import WORDS, tiny_model
from train.checkpoint import take_snapshot
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.grading import in_process
from train.policy import Policy
from train.records import Completion, Problem, TokenBatch
from train.rollout import EngineWeights
from train.tasks import Task
from train.trainer import Trainer, initial_state
from train.warmstart import character_tokenizer

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
NOTHING = Activations(0, 0, 0)


def config(**train: Any) -> TrainConfig:
    rollout = RolloutConfig(prompts=6, group_size=2, max_tokens=4, max_model_len=16)
    return TrainConfig(task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=4, **train)


def sizes_of(model: Any, target: Target, learned: int | None = None, adapted: int | None = None) -> Sizes:
    shape = shape_of("x", model)
    quantized = max(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") in target.shapes)
    return Sizes(
        shape.total, learned or shape.total, adapted or shape.total, packed_size(target, shape.parameters),
        shape.largest_layer, shape.outside_layers, shape.largest_parameter, quantized,
    )  # fmt: skip


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def named(parts: Sequence[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_masters_moments_and_gradients_are_exact(tied) -> None:
    """After one optimizer step the tensors of a real policy have the planned bytes, part by part, to the byte, but for
    AdamW's step counts, 4 bytes a parameter tensor; the checkpoint's snapshot has 12 B for each parameter."""
    model = tiny_model(tied=tied, **SHAPE)
    target = Target.for_model(QuantConfig(target="int4-g128").spec(), model)
    policy = Policy(model, config())
    batch = TokenBatch.collate([[5, 6]] * 2, [Completion((7, 8), (-1.0, -1.0), "stop", None)] * 2)
    policy.logprobs(batch, range(2)).sum().backward()
    parts = named(trainer_parts(config(), sizes_of(model, target), NOTHING, 0))
    gradients = [master.grad for master in policy.masters.values() if master.grad is not None]
    assert nbytes(gradients) == parts["gradients, FP32"].train
    policy.update()
    assert nbytes(list(model.parameters())) == parts["module, BF16"].train
    assert nbytes(list(policy.masters.values())) == parts["masters, FP32"].train
    moments = [value for state in policy.optimizer.state.values() for value in state.values()]
    assert nbytes(moments) == parts["AdamW moments, FP32"].train + 4 * len(policy.masters)
    assert nbytes(list(policy.weights().values())) == parts["W, BF16"].sync
    snapshot = take_snapshot(policy, initial_state(config())).files
    held = sum(t.nbytes for name in ("masters", "optimizer") for t in snapshot[name].values())
    assert held == 12 * sizes_of(model, target).learned + 4 * len(policy.masters)


class FakeEngine:
    """Holds what it is sent, says what a faithful engine would compute with, and samples nonsense."""

    version = 0

    def __init__(self, target: Target) -> None:
        self.target = target
        self.tensors: dict[str, Tensor] = {}

    def metrics(self) -> dict[str, float]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= tensors

    def read_back(self) -> EngineWeights:
        found = {name: fingerprint(value) for name, value in self.target.dequantize(self.tensors).items()}
        kept = {
            name: value for name, value in self.tensors.items() if name.rpartition(".")[0] not in self.target.shapes
        }
        found |= {name: fingerprint(value) for name, value in kept.items()}
        return EngineWeights(found, dict.fromkeys(self.target.modules, "CompressedTensorsFake"))

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        one, two = Completion((7, 8, 9, 7), (-1.0,) * 4, "length", None), Completion((9, 1), (-1.0,) * 2, "stop", None)
        return [[one, two] for _ in prompts]


@pytest.mark.parametrize("form", ["blend", "advantage", "distill"])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_copies_of_the_weights_are_those_a_real_step_holds(monkeypatch, form, minibatches) -> None:
    """At the start of the last mini-batch's forward pass, what a real step has made and not freed is, within 2%, the
    planned copies of W, Q(W), their blend and the deployed tensors; no formula here is fitted to it."""
    model = tiny_model(num_hidden_layers=3, **SHAPE)
    target = Target.for_model(QuantConfig(target="int4-g128").spec(), model)
    constraint = ConstraintConfig(form=form, multiplier_init=0.5, tolerance=0.01, distill_every=1)
    train = config(minibatches=minibatches, constraint=constraint)
    parts = trainer_parts(train, sizes_of(model, target), NOTHING, 0, on_cpu=True)
    policy = Policy(model, train)
    problems = tuple(Problem(f"p{i}", f"{i}+{i}=", str(2 * i), {}) for i in range(8))
    trainer = Trainer(
        train, policy=policy, engine=FakeEngine(target), target=target, tokenizer=character_tokenizer([WORDS]), seed=0,
        task=Task(problems, problems[:1], in_process(lambda problem, text: float(len(text) % 3))),
        state=initial_state(train),
    )  # fmt: skip
    trainer.step()  # moments exist, and the engine holds something
    held: list[int] = []
    computed = policy.logprobs

    def watched(batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            held.append(sum(size for ref, size in live.held.items() if not ref.expired()))
        return computed(batch, rows)

    monkeypatch.setattr(policy, "logprobs", watched)
    moments = [value for state in policy.optimizer.state.values() for value in state.values()]
    with Live([*policy.masters.values(), *model.parameters(), *model.buffers(), *moments]) as live:
        trainer.step()
    copies = ("W, BF16", "Q(W), BF16", "blend of W and Q(W), BF16", "deployed tensors")
    planned = sum(part.train for part in parts if part.name in copies)
    assert max(held) == pytest.approx(planned, rel=0.02)


def test_ranks_share_all_but_what_is_sent() -> None:
    """Eight ranks hold an eighth of masters, moments, gradients, W, Q(W), and of a module that is FP32 then; the
    deployed tensors are whole on the first, BF16 ones included. Offloaded, only what is sent or gathered is on the
    GPU."""
    model = tiny_model(**SHAPE)
    target = Target.for_model(QuantConfig(target="int4-g128").spec(), model)
    sizes = sizes_of(model, target)
    one = named(trainer_parts(config(), sizes, NOTHING, 0))
    eight = named(trainer_parts(config(distributed={"processes": 8}), sizes, NOTHING, 0))
    for name in ("masters, FP32", "AdamW moments, FP32", "gradients, FP32", "W, BF16", "Q(W), BF16"):
        assert eight[name].train == one[name].train / 8
    assert eight["module, FP32"].train == one["module, BF16"].train / 4
    kept = sizes.packed.kept
    assert eight["deployed tensors"].sync == one["deployed tensors"].sync + kept == sizes.packed.total
    assert one["deployed tensors"].train == 0  # between syncs they are in the host's memory
    offloaded = named(trainer_parts(config(distributed={"processes": 8, "cpu_offload": True}), sizes, NOTHING, 0))
    assert "masters, FP32" not in offloaded
    assert "W, BF16" not in offloaded
    assert offloaded["deployed tensors"] == eight["deployed tensors"]


def test_the_peak_is_the_fullest_phase() -> None:
    """Two parts that are never large together: their peaks do not add up."""
    assert peak([Part("a", "", 5, 1, 0), Part("b", "", 1, 4, 0)]) == ("sync", 6)


@pytest.mark.parametrize(("dtype", "fp8"), [(torch.bfloat16, False), (torch.float8_e4m3fn, True)])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_kv_bytes_are_vllms_own(dtype, fp8, heads) -> None:
    """A block's bytes by vLLM's own spec of a full attention layer, over its tokens, times the layers."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=128, dtype=dtype)
    assert kv_bytes_per_token(36, heads, 128, fp8=fp8) == 36 * spec.page_size_bytes / 16


def test_what_is_left_of_the_engines_share_is_kv_cache() -> None:
    """By hand: 10 of 16 units of 1,000 bytes are left; a sequence of 33 tokens takes three blocks of 16, 48 tokens of
    10 bytes: 20 sequences at once. Without anything left there is none. Of 8 heads, four GPUs have two each, sixteen
    one."""
    made = engine_memory(granted=16_000, weights=5_000, overhead=1_000, kv_per_token=10, length=33, wanted=64)
    assert (made.kv_cache, made.at_once) == (10_000, 20)
    assert engine_memory(granted=5, weights=5, overhead=1, kv_per_token=10, length=33, wanted=64).at_once == 0
    assert kv_bytes_per_token(1, 8, 1, fp8=False, tensor_parallel=4) == 2 * 2 * 2
    assert kv_bytes_per_token(1, 8, 1, fp8=False, tensor_parallel=16) == 2 * 1 * 2
