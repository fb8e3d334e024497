"""The multiplier against its closed-form trajectory."""

import math
from dataclasses import asdict

import pytest

from train.multiplier import Multiplier


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


def test_nan_leaves_it_alone() -> None:
    """A NaN measurement moves nothing."""
    multiplier = Multiplier(0.3, rate=1.0)
    assert multiplier.updated(math.nan, 0.01) is multiplier


def test_state_round_trips() -> None:
    """Multiplier(**asdict(m)) == m: a checkpoint restores it exactly."""
    multiplier = Multiplier(0.1, 5.0).updated(0.123456789, 0.01)
    assert Multiplier(**asdict(multiplier)) == multiplier
