"""The policy: log-probs by definition, gradients in FP32, nothing depends on padding or on micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_model
from train.config import RolloutConfig, TaskConfig, TrainConfig
from train.loss import grpo_loss
from train.policy import NonFiniteError, Policy
from train.records import Completion, TokenBatch


def config(**changes) -> TrainConfig:
    rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64, temperature=0.7)
    return TrainConfig(
        task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=1, attention="eager", **changes
    )


def batch() -> TokenBatch:
    """Prompts of 2 to 5 tokens, responses of 1 to 6."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 6), (5, 1), (3, 3), (4, 5)]
    ids = [[torch.randint(2, 60, (n,), generator=generator).tolist() for n in pair] for pair in sizes]
    completions = [Completion(tuple(r), tuple(-1.0 for _ in r), "stop") for _, r in ids]
    return TokenBatch.collate([p for p, _ in ids], completions)


def test_logprobs_are_the_softmax_at_the_sampled_tokens() -> None:
    """One sequence at a time, without padding, full log-softmax of logits / T: the same numbers, 0 behind the mask."""
    policy, data = Policy(tiny_model(), config()), batch()
    values = policy.all_logprobs(data)
    for row, (prompt, response) in enumerate(zip(data.prompts, data.responses, strict=True)):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            full = (policy.module(ids).logits[0].float() / 0.7).log_softmax(-1)
        expected = [full[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert values[row, : len(response)].tolist() == pytest.approx(expected, abs=0.02)  # BF16 noise of padding
        assert values[row, len(response) :].abs().sum() == 0


def test_microbatches_hold_every_row_once_within_the_budget() -> None:
    """Alike in length, at most the budget of padded tokens unless a single row is longer."""
    policy, data = Policy(tiny_model(), config(microbatch_tokens=16)), batch()
    micro = list(policy.microbatches(data, range(4)))
    assert sorted(row for rows in micro for row in rows) == [0, 1, 2, 3]
    assert all(len(rows) * max(data.lengths[r] for r in rows) <= 16 or len(rows) == 1 for rows in micro)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_does_not_depend_on_the_micro_batch_split(tied) -> None:
    """One batch of four rows or four batches of one: the FP32 masters get the same gradient up to BF16 noise, and the
    module keeps none of its own."""
    norms, gradients = [], []
    for budget in (1000, 1):
        policy, data = Policy(tiny_model(tied=tied), config(microbatch_tokens=budget)), batch()
        for micro in policy.microbatches(data, range(4)):
            logprobs = policy.logprobs(data, micro)
            advantages = torch.arange(1.0, 5.0)[micro, None] * data.mask[micro]
            loss, _ = grpo_loss(logprobs, logprobs.detach(), advantages, data.mask[micro], clip_low=0.2, clip_high=0.2)
            (loss / data.mask.sum()).backward()
        assert all(p.grad is None for p in policy.module.parameters())
        assert all(m.dtype == torch.float32 for m in policy.masters.values())
        gradients.append(torch.cat([m.grad.flatten() for m in policy.masters.values() if m.grad is not None]))
        norms.append(policy.update())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_small_updates_survive_in_the_masters() -> None:
    """An AdamW step of 1e-6 is below BF16's resolution: the masters move, their BF16 rounding (what is deployed) in
    few places, and without masters nothing would ever move."""
    policy, data = Policy(tiny_model(), config(lr=1e-6)), batch()
    before, rounded = {n: m.detach().clone() for n, m in policy.masters.items()}, policy.weights()
    (-policy.logprobs(data, [0, 1, 2, 3]).sum()).backward()
    policy.update()
    name = "model.layers.0.mlp.up_proj.weight"
    assert (policy.masters[name] - before[name]).abs().mean().item() == pytest.approx(1e-6, rel=0.1)
    assert (policy.weights()[name] != rounded[name]).float().mean() < 0.1


def test_a_non_finite_gradient_stops_before_the_step() -> None:
    """The error names the norm; the masters are untouched."""
    policy, data = Policy(tiny_model(), config()), batch()
    before = {name: master.detach().clone() for name, master in policy.masters.items()}
    (policy.logprobs(data, [0]).sum() * math.nan).backward()
    with pytest.raises(NonFiniteError, match="gradient norm is nan"):
        policy.update()
    assert all(torch.equal(master, before[name]) for name, master in policy.masters.items())


def test_collate_refuses_what_does_not_belong_together() -> None:
    """Two tokens with one log-prob, and an empty completion."""
    for completion in (Completion((1, 2), (-1.0,), "stop"), Completion((), (), "stop")):
        with pytest.raises(ValueError, match=r"completion 0: \d tokens with \d log-probs"):
            TokenBatch.collate([[1]], [completion])
