"""What the first step measures: the tolerance by every rule, its floor, the blocks' own gaps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.constraint import Constraint
from train.policy import NonFiniteError, Policy
from train.records import Completion, TokenBatch
from train.tolerance import block_gaps, first_tolerance, tolerance_floor
from train.trainer import initial_state


def measured() -> tuple[Policy, TokenBatch, dict, dict]:
    """A tiny policy, W and Q(W), and a batch whose rollout log-probs are the trainer's own at Q(W)."""
    model = tiny_model(outlier_scale=16)
    train = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"),
        rollout=RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64),
        steps=1,
        attention="eager",
    )
    policy = Policy(model, train)
    weights = policy.weights()
    deployed = Target.for_model(TargetSpec.load("int4-g128"), model).deployed(weights)
    responses = [(7, 8, 9), (4,), (20, 21), (33, 5, 6, 11)]
    completions = [Completion(ids, tuple(-1.0 for _ in ids), "stop") for ids in responses]
    batch = TokenBatch.collate([(2, 3, 4)] * 4, completions)
    policy.run_at({**weights, **deployed})
    return policy, replace(batch, rollout_logprobs=policy.all_logprobs(batch)), weights, deployed


@pytest.mark.parametrize(
    ("tolerance", "floor", "expected"),
    [(0.03, None, 0.03), (None, None, 0.02), ("auto", 0.005, 0.02), ("auto", 0.05, 0.05), ("auto", None, 0.02)],
)
def test_the_tolerance_by_every_rule(tolerance, floor, expected) -> None:
    """A first gap of 0.2 and a ratio of 0.1: given, a share, and with 'auto' the larger of share and floor, of which
    BF16 rollouts have none."""
    config = ConstraintConfig(tolerance=tolerance, tolerance_ratio=0.1)
    assert first_tolerance(config, 0.2, floor) == pytest.approx(expected)


def test_the_floor_is_what_is_left_at_the_deployed_weights() -> None:
    """0 where the engine computes as the trainer does; a log-prob off by ln 0.9 at every token leaves 0.1 mean p; one
    that is NaN is refused."""
    policy, batch, weights, deployed = measured()
    assert tolerance_floor(policy, batch, weights, deployed) == 0
    off = replace(batch, rollout_logprobs=(batch.rollout_logprobs + math.log(0.9)) * batch.mask)
    p = batch.rollout_logprobs.exp()[batch.mask.bool()].mean().item()
    assert tolerance_floor(policy, off, weights, deployed) == pytest.approx(0.1 * p, rel=1e-4)
    with pytest.raises(NonFiniteError, match="tolerance 'auto'"):
        tolerance_floor(policy, replace(batch, rollout_logprobs=batch.rollout_logprobs * math.nan), weights, deployed)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_tolerance_is_a_share_of_the_gap_without_a_lever(start: float) -> None:
    """Wherever the multiplier begins, c is the ratio times the gap of the policy at W, not of the blend, which at 1 has
    no gap here; the step's own gap is kept as it was measured."""
    policy, batch, weights, _ = measured()
    policy.run_at(weights)
    old = policy.all_logprobs(batch)
    rows = [(i, t) for i, ids in enumerate(batch.responses) for t in range(len(ids))]
    gap = sum(abs(math.exp(old[at]) - math.exp(batch.rollout_logprobs[at])) for at in rows) / len(rows)
    config = ConstraintConfig(form="blend", tolerance=None, tolerance_ratio=0.1, multiplier_init=start)
    state = initial_state(policy.config.model_copy(update={"constraint": config}))
    seen = 0.0 if start == 1 else gap
    found = Constraint(config, policy, None).measured(state, seen, batch, weights)
    assert gap > 1e-3
    assert found.tolerance == pytest.approx(0.1 * gap, rel=1e-4)
    assert found.first_discrepancy == seen


def test_a_blocks_gap_is_its_own() -> None:
    """Both blocks are there with a gap above 0; a block that loses nothing to quantization has exactly 0, and the
    other's does not change."""
    policy, batch, weights, deployed = measured()
    gaps = block_gaps(policy, batch, weights, deployed)
    assert gaps.keys() == {"model.layers.0", "model.layers.1"}
    assert min(gaps.values()) > 1e-4
    harmless = {name: weights[name] if "layers.0" in name else value for name, value in deployed.items()}
    assert block_gaps(policy, batch, weights, harmless) == {
        "model.layers.0": 0.0,
        "model.layers.1": gaps["model.layers.1"],
    }


def test_brute_force_over_tokens() -> None:
    """g_b by plain loops over sequences and tokens."""
    policy, batch, weights, deployed = measured()
    gaps = block_gaps(policy, batch, weights, deployed)
    policy.run_at({**weights, **{name: value for name, value in deployed.items() if "layers.1" in name}})
    one = policy.all_logprobs(batch)
    policy.run_at(weights)
    other = policy.all_logprobs(batch)
    differences = [
        abs(math.exp(one[i, t]) - math.exp(other[i, t]))
        for i, ids in enumerate(batch.responses)
        for t in range(len(ids))
    ]
    assert gaps["model.layers.1"] == pytest.approx(sum(differences) / len(differences), rel=1e-4)
    assert torch.isfinite(one).all()
