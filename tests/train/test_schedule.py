"""Learning-rate schedules by their formulas, the length-triggered one's detector, and both across a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from tests.tiny import tiny_model
from train.checkpoint import LoopState, load_checkpoint, save_checkpoint
from train.config import RolloutConfig, ScheduleConfig, TaskConfig, TrainConfig
from train.multiplier import Multiplier
from train.policy import Policy
from train.schedule import LengthSurge, length_triggered, lr_multiplier

NOTHING_YET = LengthSurge()


def table(config: ScheduleConfig, steps: int, surge: LengthSurge = NOTHING_YET) -> list[float]:
    """The multiplier of every step."""
    return [lr_multiplier(config, k, steps=steps, surge=surge) for k in range(steps)]


def train_config(schedule: ScheduleConfig, steps: int = 10) -> TrainConfig:
    rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64)
    return TrainConfig(task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=steps, schedule=schedule)


def observed(lengths: list[float], config: ScheduleConfig, start: LengthSurge = NOTHING_YET, k: int = 0) -> LengthSurge:
    """The detector after these steps."""
    for i, length in enumerate(lengths):
        start = start.updated(k + i, length, config)
    return start


def test_constant_is_exactly_one() -> None:
    """The default multiplies by 1.0, so that lr is the configured float to the last bit, surge or not."""
    assert table(ScheduleConfig(), 5, LengthSurge(step=1)) == [1.0] * 5


def test_warm_up_is_linear_and_the_first_step_learns() -> None:
    """Four steps: 1/4, 2/4, 3/4, 1; then the schedule's own."""
    assert table(ScheduleConfig(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_by_hand() -> None:
    """Two of warm-up, then from 1 down to 0.2 at step 6, the first that is not run: 0.2 less a step."""
    values = table(ScheduleConfig(kind="linear", warmup_steps=2, final=0.2), 6)
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_by_hand() -> None:
    """1, half way 0.55 and at a third of the way cos(60 degrees) for final = 0.1 over 6 steps."""
    values = table(ScheduleConfig(kind="cosine", final=0.1), 6)
    assert values[0] == 1.0
    assert values[2] == pytest.approx(0.1 + 0.9 * 0.75)
    assert values[3] == pytest.approx(0.55)
    assert all(a > b > 0.1 for a, b in pairwise(values))


def test_length_triggered_is_the_published_formula() -> None:
    """t_s = 100 and 10 steps of warm-up: period 180, so full until step 189, then 1/2, 1/4, 1/8 and 0.1 for good; every
    step equals max(0.1, 2^-floor((k - 10) / 180)). Without a surge it stays at 1."""
    config = ScheduleConfig(kind="length-triggered", warmup_steps=10)
    values = table(config, 1000, LengthSurge(step=100))
    assert (values[9], values[189], values[190], values[370], values[550]) == (1.0, 1.0, 0.5, 0.25, 0.125)
    assert set(values[730:]) == {0.1}
    assert values[10:] == [max(0.1, 2 ** -math.floor((k - 10) / 180)) for k in range(10, 1000)]
    assert set(table(config, 1000)[10:]) == {1.0}


def test_the_surge_does_not_move_the_rate_by_itself() -> None:
    """At and right after t_s the multiplier is still 1, whatever the warm-up: the period is longer than t_s."""
    for surge in (1, 50, 333):
        for k in (surge, surge + 1):
            assert length_triggered(k, surge=surge, start=0, period_ratio=2.5, floor=0.1) == 1.0


def test_the_detector_fires_once_above_three_times_the_first_fifty() -> None:
    """A baseline of 100 (50 steps of 90 and 110): 300 is no surge, 300.1 at step 61 is; a later 900 changes nothing,
    nor does one inside the first 50 steps count as a surge."""
    config = ScheduleConfig(kind="length-triggered")
    seen = observed([90.0, 110.0] * 25, config)
    assert (seen.baseline_steps, seen.baseline_sum, seen.step) == (50, 5000.0, None)
    seen = observed([*[100.0] * 10, 300.0], config, seen, 50)
    assert seen.step is None
    assert observed([300.1, 900.0], config, seen, 61).step == 61
    assert observed([1.0, 900.0], config).step is None


def test_the_detector_obeys_its_options() -> None:
    """Twice the mean of two steps: fires at the third."""
    config = ScheduleConfig(kind="length-triggered", surge_ratio=2.0, surge_baseline_steps=2)
    assert observed([10.0, 20.0, 31.0], config).step == 2


def test_an_interrupted_detector_goes_on_exactly() -> None:
    """Through JSON after any step, then on: equal to the uninterrupted one, bit for bit."""
    config = ScheduleConfig(kind="length-triggered", surge_baseline_steps=4)
    lengths = [0.1 + 1 / 3, 0.7, 1.1, 0.2, 0.9, 1.9, 5.0]
    whole = observed(lengths, config)
    assert whole.step == 5
    for cut in range(len(lengths)):
        half = LengthSurge(**json.loads(json.dumps(asdict(observed(lengths[:cut], config)))))
        assert observed(lengths[cut:], config, half, cut) == whole


def test_a_checkpoint_keeps_the_detector(tmp_path) -> None:
    """Saved and loaded, the loop's state is equal, with a baseline under way and with a surge seen."""
    policy = Policy(tiny_model(), train_config(ScheduleConfig()))
    for surge in (LengthSurge(7, 0.1 + 0.2), LengthSurge(50, 1 / 3, 77)):
        state = LoopState(7, Multiplier(0.5, rate=5.0), 0.15, 0.015, surge=surge)
        assert load_checkpoint(save_checkpoint(tmp_path, policy, state), policy) == state


def test_the_set_rate_is_the_step_that_is_taken() -> None:
    """AdamW's first step is lr in every touched weight: a tenth of the rate moves a tenth as far."""
    moves = []
    for lr in (1e-3, 1e-4):
        policy = Policy(tiny_model(), train_config(ScheduleConfig()))
        master = policy.masters["model.norm.weight"]
        before = master.detach().clone()
        master.grad = torch.ones_like(master)
        policy.set_lr(lr)
        policy.update()
        moves.append((master.detach() - before).abs().mean().item())
    assert moves == pytest.approx([1e-3, 1e-4], rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleConfig(kind="cosine", warmup_steps=10), r"schedule\.warmup_steps \(10\) must be below steps \(10\)"),
        (ScheduleConfig(kind="length-triggered"), r"surge_baseline_steps \(50\) must be below steps \(10\)"),
    ],
)
def test_schedules_that_cannot_work_are_refused(schedule, message) -> None:
    """A decay that never begins, a surge that can never be seen."""
    with pytest.raises(ValidationError, match=message):
        train_config(schedule)
