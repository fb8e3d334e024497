"""What a run's summary warns about: a multiplier that could not do its work, one that had none, NaN, a grader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.training import _summary
from train.checkpoint import LoopState
from train.config import ConstraintConfig
from train.multiplier import BlockMultipliers, Multiplier, initial_multiplier

DEMO = Path(__file__).parent.parent.parent / "configs" / "demo-int4.toml"


def warnings(
    multipliers: list[float],
    *,
    discrepancy: float = 0.02,
    form: str = "blend",
    failed: float = 0.0,
    settings: tuple[str, ...] = (),
) -> list[str]:
    config = load_config(DEMO, ("signoff.baseline_arm=null", f"train.constraint.form={form}", *settings))
    rows: list[dict[str, Any]] = [
        {"multiplier": value, "discrepancy": discrepancy, "reward_failed": failed} for value in multipliers
    ]
    state = LoopState(len(rows), Multiplier(multipliers[-1], rate=5.0), 0.15, 0.015)
    return _summary(config, rows, state)["warnings"]


@pytest.mark.parametrize(
    ("multipliers", "expected"),
    [
        ([0.0, 0.7] + [1.0] * 10, "sat at its cap 1.0 for the last 10 steps: the tolerance 0.015 is out of reach"),
        ([0.0] * 12, "never left its floor 0.0: the tolerance 0.015 was never exceeded"),
    ],
)
def test_a_multiplier_that_tells_nothing_is_a_warning(multipliers, expected) -> None:
    """At its cap to the end, or at its floor throughout: one warning that names the bound and the tolerance."""
    assert [expected in text for text in warnings(multipliers)] == [True]


def test_a_multiplier_that_works_is_none() -> None:
    """Up to the cap and back, in use at the end; and no constraint, no warning."""
    assert warnings([0.0, 1.0, 1.0, 0.9] + [0.8] * 10) == []
    assert warnings([0.0] * 12, form="none") == []


@pytest.mark.parametrize("settings", [{"multiplier_rule": "pid"}, {"groups": "block"}])
@pytest.mark.parametrize(("gap", "expected"), [(0.9, "sat at its cap 1.0"), (0.001, "never left its floor 0.0")])
def test_every_rule_is_warned_about(settings, gap, expected) -> None:
    """A PID and one multiplier per block, far outside and always inside the tolerance: the same two warnings."""
    multiplier = initial_multiplier(ConstraintConfig(**settings, multiplier_init=0.0))
    if isinstance(multiplier, BlockMultipliers):
        multiplier = multiplier.measured({"a": 0.1, "b": 0.1, "c": 0.1})
    rows: list[dict[str, Any]] = []
    for _ in range(20):
        rows.append({"multiplier": multiplier.value, "discrepancy": gap, "reward_failed": 0.0})
        multiplier = multiplier.updated(gap, 0.015)
    config = load_config(DEMO, ("signoff.baseline_arm=null",))
    summary = _summary(config, rows, LoopState(20, multiplier, gap, 0.015, tolerance_floor=0.002))
    assert [expected in text for text in summary["warnings"]] == [True]
    assert summary["tolerance_floor"] == 0.002
    assert summary.get("multiplier_blocks", {}).keys() == ({"a", "b", "c"} if "groups" in settings else set())


def test_a_lever_without_a_multiplier_is_not_warned_about() -> None:
    """straight-through has lambda 1 by definition, and so has a lever whose bounds are both 1."""
    assert warnings([1.0] * 12, form="straight-through") == []
    held = ("train.constraint.multiplier_min=1", "train.constraint.multiplier_init=1")
    assert warnings([1.0] * 12, form="blend+distill", settings=held) == []


def test_nan_steps_are_counted() -> None:
    """A NaN discrepancy is said, with the number of steps."""
    assert "NaN in 3 steps" in warnings([0.0, 0.5, 0.5], discrepancy=math.nan)[0]


def test_a_grader_that_fails_is_a_warning() -> None:
    """A sixteenth of the samples of both steps had no reward: one warning with the steps and the share."""
    (text,) = warnings([0.0, 0.5], failed=1 / 16)
    assert "in 2 of 2 steps the grader failed on samples, at worst on 6.2%" in text
