"""The study's means, paired differences and adjusted p-values are the textbook's."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks.evidence.statistics import Estimate, holm, mean_of_seeds, paired_difference


def test_a_mean_and_its_interval_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, t(2) at 97.5% = 4.3027, half-width 4.3027 / sqrt(3) = 2.4841."""
    found = mean_of_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds, found.p) == (2.0, 3, None)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)


def test_a_paired_difference_by_hand_and_by_scipy() -> None:
    """Differences 1, 2, 3: t = 2 sqrt(3) = 3.4641, two degrees of freedom, p = 1 - t / sqrt(t^2 + 2) = 0.0742; the same
    from scipy's paired test and its interval. The seeds' own spread, 100 points, is not in it."""
    one, other = {0: 1.0, 1: 52.0, 2: 103.0}, {0: 0.0, 1: 50.0, 2: 100.0}
    found = paired_difference(one, other)
    assert found is not None
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.p == pytest.approx(ttest_rel(list(one.values()), list(other.values())).pvalue)
    interval = ttest_1samp([1.0, 2.0, 3.0], 0.0).confidence_interval(0.95)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)
    assert (found.mean, found.seeds) == (2.0, 3)
    assert not found.excludes_zero


def test_only_seeds_that_both_have_are_compared() -> None:
    """Seeds 1 and 2 of 0..2 and 1..3; without a common one there is no difference."""
    found = paired_difference({0: 9.0, 1: 2.0, 2: 4.0}, {1: 1.0, 2: 2.0, 3: 9.0})
    assert found is not None
    assert (found.mean, found.seeds) == (1.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0, 3.0]])
def test_no_interval_where_nothing_says_how_wide(values) -> None:
    """One seed, or seeds that all agree: the number and the count, no interval, no p, and nothing excluded."""
    found = mean_of_seeds(values)
    assert found == Estimate(3.0, None, len(values))
    assert paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 1.0)) == Estimate(
        2.0, None, len(values)
    )
    assert not found.excludes_zero


def test_no_mean_of_nothing() -> None:
    """Refused, not 0."""
    with pytest.raises(ValueError, match="no seeds"):
        mean_of_seeds([])


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03 of three: 3 x 0.01, then 2 x 0.03, then the larger of that and 0.04; never above 1; in the order
    given; nothing to adjust with one."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
