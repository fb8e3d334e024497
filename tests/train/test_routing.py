"""Routing replay: the given experts and nothing else, exact against brute force, with gradient to the router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_model
from train.config import RolloutConfig, TaskConfig, TrainConfig
from train.policy import Policy
from train.records import Completion, TokenBatch
from train.routing import OWN_CHOICE, RoutingError, padded, replay

EXPERTS, K = 8, 2
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17, 3, 5, 7]])


def policy(*, replaying: bool = True, family: Any = "qwen3-moe", **changes: Any) -> Policy:
    rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64, routing_replay=replaying)
    config = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=1, attention="eager", **changes
    )
    return Policy(tiny_model(family=family), config)


def batch(experts: list[Tensor] | None = None) -> TokenBatch:
    """Prompts of 2 to 5 tokens, responses of 1 to 6, alone or with these experts."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 6), (5, 1), (3, 3), (4, 5)]
    ids = [[torch.randint(2, 60, (n,), generator=generator).tolist() for n in pair] for pair in sizes]
    records = experts or [None] * len(sizes)
    completions = [
        Completion(tuple(r), tuple(-1.0 for _ in r), "stop", e) for (_, r), e in zip(ids, records, strict=True)
    ]
    return TokenBatch.collate([p for p, _ in ids], completions)


def routing(layers: int, *tokens: int, seed: int = 0, among: int = EXPERTS) -> Tensor:
    """Random distinct experts [layers, *tokens, K] of the first `among`."""
    scores = torch.rand(layers, *tokens, among, generator=torch.Generator().manual_seed(seed))
    return scores.topk(K).indices


def planted(data: TokenBatch, seed: int = 0, among: int = EXPERTS) -> list[Tensor]:
    """Random experts for every computed token of a batch, as an engine records them."""
    return [routing(2, length - 1, seed=seed + i, among=among).transpose(0, 1) for i, length in enumerate(data.lengths)]


@contextmanager
def seen(module: Any, part: str, into: list[Any]) -> Iterator[None]:
    """Collect (input, output) of every layer's `mlp` or `mlp.gate`."""
    hooks = [
        layer.get_submodule(part).register_forward_hook(lambda _, given, made: into.append((given[0], made)))
        for layer in module.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradients(p: Policy, data: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the whole batch in one forward pass, and the masters' gradients of their sum."""
    for master in p.masters.values():
        master.grad = None
    logprobs = p.logprobs(data, range(len(data.prompts)))
    logprobs.sum().backward()
    return logprobs.detach(), {name: m.grad for name, m in p.masters.items() if m.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in one[1] | two[1])


def test_replaying_the_own_choice_changes_no_bit() -> None:
    """The experts the router chose anyway, forced: the same log-probs and the same gradient of every master."""
    p, data, routed = policy(), batch(), []
    with seen(p.module, "mlp.gate", routed):
        plain = gradients(p, data)
    chosen = torch.stack([output[2].view(4, -1, K) for _, output in routed], 2)  # [n, L, layers, k]
    own = [chosen[row, : length - 1] for row, length in enumerate(data.lengths)]
    assert same(gradients(p, batch(own)), plain)
    assert not same(gradients(p, batch(planted(data))), plain)


@pytest.mark.parametrize("renormalize", [True, False])
def test_replay_equals_a_loop_over_tokens_and_experts(renormalize) -> None:
    """Planted experts: every mixture layer's output is, token by token and expert by expert, the router's softmax
    probability (over the chosen ones' sum where the model renormalizes) times the expert's SwiGLU, in FP64."""
    module = tiny_model(family="qwen3-moe", norm_topk_prob=renormalize).float().eval()
    experts, blocks = routing(2, *IDS.shape), []
    with torch.no_grad(), replay(module, experts), seen(module, "mlp", blocks):
        module(IDS)
    assert len(blocks) == 2
    for layer, (given, made) in enumerate(blocks):
        mlp = module.model.layers[layer].mlp.double()
        for row in range(IDS.shape[0]):
            for position in range(IDS.shape[1]):
                x = given[row, position].double()
                scores = torch.softmax(mlp.gate.weight @ x, 0)
                total = sum(scores[e] for e in experts[layer, row, position]) if renormalize else 1.0
                expected = torch.zeros_like(x)
                for expert in experts[layer, row, position]:
                    gate, up = (mlp.experts.gate_up_proj[expert] @ x).chunk(2)
                    value = mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    expected += scores[expert] / total * value
                torch.testing.assert_close(made[row, position].double(), expected, atol=1e-7, rtol=1e-4)


def test_gradient_reaches_the_router_through_the_chosen_experts() -> None:
    """All tokens sent to experts 0 and 5: with renormalized weights only their two router rows get a gradient, equal
    and opposite, because their probabilities are shares of one sum; without it all rows do."""
    norms = []
    for renormalize in (True, False):
        module = tiny_model(family="qwen3-moe", norm_topk_prob=renormalize).float()
        experts = torch.tensor([0, 5]).expand(2, *IDS.shape, K)
        with replay(module, experts):
            module(IDS).logits.square().sum().backward()
        norms.append(module.model.layers[0].mlp.gate.weight.grad)
    scale = norms[0].norm(dim=1)[0].item()
    assert scale > 1e-4
    assert norms[0].norm(dim=1)[[1, 2, 3, 4, 6, 7]].max().item() < 1e-4 * scale
    torch.testing.assert_close(norms[0][0], -norms[0][5], atol=1e-4 * scale, rtol=1e-3)
    assert norms[1].norm(dim=1).min().item() > 1e-4 * norms[1].norm(dim=1).max().item()


def test_recomputation_replays_what_the_forward_pass_replayed() -> None:
    """Gradient checkpointing recomputes in backward, after the context is left and after a second forward pass with
    other experts: the gradients are those without checkpointing, bit for bit."""
    found = []
    for checkpointing in (False, True):
        p, data = policy(gradient_checkpointing=checkpointing), batch()
        first = p.logprobs(batch(planted(data, seed=1)), range(4))
        second = p.logprobs(batch(planted(data, seed=2)), range(4))
        (2 * first.sum()).backward()
        second.sum().backward()
        found.append(
            (first.detach() + second.detach(), {n: m.grad for n, m in p.masters.items() if m.grad is not None})
        )
    assert same(*found)


def test_padding_keeps_the_routers_choice_and_changes_nothing() -> None:
    """Three sequences of 2, 4 and 6 tokens, padded to 6 with their experts or alone: the same logits to FP32 noise. A
    position without a record, such as the last token's, is routed as if there were no replay."""
    module = tiny_model(family="qwen3-moe").float().eval()
    lengths, experts = [2, 4, 6], routing(2, *IDS.shape)
    records = [experts[:, row, : n - 1].transpose(0, 1) for row, n in enumerate(lengths)]
    attention = torch.tensor([[int(i < n) for i in range(6)] for n in lengths])
    given = padded(records, 6)
    assert (given[:, 1, 3:] == OWN_CHOICE).all()
    assert torch.equal(given[:, 1, :3], experts[:, 1, :3])
    routed: list[Any] = []
    with torch.no_grad():
        with replay(module, given), seen(module, "mlp.gate", routed):
            together = module(IDS, attention_mask=attention).logits
        for row, n in enumerate(lengths):
            with replay(module, given[:, row : row + 1, :n]):
                alone = module(IDS[row : row + 1, :n]).logits
            torch.testing.assert_close(together[row, :n], alone[0], atol=1e-5, rtol=1e-4)
    for output in (output for _, output in routed):
        own = output[0].topk(K).indices.view(3, 6, K)
        assert all(
            torch.equal(output[2].view(3, 6, K)[row, n - 1 :], own[row, n - 1 :]) for row, n in enumerate(lengths)
        )


def test_a_dense_layers_entry_is_not_read() -> None:
    """Of three layers the second alone is a mixture: what the record says of the other two, not even a routing, changes
    nothing; what it says of the second does."""
    module = tiny_model(family="qwen3-moe", num_hidden_layers=3, decoder_sparse_step=2).float().eval()
    experts, logits = routing(3, *IDS.shape), []
    others = experts.clone()
    others[[0, 2]] = 0
    for record in (experts, others, routing(3, *IDS.shape, seed=1)):
        with torch.no_grad(), replay(module, record):
            logits.append(module(IDS).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_the_context_leaves_nothing_behind() -> None:
    """After it, an error inside included, the model routes as before, bit for bit."""
    module = tiny_model(family="qwen3-moe").eval()
    with torch.no_grad():
        before = module(IDS).logits
        with replay(module, routing(2, *IDS.shape)):
            assert not torch.equal(module(IDS).logits, before)
        with pytest.raises(ZeroDivisionError), replay(module, routing(2, *IDS.shape)):
            _ = 1 / 0
        assert torch.equal(module(IDS).logits, before)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (routing(3, *IDS.shape), r"\[layers=2, n, L, k=2\], got torch.int64 \[3, 3, 6, 2\]"),
        (routing(2, *IDS.shape)[..., :1], r"k=2\], got torch.int64 \[2, 3, 6, 1\]"),
        (routing(2, *IDS.shape)[0], r"got torch.int64 \[3, 6, 2\]"),
        (routing(2, *IDS.shape).float(), r"must be integers .* got torch.float32"),
        (routing(2, *IDS.shape) + EXPERTS, r"must be in \[0, 8\) or -1, got 8 to 15"),
        (routing(2, *IDS.shape) - 9, r"must be in \[0, 8\) or -1, got -9 to -2"),
        (torch.zeros(2, *IDS.shape, K, dtype=torch.uint8), "must be distinct or all -1"),
        (torch.tensor([0, OWN_CHOICE]).expand(2, *IDS.shape, K), "must be distinct or all -1"),
        (routing(2, 3, 5), "experts were given for 15 tokens, the forward pass has 18"),
    ],
)
def test_experts_that_do_not_fit_are_refused(experts, message) -> None:
    """Wrong layers, top-k, dimensions, kind, range, what no router does (an uncaptured row of zeros), wrong tokens."""
    module = tiny_model(family="qwen3-moe").eval()
    with pytest.raises(RoutingError, match=message), torch.no_grad(), replay(module, experts):
        module(IDS)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_other_families_are_refused_at_the_start(family) -> None:
    """A dense model with routing replay has no first step; without replay it is a policy like any other."""
    with pytest.raises(RoutingError, match=r"router of Qwen3-MoE models only, got \w+ForCausalLM"):
        policy(family=family)
    assert policy(family=family, replaying=False).all_logprobs(batch()).min() < 0


def test_a_batch_carries_experts_for_all_or_none() -> None:
    """Experts for another number of tokens than were computed (prompt + response - 1), or for some completions only,
    are refused; equality of completions does not look at them."""
    data = batch()
    records = planted(data)
    carried = batch(records).experts
    assert carried is not None
    assert all(torch.equal(one, two) for one, two in zip(carried, records, strict=True))
    with pytest.raises(ValueError, match="completion 1: experts for 4 of 5 computed tokens"):
        batch([records[0], records[1][:-1], *records[2:]])
    with pytest.raises(ValueError, match="3 of 4 completions have experts"):
        batch([*records[:3], None])  # type: ignore[list-item]
    assert Completion((1,), (-1.0,), "stop", records[0]) == Completion((1,), (-1.0,), "stop")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_optimizer_step_moves_experts_and_router(checkpointing) -> None:
    """One AdamW step of 1e-3 under replay: the FP32 masters of stacked experts and routers move by 1e-3 (an expert that
    no token was sent to stays), the BF16 module keeps no gradient, and the tokens become likelier."""
    p = policy(lr=1e-3, gradient_checkpointing=checkpointing)
    data = batch(planted(batch(), among=7))
    before = {name: master.detach().clone() for name, master in p.masters.items()}
    old = p.all_logprobs(data)
    (-p.logprobs(data, range(4)).sum()).backward()
    assert all(parameter.grad is None for parameter in p.module.parameters())
    p.update()
    for layer in range(2):
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
            moved = (p.masters[f"model.layers.{layer}.{name}"] - before[f"model.layers.{layer}.{name}"]).abs()
            assert moved.dtype == torch.float32
            assert moved[:7].median().item() == pytest.approx(1e-3, rel=0.01), name
            if "experts" in name:
                assert moved[7].max() == 0
    p.run_at(p.weights())
    assert (p.all_logprobs(data) - old).sum() > 1


def test_micro_batches_replay_their_own_rows() -> None:
    """One batch of four rows or four of one: the same log-probs up to BF16 noise, and with other experts a change of
    ten times that."""
    data = batch()
    one, four = (policy(microbatch_tokens=budget).all_logprobs(batch(planted(data))) for budget in (1000, 1))
    other = policy().all_logprobs(replace(data, experts=tuple(planted(data, seed=50))))
    noise, change = (one - four).abs().mean().item(), (one - other).abs().mean().item()
    assert change > 10 * noise
