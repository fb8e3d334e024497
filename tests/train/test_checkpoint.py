"""Checkpoints hold the loop's state exactly, whatever moves the multiplier."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from train.checkpoint import LoopState, load_checkpoint, save_checkpoint
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.multiplier import BlockMultipliers, initial_multiplier
from train.policy import Policy

CONFIG = TrainConfig(
    task=TaskConfig(source="jsonl", name="x"),
    rollout=RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64),
    steps=1,
)


@pytest.mark.parametrize("rule", ["dual", "pid"])
@pytest.mark.parametrize("groups", ["model", "block"])
def test_the_state_comes_back_exactly(tmp_path, rule, groups) -> None:
    """Multiplier with its memory, tolerance and floor: equal after a checkpoint, and so is the next lambda."""
    multiplier = initial_multiplier(ConstraintConfig(multiplier_rule=rule, groups=groups))
    if isinstance(multiplier, BlockMultipliers):
        multiplier = multiplier.measured({"model.layers.0": 0.1 / 3, "model.layers.1": 0.2 / 7})
    multiplier = multiplier.updated(0.1 / 7, 0.01).updated(0.2 / 3, 0.01)
    state = LoopState(2, multiplier, 0.1 / 7, 0.01, scales={"k": torch.tensor(0.5)}, tolerance_floor=0.01 / 3)
    policy = Policy(tiny_model(), CONFIG)
    again = load_checkpoint(save_checkpoint(tmp_path, policy, state), policy)
    assert (again.multiplier, again.tolerance, again.tolerance_floor) == (multiplier, 0.01, 0.01 / 3)
    assert again.multiplier.updated(0.03, 0.01) == multiplier.updated(0.03, 0.01)
    assert torch.equal(again.scales["k"], torch.tensor(0.5))
