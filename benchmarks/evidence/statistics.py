"""What a table says of a few seeds: means, paired differences, p-values adjusted for how many there are.

The unit is the seed: another start model, other training batches, other held-out problems (`train.tasks.load_task`
shuffles by the seed before it splits). So the spread over seeds already has the problems' own chance in it, and an
interval with seeds and problems both random would count it twice; there is none here. All intervals are 95%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: in the unit of what was averaged.
        half_width: of its 95% interval, same unit; None with fewer than two seeds, or where all seeds agree to the
            last bit: then nothing says how far another would be.
        seeds: how many.
        p: of "the mean is 0", two-sided; only of differences, and None where `half_width` is.
    """

    mean: float
    half_width: float | None
    seeds: int
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does; never where there is none."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def mean_of_seeds(values: Sequence[float]) -> Estimate:
    """mean -+ t(n - 1) s / sqrt(n), Student's interval (scipy.stats.t and sem).

    Args:
        values: (n,) one number per seed, n at least 1.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean over no seeds")
    return Estimate(fmean(values), _half_width(values), len(values))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """one - other over the seeds that both have: d_i = one_i - other_i, mean -+ t(n - 1) s_d / sqrt(n), and the p-value
    of the paired t-test (scipy.stats.ttest_rel). Arms share a seed's start model and held-out problems, so the
    differences vary less than the arms do.

    Args:
        one, other: seed to number, in one unit.

    Returns:
        The estimate of the mean difference; None without a common seed.
    """
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    deltas = [one[seed] - other[seed] for seed in common]
    half_width = _half_width(deltas)
    if half_width is None:
        return Estimate(fmean(deltas), None, len(deltas))
    from scipy.stats import ttest_rel

    p = float(ttest_rel([one[seed] for seed in common], [other[seed] for seed in common]).pvalue)
    return Estimate(fmean(deltas), half_width, len(deltas), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979, 65-70): with the k p-values in rising
    order, adjusted p_(i) = max over j <= i of min(1, (k - j + 1) p_(j)). It bounds the chance of even one false
    claim among the k, however they depend on each other; here they do, because they share an arm.

    Args:
        p_values: (k,) in any order.

    Returns:
        (k,) adjusted, in the order given.
    """
    k, highest = len(p_values), 0.0
    adjusted = [0.0] * k
    for rank, index in enumerate(sorted(range(k), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (k - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-15):
        return None
    from scipy.stats import sem, t

    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))
