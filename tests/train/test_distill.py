"""The straight-through pull: KL by definition, the right gradient in the right place, independent of the split."""

from __future__ import annotations

import pytest
import torch

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from train.checkpoint import LoopState
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.constraint import Constraint
from train.distill import pull
from train.multiplier import initial_multiplier
from train.policy import Policy
from train.records import Completion, TokenBatch
from train.reference import Reference
from train.token_kl import kl_divergence


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


def policy_and_deployed(**changes) -> tuple[Policy, dict, dict]:
    """A tiny policy with outlier channels, its W and its Q(W)."""
    model = tiny_model(outlier_scale=16)
    policy = Policy(model, config(**changes))
    weights = policy.weights()
    return policy, weights, Target.for_model(TargetSpec.load("int4-g128"), model).deployed(weights)


def gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([m.grad.flatten() for m in policy.masters.values() if m.grad is not None])


def test_the_pull_is_the_kl_of_whole_distributions_at_the_response_tokens() -> None:
    """Sequence by sequence, without padding, full softmax at T = 0.7, plain loops over tokens: the same sum."""
    policy, weights, deployed = policy_and_deployed()
    data = batch()
    measured = pull(policy, data, range(4), teacher=weights, weights=weights, deployed=deployed, scale=1.0)
    expected = 0.0
    for prompt, response in zip(data.prompts, data.responses, strict=True):
        sides = []
        for at in (weights, {**weights, **deployed}):
            policy.run_at(at)
            with torch.no_grad():
                logits = policy.module(torch.tensor([prompt + response])).logits[0].float() / 0.7
            sides.append(logits.log_softmax(-1))
        for t in range(len(response)):
            p, q = (side[len(prompt) - 1 + t] for side in sides)
            expected += float((p.exp() * (p - q)).sum())
    assert measured == pytest.approx(expected, rel=0.05)  # BF16 noise of padding
    assert measured > 0.1


def test_the_gradient_goes_straight_through_to_the_masters() -> None:
    """The masters get scale times the gradient that a module at Q(W) has, while W itself is what they hold."""
    policy, weights, deployed = policy_and_deployed()
    data = batch()
    pull(policy, data, range(4), teacher=weights, weights=weights, deployed=deployed, scale=0.5)
    straight = gradient(policy)
    assert all(torch.equal(policy.weights()[name], value) for name, value in weights.items())
    reference, _, _ = policy_and_deployed()
    reference.run_at(weights)
    teacher = reference.token_logits(data, range(4))
    reference.run_at({**weights, **deployed})
    (0.5 * kl_divergence(teacher, reference.token_logits(data, range(4)), 0.7)).backward()
    assert torch.equal(straight, gradient(reference))
    assert straight.norm() > 0


def test_the_teacher_may_be_the_start_model() -> None:
    """A trainer that is told so pulls towards the weights it began with, after an update too; W, the default, has moved
    on by then, and the KL is another."""
    found = {}
    for source in ("policy", "start"):
        model = tiny_model(outlier_scale=16)
        constraint = ConstraintConfig(form="blend+distill", multiplier_init=0.5, distill_from=source)
        policy = Policy(model, config(lr=1e-2, constraint=constraint))
        start = policy.weights()
        target = Target.for_model(TargetSpec.load("int4-g128"), model)
        kept = Reference(policy).weights if constraint.keeps_start else None
        lever = Constraint(constraint, policy, target, kept)
        state = LoopState(0, initial_multiplier(constraint), 0.1, 0.1)
        data = batch()
        for _ in range(2):
            weights = policy.weights()
            deployed = target.deployed(weights)
            point = lever.run_at(weights, deployed, state)
            found[source] = lever.pull(data, range(4), torch.tensor(15.0), point, state)
            policy.update()
        if source == "start":
            again = Policy(tiny_model(outlier_scale=16), config(constraint=constraint))
            expected = pull(
                again, data, range(4), teacher=start, weights=weights, deployed=deployed, scale=torch.tensor(0.05 / 15)
            )
            assert found[source] == expected
    assert found["policy"] != found["start"]


def test_the_gradient_does_not_depend_on_the_micro_batch_split() -> None:
    """Four rows at once or one by one: the same sum and gradient up to BF16 noise; zero scale adds none."""
    found = []
    for budget in (1000, 1):
        policy, weights, deployed = policy_and_deployed(microbatch_tokens=budget)
        data = batch()
        total = sum(
            pull(policy, data, rows, teacher=weights, weights=weights, deployed=deployed, scale=1 / 15)
            for rows in policy.microbatches(data, range(4))
        )
        found.append((total, gradient(policy)))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99
    policy, weights, deployed = policy_and_deployed()
    pull(policy, batch(), range(4), teacher=weights, weights=weights, deployed=deployed, scale=0.0)
    assert gradient(policy).abs().max() == 0


def test_descending_the_pull_closes_the_gap_of_the_deployed_policy() -> None:
    """Ten steps on the pull alone: the KL of the re-quantized weights falls, though only W is ever updated."""
    model = tiny_model(outlier_scale=16)
    policy, target = Policy(model, config(lr=3e-4)), Target.for_model(TargetSpec.load("int4-g128"), model)
    data, values = batch(), []
    for _ in range(10):
        weights = policy.weights()
        deployed = target.deployed(weights)
        values.append(pull(policy, data, range(4), teacher=weights, weights=weights, deployed=deployed, scale=1 / 15))
        policy.update()
    assert values[-1] < 0.7 * values[0]
