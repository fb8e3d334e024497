"""Planned activations against the bytes that autograd saves and the peak of living tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.plan.activations import MicroBatch, activations
from pipeline.plan.shape import shape_of
from tests.quant.test_memory import Live
from tests.tiny import Family, tiny_model
from train.config import RolloutConfig, TaskConfig, TrainConfig
from train.distill import pull
from train.policy import Policy
from train.records import Completion, TokenBatch

SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "wider": {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2,
              "num_hidden_layers": 4},
}  # fmt: skip


class Measured:
    """One micro-batch of a real policy, on the CPU.

    Attributes:
        micro: its sizes.
        policy: of the model.
        saved: bytes that autograd holds when the forward pass is done, without weights.
        peak: most bytes alive in forward and backward, without weights and the masters' gradients.
    """

    def __init__(self, family: Family, size: str, attention: Any, checkpointing: bool, padded: bool) -> None:
        prompt, lengths = 16, [112] * 6 if not padded else [112, 112, 100, 112, 90, 112]
        rollout = RolloutConfig(prompts=3, group_size=2, max_tokens=112, max_model_len=128)
        config = TrainConfig(
            task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=1, attention=attention,
            gradient_checkpointing=checkpointing, microbatch_tokens=10**6,
        )  # fmt: skip
        model = tiny_model(family=family, **SIZES[size])
        model.set_attn_implementation(attention)
        self.policy = Policy(model, config)
        done = [Completion(tuple([7] * n), tuple([-1.0] * n), "length", None) for n in lengths]
        batch = TokenBatch.collate([[5] * prompt] * 6, done)
        self.micro = MicroBatch(6 * 128, 128, sum(lengths), attention, padded)
        given = [*self.policy.masters.values(), *model.parameters(), *model.buffers()]
        self.saved = self._saved(batch, {tensor.untyped_storage().data_ptr() for tensor in given})
        self.policy.logprobs(batch, range(6)).sum().backward()  # now the masters have gradients to add to
        gradients = [master.grad for master in self.policy.masters.values() if master.grad is not None]
        with Live([*given, *gradients]) as live:
            self.policy.logprobs(batch, range(6)).sum().backward()
        self.peak = live.peak

    def _saved(self, batch: TokenBatch, weights: set[int]) -> int:
        held: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.policy.logprobs(batch, range(6))
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


CASES: list[tuple[Family, str, str, bool]] = [
    ("qwen3", "small", "sdpa", False), ("qwen3", "wider", "sdpa", False), ("qwen3", "wider", "sdpa", True),
    ("qwen3", "wider", "eager", False), ("llama", "wider", "sdpa", False), ("qwen2", "small", "sdpa", False),
    ("qwen3-moe", "small", "sdpa", False), ("qwen3-moe", "wider", "sdpa", False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "size", "attention", "padded"), CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_those_measured(family, size, attention, padded, checkpointing, monkeypatch) -> None:
    """Saved bytes within 2%, the peak of forward and backward within 10%: two sizes, dense and mixture, rows alike and
    padded, with and without gradient checkpointing. In BF16 products throughout, as on a GPU, which is what is planned
    for; this machine's CPU may compute them through FP32 and hold more."""
    monkeypatch.setattr("train.policy.native", lambda device: True)
    measured = Measured(family, size, attention, checkpointing, padded)
    planned = activations(shape_of("x", measured.policy.module), measured.micro, checkpointing=checkpointing)
    assert planned.saved == pytest.approx(measured.saved, rel=0.02)
    assert planned.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("vocab", [None, 4096])
def test_a_pull_holds_the_teachers_logits_besides(vocab, monkeypatch) -> None:
    """The peak of a KL pull's two forward passes and one backward, within 10%, with a small vocabulary and one that is
    most of it."""
    monkeypatch.setattr("train.policy.native", lambda device: True)
    rollout = RolloutConfig(prompts=3, group_size=2, max_tokens=112, max_model_len=128)
    config = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=1, attention="sdpa", microbatch_tokens=10**6
    )
    model = tiny_model(**SIZES["wider"])
    if vocab:
        model.resize_token_embeddings(vocab)
        model = model.bfloat16()
    policy = Policy(model, config)
    batch = TokenBatch.collate([[5] * 16] * 6, [Completion((7,) * 112, (-1.0,) * 112, "length", None)] * 6)
    weights = policy.weights()
    pull(policy, batch, range(6), teacher=weights, weights=weights, deployed={}, scale=1.0)
    gradients = [master.grad for master in policy.masters.values() if master.grad is not None]
    given = [*policy.masters.values(), *model.parameters(), *model.buffers(), *gradients, *weights.values()]
    with Live(given) as live:
        pull(policy, batch, range(6), teacher=weights, weights=weights, deployed={}, scale=1.0)
    micro = MicroBatch(6 * 128, 128, 6 * 112, "sdpa", padded=False)
    planned = activations(shape_of("x", model), micro, checkpointing=False, taught=True)
    assert planned.peak == pytest.approx(live.peak, rel=0.1)


def test_logits_are_what_a_large_vocabulary_costs() -> None:
    """6 bytes per response token and vocabulary entry at the peak, by hand for Qwen3's: 10,000 tokens are 9.1 GB; as
    few as go through FP32 at once, 12."""
    shape = shape_of("x", tiny_model())
    for tokens, size in ((10_000, 6), (1_000, 12)):
        micro = MicroBatch(tokens, tokens, tokens, "sdpa", padded=False)
        wide = activations(replace(shape, vocab=151_936), micro, checkpointing=True)
        assert wide.logits == size * tokens * 151_936
        assert wide.logits / wide.peak > 0.99
