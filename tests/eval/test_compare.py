"""The paired statistics, against hand-computed values and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

import eval.compare as compare
from eval.compare import paired_comparison


def test_counts_means_and_mcnemar_equal_the_hand_computed_values() -> None:
    """1 win and 9 losses in 20: difference -8/20, recovery 7/15, p = 2 (1 + 10) / 2^10."""
    baseline = [1.0] * 15 + [0.0] * 5
    candidate = [0.0] * 9 + [1.0] * 6 + [1.0] + [0.0] * 4
    found = paired_comparison(baseline, candidate, confidence=0.95)
    assert (found.n, found.wins, found.losses) == (20, 1, 9)
    assert (found.baseline_mean, found.candidate_mean) == (0.75, 0.35)
    assert found.difference == pytest.approx(-0.4, abs=1e-15)
    assert found.recovery == pytest.approx(7 / 15, abs=1e-15)
    assert found.mcnemar_p == pytest.approx(22 / 1024, abs=1e-15)


def test_the_interval_is_the_normal_one_when_there_are_many_problems() -> None:
    """20 wins, 40 losses in 400: mean -0.05, standard error sqrt((60/400 - 0.05^2) / 400) = 0.0192."""
    baseline = [0.0] * 20 + [1.0] * 40 + [1.0] * 340
    candidate = [1.0] * 20 + [0.0] * 40 + [1.0] * 340
    found = paired_comparison(baseline, candidate, confidence=0.95)
    half_width = 1.959964 * math.sqrt((60 / 400 - 0.05**2) / 400)
    assert found.difference_low == pytest.approx(-0.05 - half_width, abs=0.003)
    assert found.difference_high == pytest.approx(-0.05 + half_width, abs=0.003)
    assert found.recovery_low is not None
    assert found.recovery_high is not None
    assert found.recovery_low < 360 / 380 < found.recovery_high < 1 + half_width


def test_the_intervals_cover_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 150 simulated comparisons (true accuracies 0.6 and 0.56), the 90% intervals hold the truth in 90% +- 7%."""
    monkeypatch.setattr(compare, "RESAMPLES", 399)
    rng = np.random.default_rng(7)
    held = np.zeros(2)
    for _ in range(150):
        baseline = rng.random(160) < 0.6
        # P(1 | 1) = 0.85 and P(1 | 0) = 0.125: 0.6 x 0.85 + 0.4 x 0.125 = 0.56
        candidate = rng.random(160) < np.where(baseline, 0.85, 0.125)
        found = paired_comparison(baseline.astype(float).tolist(), candidate.astype(float).tolist(), confidence=0.9)
        assert found.recovery_low is not None
        assert found.recovery_high is not None
        held += (
            found.difference_low <= 0.56 - 0.6 <= found.difference_high,
            found.recovery_low <= 0.56 / 0.6 <= found.recovery_high,
        )
    assert (abs(held / 150 - 0.9) < 0.07).all(), held / 150


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_without_a_differing_problem_the_interval_is_what_n_can_prove(n: int) -> None:
    """The half-width is the exact (Clopper-Pearson) upper bound on a share of which none was seen in n."""
    found = paired_comparison([1.0, 0.0] * (n // 2), [1.0, 0.0] * (n // 2), confidence=0.95)
    unseen = binomtest(0, n).proportion_ci(0.95, method="exact").high
    assert (found.difference, found.recovery, found.mcnemar_p) == (0.0, 1.0, 1.0)
    assert (found.difference_low, found.difference_high) == pytest.approx((-unseen, unseen), abs=1e-12)
    assert (found.recovery_low, found.recovery_high) == pytest.approx((max(0, 1 - 2 * unseen), 1 + 2 * unseen))


def test_recovery_of_nothing_is_not_a_number_but_none() -> None:
    """With no baseline success there is no recovery; with one in 20, some resamples have none: no finite bound."""
    nothing = paired_comparison([0.0] * 20, [0.0] * 19 + [1.0], confidence=0.95)
    assert (nothing.recovery, nothing.recovery_low, nothing.recovery_high) == (None, None, None)
    assert nothing.difference == pytest.approx(0.05)
    little = paired_comparison([1.0] + [0.0] * 19, [0.0] * 18 + [1.0] * 2, confidence=0.95)
    assert little.recovery == pytest.approx(2.0)
    assert little.recovery_high is None


def test_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """9457 of 10000 against all: 0.9457 exactly, below a limit of 0.95 by the third digit."""
    monkeypatch.setattr(compare, "RESAMPLES", 99)
    found = paired_comparison([1.0] * 10000, [1.0] * 9457 + [0.0] * 543, confidence=0.95)
    assert found.recovery == 0.9457


def test_the_seed_decides_the_interval() -> None:
    """The same seed gives the same bits; another seed another Monte Carlo error, below 0.01 here."""
    baseline, candidate = [1.0, 0.0, 1.0, 1.0] * 30, [1.0, 1.0, 0.0, 1.0] * 20 + [1.0, 0.0, 1.0, 0.0] * 10
    one, same, other = (paired_comparison(baseline, candidate, confidence=0.95, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert abs(one.difference_low - other.difference_low) < 0.01


def test_unpaired_and_impossible_scores_are_refused_with_their_numbers() -> None:
    """The message names both lengths, or the score that is not one."""
    with pytest.raises(ValueError, match=r"3 baseline scores, 2 candidate scores"):
        paired_comparison([1.0, 0.0, 1.0], [1.0, 0.0], confidence=0.95)
    with pytest.raises(ValueError, match=r"at least two problems, got 1"):
        paired_comparison([1.0], [1.0], confidence=0.95)
    with pytest.raises(ValueError, match=r"candidate scores must be in \[0, 1\], got nan"):
        paired_comparison([1.0, 0.0], [1.0, math.nan], confidence=0.95)
    with pytest.raises(ValueError, match=r"baseline scores must be in \[0, 1\], got 1.5"):
        paired_comparison([1.5, 0.0], [1.0, 0.0], confidence=0.95)
