"""Paired comparison of two models on the same problems: how much did the candidate lose or gain?

Pure numbers in, numbers out, and no rounding: the caller compares, then formats. The bootstrap is the percentile one
(Efron & Tibshirani 1993, ch. 13), which needs no special case for ties; left out are unpaired tests, which throw away
what makes the comparison sharp, and corrections for several comparisons, because there is one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 9999


@dataclass(frozen=True)
class PairedComparison:
    """Candidate against baseline over n problems; scores and their differences are shares in [0, 1], unrounded.

    Attributes:
        n: problems.
        baseline_mean: accuracy of the baseline.
        candidate_mean: accuracy of the candidate.
        difference: candidate_mean - baseline_mean.
        difference_low, difference_high: its confidence interval.
        recovery: candidate_mean / baseline_mean; None when the baseline has no success.
        recovery_low, recovery_high: its confidence interval; None where it has no finite bound.
        wins: problems on which the candidate scored higher.
        losses: problems on which it scored lower.
        mcnemar_p: exact two-sided p-value of "wins and losses are equally likely" (McNemar 1947); 1 without either.
    """

    n: int
    baseline_mean: float
    candidate_mean: float
    difference: float
    difference_low: float
    difference_high: float
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    wins: int
    losses: int
    mcnemar_p: float


def paired_comparison(
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float, seed: int = 0
) -> PairedComparison:
    """Compare scores problem by problem: d_i = candidate_i - baseline_i, resampled together.

    When all d_i are the same, no resample can differ and a bootstrap interval would have no width, as if few problems
    proved as much as many. Then the interval comes from the exact bound on what was never seen: with probability
    `confidence`, a share of at most b = 1 - ((1 - confidence) / 2)^(1/n) of the population has another d (Clopper &
    Pearson 1934), anywhere in [-1, 1]; so the mean difference lies in (1 - b) d -+ b.

    Args:
        baseline: (n,) scores in [0, 1].
        candidate: (n,) scores in [0, 1] of the same problems in the same order.
        confidence: of the intervals, such as 0.95.
        seed: of the resampling.

    Raises:
        ValueError: lengths differ, fewer than two problems, or a score outside [0, 1].
    """
    import numpy as np
    from scipy.stats import DegenerateDataWarning, binomtest, bootstrap

    if len(baseline) != len(candidate):
        raise ValueError(f"not paired: {len(baseline)} baseline scores, {len(candidate)} candidate scores")
    if len(baseline) < 2:
        raise ValueError(f"a comparison needs at least two problems, got {len(baseline)}")
    base, cand = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    for name, scores in (("baseline", base), ("candidate", cand)):
        if not ((scores >= 0) & (scores <= 1)).all():  # NaN fails too
            raise ValueError(f"{name} scores must be in [0, 1], got {scores[~((scores >= 0) & (scores <= 1))][0]}")

    n, delta = len(base), cand - base
    wins, losses = int((delta > 0).sum()), int((delta < 0).sum())
    base_mean, cand_mean, difference = float(base.mean()), float(cand.mean()), float(delta.mean())

    def interval(statistic: Callable[..., Any]) -> tuple[float, float]:
        with warnings.catch_warnings():
            # a ratio without a finite bound is reported as None
            warnings.simplefilter("ignore", DegenerateDataWarning)
            found = bootstrap(
                (base, cand), statistic, paired=True, vectorized=True, method="percentile", batch=500,
                n_resamples=RESAMPLES, confidence_level=confidence, rng=np.random.default_rng(seed),
            )  # fmt: skip
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    def mean_ratio(base: Any, cand: Any, axis: int) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a baseline success
            return cand.mean(axis) / base.mean(axis)

    constant = bool((delta == delta[0]).all())
    if constant:
        unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
        low = max((1 - unseen) * difference - unseen, -1.0)
        high = min((1 - unseen) * difference + unseen, 1.0)
    else:
        low, high = interval(lambda base, cand, axis: (cand - base).mean(axis))

    recovery = recovery_low = recovery_high = None
    if base_mean > 0:
        recovery = cand_mean / base_mean
        if constant:  # as far as the difference may move at this baseline
            bounds = (max(base_mean + low, 0.0) / base_mean, (base_mean + high) / base_mean)
        else:
            bounds = interval(mean_ratio)
        recovery_low, recovery_high = (bound if math.isfinite(bound) else None for bound in bounds)

    return PairedComparison(
        n=n,
        baseline_mean=base_mean,
        candidate_mean=cand_mean,
        difference=difference,
        difference_low=low,
        difference_high=high,
        recovery=recovery,
        recovery_low=recovery_low,
        recovery_high=recovery_high,
        wins=wins,
        losses=losses,
        mcnemar_p=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )
