"""The multiplier rules against their closed-form trajectories."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from statistics import fmean

import pytest
from pydantic import ValidationError

from train.config import ConstraintConfig
from train.multiplier import BlockMultipliers, Multiplier, PidMultiplier, by_weight, initial_multiplier, restored

GAPS = [0.15, 0.12, 0.13, 0.05, 0.01, 0.002, 0.09, 0.2]
TOLERANCE = 0.015


def trajectory(multiplier, gaps=GAPS) -> list[float]:
    """lambda after each gap."""
    values = []
    for gap in gaps:
        multiplier = multiplier.updated(gap, TOLERANCE)
        values.append(multiplier.value)
    return values


def test_constant_gap_gives_a_straight_line_until_the_cap() -> None:
    """lambda_k = min(cap, lambda_0 + k eta (gap - c)) for a constant gap above the tolerance."""
    multiplier = Multiplier(0.1, rate=2.0, cap=0.5)
    for k in range(1, 10):
        multiplier = multiplier.updated(0.06, 0.01)
        assert multiplier.value == pytest.approx(min(0.5, 0.1 + k * 0.1))


def test_projection_at_the_floor() -> None:
    """Far inside the tolerance the multiplier falls to its floor and stays there."""
    multiplier = Multiplier(0.3, rate=100.0, floor=0.05)
    assert multiplier.updated(0.0, 0.01).updated(0.0, 0.01).value == 0.05


def test_pid_under_a_constant_gap() -> None:
    """lambda_k = K_P (gap - c) + lambda_0 + k K_I (gap - c): a step, then dual ascent's line; no derivative."""
    multiplier = PidMultiplier(0.1, 0.1, proportional=3.0, rate=2.0, derivative=7.0, smoothing=0.9)
    for k in range(1, 6):
        multiplier = multiplier.updated(0.06, 0.01)
        assert multiplier.value == pytest.approx(3 * 0.05 + 0.1 + k * 2 * 0.05)


def test_pid_by_hand_with_smoothing() -> None:
    """c = 0.01, K_P = 2, K_I = 1, K_D = 4, a = 0.5, gaps 0.05 and 0.09.

    First: s = 0.05, I = 0.04, lambda = 0.08 + 0.04. Second: s = 0.07, I = 0.12, lambda = 0.12 + 0.12 + 4 * 0.02. A
    fall to 0.01 then has no derivative: s = 0.04, I = 0.12, lambda = 0.06 + 0.12.
    """
    multiplier = PidMultiplier(0.0, 0.0, proportional=2.0, rate=1.0, derivative=4.0, smoothing=0.5)
    for gap, expected in ((0.05, 0.12), (0.09, 0.32), (0.01, 0.18)):
        multiplier = multiplier.updated(gap, 0.01)
        assert multiplier.value == pytest.approx(expected)


def test_pid_with_the_integral_alone_is_dual_ascent() -> None:
    """K_P = K_D = 0: the same trajectory, through both projections."""
    pid = PidMultiplier(0.3, 0.3, proportional=0.0, rate=5.0, derivative=0.0, smoothing=0.7, floor=0.1, cap=0.9)
    assert trajectory(pid) == trajectory(Multiplier(0.3, rate=5.0, floor=0.1, cap=0.9))


def test_pid_does_not_wind_up() -> None:
    """After 1,000 steps at the cap the integral is the cap, so lambda leaves it within three steps of a closed gap."""
    multiplier = PidMultiplier(0.0, 0.0, proportional=5.0, rate=5.0, derivative=0.0)
    for _ in range(1000):
        multiplier = multiplier.updated(0.5, 0.1)
    assert multiplier.value == multiplier.integral == 1.0
    assert trajectory(multiplier, [0.0, 0.0, 0.0])[0] < 1.0


@pytest.mark.parametrize(
    "multiplier",
    [
        Multiplier(0.3, rate=1.0, warmup=3),
        PidMultiplier(0.3, 0.3, 2.0, 1.0, 3.0, 0.5, warmup=3),
        BlockMultipliers(Multiplier(0.3, rate=1.0, warmup=3)).measured({"a": 0.1, "b": 0.2}),
    ],
)
def test_the_warm_up_leaves_lambda_at_its_start(multiplier) -> None:
    """Three measured steps move nothing, the fourth does; NaN moves nothing and is not one of the three."""
    values = []
    for gap in (0.15, math.nan, 0.2, 0.15, 0.1):
        after = multiplier.updated(gap, TOLERANCE)
        assert (after is multiplier) == math.isnan(gap)
        multiplier = after
        values.append(multiplier.value)
    assert values[:4] == [0.3] * 4
    assert values[4] > 0.3


def test_the_pid_average_goes_on_in_the_warm_up() -> None:
    """A gap that rose before the end of the warm-up is no kick after it: lambda = K_P (s - c) + I, without K_D."""
    multiplier = PidMultiplier(0.0, 0.0, proportional=1.0, rate=1.0, derivative=100.0, warmup=2)
    assert trajectory(multiplier, [0.0, 0.1, 0.1])[-1] == pytest.approx(2 * (0.1 - TOLERANCE))


@pytest.mark.parametrize("multiplier", [Multiplier(0.3, rate=1.0), PidMultiplier(0.3, 0.3, 2.0, 1.0, 3.0, 0.5)])
def test_nan_leaves_it_alone(multiplier) -> None:
    """A NaN measurement moves nothing."""
    assert multiplier.updated(math.nan, 0.01) is multiplier


def test_equal_blocks_are_the_model() -> None:
    """Blocks with one gap share one trajectory, that of a single multiplier, whatever the number of blocks."""
    blocks = BlockMultipliers(Multiplier(0.0, rate=5.0)).measured(dict.fromkeys("abc", 0.04))
    assert trajectory(blocks) == pytest.approx(trajectory(Multiplier(0.0, rate=5.0)))


def test_the_blocks_gaps_average_to_the_measured_one() -> None:
    """delta_b = delta_bar r_b / mean(r), r_b = (1 - lambda_b) g_b: by hand, for lambda 0.5 and 0, g 0.2 and 0.1."""
    blocks = BlockMultipliers(
        Multiplier(0.0, 1.0), {"a": Multiplier(0.5, 1.0), "b": Multiplier(0.0, 1.0)}, {"a": 0.2, "b": 0.1}
    )
    assert blocks.attributed(0.06) == pytest.approx({"a": 0.06, "b": 0.06})
    lopsided = blocks.measured({"a": 0.3, "b": 0.1}).attributed(0.06)
    assert lopsided == pytest.approx({"a": 0.09, "b": 0.03})
    assert fmean(lopsided.values()) == pytest.approx(0.06)


def test_blocks_settle_where_each_adds_the_same_or_is_free() -> None:
    """In a model whose gap is mean_b (1 - lambda_b) g_b: the gap ends at c, the blocks above c add c each, and the one
    whose own gap is below c has lambda 0."""
    gaps = {"heavy": 0.3, "middle": 0.1, "light": 0.01}
    tolerance = 0.04
    blocks = BlockMultipliers(Multiplier(0.0, rate=1.0)).measured(gaps)
    for _ in range(5000):
        measured = fmean((1 - m.value) * gaps[name] for name, m in blocks.blocks.items())
        blocks = blocks.updated(measured, tolerance)
    each = {name: (1 - m.value) * gaps[name] for name, m in blocks.blocks.items()}
    assert each == pytest.approx({"heavy": tolerance, "middle": tolerance, "light": 0.01}, rel=1e-3)


def test_blocks_at_the_cap_add_nothing_and_come_down_again() -> None:
    """All at 1: what is measured is the floor of the gap, put down to everyone alike; inside c they fall."""
    blocks = BlockMultipliers(Multiplier(1.0, rate=5.0)).measured({"a": 0.3, "b": 0.1})
    assert blocks.value == 1.0
    assert blocks.attributed(0.01) == {"a": 0.01, "b": 0.01}
    assert blocks.updated(0.01, 0.02).value == pytest.approx(0.95)


def test_unmeasured_blocks_are_all_at_the_start_and_cannot_move() -> None:
    """Before the first step's measurement every weight has the start's lambda."""
    blocks = BlockMultipliers(Multiplier(0.2, rate=1.0))
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert blocks.share(names) == dict.fromkeys(names, 0.2)
    with pytest.raises(ValueError, match="must be measured"):
        blocks.updated(0.1, 0.01)
    measured = blocks.measured({"model.layers.0": 0.3, "model.layers.1": 0.1}).updated(0.1, 0.01)
    assert measured.share(names) == pytest.approx(dict(zip(names, (0.2 + 0.14, 0.2 + 0.04), strict=True)))
    assert by_weight({"model.layers.0": 0.5, "model.layers.1": 1.0}, names) == dict(zip(names, (0.5, 1.0), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"multiplier_rule": "pid"}, {"groups": "block"}, {"multiplier_rule": "pid", "groups": "block"}],
)
def test_state_round_trips_through_json(settings) -> None:
    """restored(json(asdict(m))) == m before, in and after the warm-up, and its future is the same to the last bit."""
    multiplier = initial_multiplier(ConstraintConfig(multiplier_warmup=1, multiplier_init=0.1, **settings))
    for i, gap in enumerate([math.nan, *GAPS]):
        if i == 1 and isinstance(multiplier, BlockMultipliers):
            multiplier = multiplier.measured({"model.layers.0": 0.1 / 3, "model.layers.1": 0.2 / 7})
        again = restored(json.loads(json.dumps(asdict(multiplier))))
        assert again == multiplier
        assert (
            trajectory(again.updated(gap, TOLERANCE)) == trajectory(multiplier.updated(gap, TOLERANCE)) if i else True
        )
        multiplier = multiplier.updated(gap, TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1.0), ({"form": "blend"}, 1.0), ({"form": "blend+distill", "multiplier_max": 0.5}, 0.5),
        ({"form": "blend", "multiplier_init": 0.0}, 0.0), ({"form": "distill"}, 0.0), ({"form": "advantage"}, 0.0),
        ({"groups": "block", "multiplier_rule": "pid"}, 1.0),
    ],
)  # fmt: skip
def test_blends_begin_deployed(settings, expected) -> None:
    """Where nothing is said, the blend forms begin at 1 or at their upper bound, the others at 0; and what a config's
    JSON holds is read as the same."""
    config = ConstraintConfig(**settings)
    assert initial_multiplier(config).value == expected
    assert ConstraintConfig.model_validate_json(config.model_dump_json()) == config


def test_a_bound_that_is_no_number_is_refused_by_its_name() -> None:
    """Where lambda begins depends on the bound, but the error is about the bound."""
    with pytest.raises(ValidationError, match="multiplier_max"):
        ConstraintConfig.model_validate({"form": "blend", "multiplier_max": "high"})


@pytest.mark.parametrize(("form", "expected"), [("none", 0.0), ("straight-through", 1.0), ("distill", 0.25)])
def test_what_a_run_begins_with(form, expected) -> None:
    """Without a lever 0, always at Q(W) 1, else the configured start."""
    assert initial_multiplier(ConstraintConfig(form=form, multiplier_init=0.25)).value == expected
