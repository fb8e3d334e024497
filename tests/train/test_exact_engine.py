"""The exact engine: the trainer's log-probs of its samples are the same numbers, bit for bit, for every token."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from quant.config import TargetSpec
from quant.target import Target
from quant.verify import VerificationError, fingerprint
from tests.tiny import Family, tiny_model
from train.bf16_products import native
from train.config import RolloutConfig, TaskConfig, TrainConfig
from train.discrepancy import MismatchError, mismatch_metrics, require_no_mismatch
from train.exact_engine import ExactEngine, ExactEngineError, _draw
from train.fixed_shape import NORMALIZED_AT_ONCE, FixedShape, fixed_logsumexp
from train.loss import grpo_loss
from train.policy import Policy
from train.records import TokenBatch
from train.rollout import EngineWeights
from train.sync import sync, verify
from train.timing import Stopwatch

PROMPTS = [[3 + (7 * i + 11 * t) % 80 for t in range(2 + 3 * i)] for i in range(4)]
ENDS = range(20, 26)  # any tokens: random weights sample them now and then


def config(attention: str = "eager", rollout: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    settings = {"engine": "exact", "target": False, "prompts": 4, "group_size": 4, "max_tokens": 16}
    return TrainConfig.model_validate(
        {
            "task": TaskConfig(source="jsonl", name="x"), "constraint": {"form": "none"}, "steps": 1, "lr": 1e-3,
            "rollout": settings | {"max_model_len": 32, "temperature": 0.7} | (rollout or {}),
            "minibatches": 2, "microbatch_tokens": 5 * 32, "attention": attention, **changes,
        }
    )  # fmt: skip


def made(settings: TrainConfig, **model: Any) -> tuple[Policy, ExactEngine]:
    """A policy with sharp enough predictions to end responses at different lengths, and its engine."""
    module = tiny_model(**model)
    module.set_attn_implementation(settings.attention)
    with torch.no_grad():
        for parameter in module.get_output_embeddings().parameters():
            parameter *= 8
    policy = Policy(module, settings)
    return policy, ExactEngine(policy, ends=ENDS)


def rolled_out(engine: ExactEngine) -> TokenBatch:
    completions = [c for group in engine.generate(PROMPTS, range(4)) for c in group]
    return TokenBatch.collate([p for p in PROMPTS for _ in range(4)], completions)


KINDS: list[tuple[Family, str, int]] = [
    ("qwen3", "eager", 160), ("qwen3", "sdpa", 160), ("qwen3", "sdpa", 32), ("llama", "sdpa", 160),
    ("qwen3-moe", "eager", 160), ("qwen3-moe", "sdpa", 160),
]  # fmt: skip


@pytest.mark.parametrize(("family", "attention", "budget"), KINDS)
def test_every_token_has_the_same_bits_in_the_trainer(family, attention, budget) -> None:
    """16 responses of different lengths to prompts of 2 to 11 tokens, two mini-batches, 4 rows or 1 in a forward: the
    trainer's log-probs equal the engine's without gradient and in the training forward, in both mini-batches."""
    policy, engine = made(config(attention, microbatch_tokens=budget), family=family)
    batch = rolled_out(engine)
    assert len({len(response) for response in batch.responses}) > 2
    assert torch.equal(policy.all_logprobs(batch), batch.rollout_logprobs)
    assert torch.equal(policy.all_scores(batch).logprobs, batch.rollout_logprobs)
    for rows in (range(8), range(8, 16)):
        for micro in policy.microbatches(batch, rows):
            assert torch.equal(policy.logprobs(batch, micro).detach(), batch.rollout_logprobs[micro])
    metrics = mismatch_metrics(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)
    assert {metrics[name] for name in ("prob_diff_max", "k3", "logp_abs_diff_max", "chi2_seq", "out_of_bounds")} == {0}


@pytest.mark.skipif(
    not native(torch.device("cpu")), reason="a CPU without BF16 instructions: FP32 sums, the same here in every shape"
)
def test_without_the_fixed_shape_it_would_not_be_zero() -> None:
    """The same module and tokens in the trainer's usual shapes, cut to the longest row and sorted by length: measured,
    23% of the tokens differ, by up to 0.04 nats. The fixed shape is what makes them equal."""
    policy, engine = made(config("sdpa"))
    batch = rolled_out(engine)
    policy.fixed = None
    usual = policy.all_logprobs(batch)
    keep = batch.mask.bool()
    assert (usual != batch.rollout_logprobs)[keep].float().mean() > 0.1
    with pytest.raises(MismatchError, match=r"differ from the trainer's on \d+ of \d+ tokens, at most by"):
        require_no_mismatch(usual, batch.rollout_logprobs, batch.mask)


def test_the_fixed_shape_has_the_usual_gradient() -> None:
    """Same loss in the fixed shape and in the usual ones: the FP32 masters' gradients agree up to BF16 noise."""
    policy, engine = made(config("sdpa"))
    batch = rolled_out(engine)
    gradients = []
    for fixed in (policy.fixed, None):
        policy.fixed = fixed
        for micro in policy.microbatches(batch, range(16)):
            (policy.logprobs(batch, micro) * torch.arange(1.0, 17.0)[micro, None]).sum().backward()
        gradients.append(torch.cat([m.grad.flatten() for m in policy.masters.values() if m.grad is not None]))
        policy.optimizer.zero_grad()
    assert gradients[0].norm().item() == pytest.approx(gradients[1].norm().item(), rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_reported_log_probs_are_those_of_the_model() -> None:
    """One sequence at a time, unpadded, in float32, by the plain log-softmax of logits / T: BF16 noise away."""
    policy, engine = made(config())
    batch = rolled_out(engine)
    policy.module.float()
    for row, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        with torch.no_grad():
            full = (policy.module(torch.tensor([prompt + response])).logits[0] / 0.7).log_softmax(-1)
        expected = [full[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert batch.rollout_logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=0.3)


def test_a_completion_depends_on_its_prompt_and_seed_alone() -> None:
    """Prompts in another order, with other company: the same tokens and the same log-probs, bit for bit; other seeds
    give others, also where they differ above bit 32 only."""
    _, engine = made(config("sdpa"))
    first = engine.generate(PROMPTS, [5, 6, 7, 8])
    assert engine.generate(PROMPTS, [5, 6, 7, 8]) == first
    assert engine.generate(PROMPTS[::-1], [8, 7, 6, 5])[::-1] == first
    assert engine.generate([PROMPTS[2]], [7]) == [first[2]]
    assert len({c.token_ids for c in first[2]}) == 4
    assert engine.generate([PROMPTS[2]], [7 + (1 << 40)]) != [first[2]]


def test_responses_end_as_configured() -> None:
    """At an end token, which is part of the response, or at max_tokens; with ignore_eos always at max_tokens."""
    _, engine = made(config())
    for completion in (c for group in engine.generate(PROMPTS, range(4)) for c in group):
        assert len(completion.token_ids) == len(completion.logprobs) <= 16
        assert not set(ENDS) & set(completion.token_ids[:-1])
        stopped = completion.token_ids[-1] in ENDS
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == 16
    _, engine = made(config(rollout={"ignore_eos": True}))
    assert {len(c.token_ids) for group in engine.generate(PROMPTS, range(4)) for c in group} == {16}


def test_a_draw_follows_the_distribution() -> None:
    """Chance falls into the cumulative probability: [0.25, 0, 0.75] gives token 0 below a quarter and 2 from there on,
    never the impossible 1; 20,000 chances hit the shares within 0.01."""
    logprobs = torch.tensor([0.25, 0.0, 0.75]).log()
    assert [_draw(logprobs, chance) for chance in (0.0, 0.2499, 0.2501, 0.9, 1 - 2**-53)] == [0, 0, 2, 2, 2]
    chances = Random(0)
    drawn = [_draw(logprobs, chances.random()) for _ in range(20000)]
    assert drawn.count(0) / 20000 == pytest.approx(0.25, abs=0.01)
    assert 1 not in drawn


def test_rows_of_a_shape_divide_a_mini_batch() -> None:
    """8 rows in a mini-batch and room for 5: 4 at a time; room for none: 1; room for all: 8; consecutive rows."""
    for budget, rows in ((5 * 32, 4), (31, 1), (10**6, 8)):
        assert FixedShape.of(config(microbatch_tokens=budget)) == FixedShape(rows, 32)
    assert list(FixedShape(4, 32).groups([3, 2, 1, 0, 9])) == [[3, 2, 1, 0], [9]]


def test_fixed_logsumexp_by_definition_and_alone() -> None:
    """log sum exp of each row, with its gradient, and the same bits for a row alone."""
    logits = torch.randn(2 * NORMALIZED_AT_ONCE + 7, 300, requires_grad=True)
    values = fixed_logsumexp(logits)
    torch.testing.assert_close(values, logits.logsumexp(1))
    assert all(torch.equal(fixed_logsumexp(logits[i : i + 1])[0], values[i]) for i in range(0, len(logits), 9))
    values.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1))


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen3", True), ("qwen3-moe", False)])
def test_weights_follow_the_syncs_and_nothing_else(family, tied) -> None:
    """After an update the engine still holds the old weights, and a verification says so; a sync of what changed makes
    its samples the trainer's again, experts and tied head included."""
    policy, engine = made(config(), family=family, tied=tied)
    first = sync(policy.weights(), None, engine, step=0, previous=None, clock=Stopwatch())
    batch = rolled_out(engine)
    logprobs = policy.logprobs(batch, range(4))
    loss, _ = grpo_loss(logprobs, logprobs.detach(), batch.mask[:4], batch.mask[:4], clip_low=0.2, clip_high=0.2)
    loss.backward()
    policy.update()
    expected = {name: fingerprint(weight) for name, weight in policy.weights().items()}
    held = engine.read_back().fingerprints
    assert any(held[name] != expected[name] for name in expected if name in held)
    sync(policy.weights(), None, engine, step=1, previous=first, clock=Stopwatch())
    policy.run_at(policy.weights())
    batch = rolled_out(engine)
    assert torch.equal(policy.all_logprobs(batch), batch.rollout_logprobs)


def test_a_corrupt_engine_is_found() -> None:
    """One flipped element fails the next sync's verification by name, and its samples the trainer's check."""
    policy, engine = made(config())
    synced = sync(policy.weights(), None, engine, step=0, previous=None, clock=Stopwatch())
    engine._module.model.layers[1].mlp.up_proj.weight[3, 5] += 4
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        sync(policy.weights(), None, engine, step=1, previous=synced, clock=Stopwatch())
    batch = rolled_out(engine)
    with pytest.raises(MismatchError):
        require_no_mismatch(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)


def test_a_quantized_target_is_refused_twice() -> None:
    """By the config with the reason; and the sync's check of kernels finds none of compressed-tensors here."""
    with pytest.raises(ValidationError, match="engine 'exact' needs target = false: no quantized kernel equals"):
        RolloutConfig(engine="exact", max_tokens=4, max_model_len=8)
    with pytest.raises(ValidationError, match="engine 'exact' needs routing_replay = false"):
        RolloutConfig(engine="exact", target=False, routing_replay=True, max_tokens=4, max_model_len=8)
    with pytest.raises(ValidationError, match="engine 'exact' needs batch_invariant = false"):
        RolloutConfig(engine="exact", target=False, batch_invariant=True, max_tokens=4, max_model_len=8)
    _, engine = made(config(), family="qwen3-moe")
    held: EngineWeights = engine.read_back()
    assert held.kernels["model.layers.0.self_attn.q_proj"] == "Linear"
    assert held.kernels["model.layers.0.mlp.experts.3.gate_proj"] == "Qwen3MoeExperts"

    target = Target.for_model(TargetSpec.load("int4-g128"), tiny_model())
    with pytest.raises(VerificationError, match="runs on Linear, not on a quantized kernel of int4-g128"):
        verify(engine, held.fingerprints, target)


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ExactEngineError, match=message):
        call()


def test_what_does_not_fit_is_refused() -> None:
    """Unknown names and shapes, before anything is written; prompts without room; a policy of another engine."""
    _, engine = made(config())
    name, before = "model.norm.weight", engine.read_back().fingerprints
    good = {name: torch.zeros(128, dtype=torch.bfloat16)}
    refused(lambda: engine.load(good | {"model.nothing": torch.zeros(1)}), r"no weight model\.nothing \[1\]")
    refused(lambda: engine.load(good | {"lm_head.weight": torch.zeros(1)}), r"no weight lm_head\.weight \[1\]")
    assert engine.read_back().fingerprints == before
    refused(lambda: engine.generate([[3] * 17], [0]), r"17 tokens and max_tokens \(16\) exceed max_model_len \(32\)")
    plain = Policy(tiny_model(), config(rollout={"engine": "vllm"}))
    refused(lambda: ExactEngine(plain, ends=()), "train.rollout.engine is not 'exact'")


def test_a_mismatch_is_counted_and_measured() -> None:
    """Two of three tokens differ, at most by half a nat; padding does not count; NaN differs."""
    old, mask = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    require_no_mismatch(old, torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), mask)
    with pytest.raises(MismatchError, match=r"on 2 of 3 tokens, at most by 0\.5;"):
        require_no_mismatch(old, torch.tensor([[-1.0, -2.5], [-3.25, 0.0]]), mask)
    with pytest.raises(MismatchError, match="on 1 of 3 tokens, at most by nan"):
        require_no_mismatch(old, torch.tensor([[-1.0, math.nan], [-3.0, 0.0]]), mask)
