"""Learning-rate schedules: pure functions from the step to a multiplier of the learning rate.

k is the step's index from 0; warm-up is linear, the same for every schedule, and reaches 1 in its last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from train.config import ScheduleConfig


def warmup(k: int, steps: int) -> float:
    """min(1, (k + 1) / steps): the first step already learns; 1 without warm-up."""
    return min(1.0, (k + 1) / steps) if steps else 1.0


def linear(k: int, *, start: int, end: int, final: float) -> float:
    """From 1 at step `start` straight to `final` at step `end`, the first that is not run."""
    return 1 - (1 - final) * _progress(k, start, end)


def cosine(k: int, *, start: int, end: int, final: float) -> float:
    """From 1 at step `start` along half a cosine to `final` at step `end`, the first that is not run.

    Source: arXiv 1608.03983, without restarts.
    """
    return final + (1 - final) * (1 + math.cos(math.pi * _progress(k, start, end))) / 2


def length_triggered(k: int, *, surge: int | None, start: int, period_ratio: float, floor: float) -> float:
    """1 until response lengths surge at step t_s, then max(floor, 2^-floor((k - start) / (period_ratio t_s))).

    Source: arXiv 2602.01826; there floor is 0.1 and period_ratio 1.8.

    Args:
        k: the step, from 0.
        surge: t_s >= 1; None before it was seen.
        start: warm-up steps.
        period_ratio: the decay period as a multiple of t_s.
        floor: the lowest multiplier.
    """
    if surge is None:
        return 1.0
    return max(floor, 2.0 ** -max(0, math.floor((k - start) / (period_ratio * surge))))


def _progress(k: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` lies behind step k, in [0, 1]."""
    return min(max((k - start) / (end - start), 0.0), 1.0)


@dataclass(frozen=True)
class LengthSurge:
    """A one-shot detector of the step at which responses become much longer than they first were.

    The rule of arXiv 2602.01826 is not published; the default, three times the mean of the first 50 steps, is in use
    elsewhere.

    Attributes:
        baseline_steps: steps that went into the baseline so far.
        baseline_sum: sum of their mean response lengths, tokens.
        step: t_s, the first step with a surge; None before it.
    """

    baseline_steps: int = 0
    baseline_sum: float = 0.0
    step: int | None = None

    def updated(self, k: int, length: float, config: ScheduleConfig) -> LengthSurge:
        """After step k: its length is a part of the baseline; later a surge, if over surge_ratio times the baseline.

        Args:
            k: the step, from 0.
            length: its mean response length, tokens.
            config: `[train.schedule]`.
        """
        if self.baseline_steps < config.surge_baseline_steps:
            return replace(self, baseline_steps=self.baseline_steps + 1, baseline_sum=self.baseline_sum + length)
        if self.step is None and length > config.surge_ratio * self.baseline_sum / self.baseline_steps:
            return replace(self, step=k)
        return self


def lr_multiplier(config: ScheduleConfig, k: int, *, steps: int, surge: LengthSurge) -> float:
    """The multiplier of the learning rate that the config's schedule gives to step k.

    Args:
        config: `[train.schedule]`.
        k: the step, from 0.
        steps: steps of the whole run.
        surge: what the detector saw before step k.

    Returns:
        In [0, 1]; exactly 1 for the constant schedule without warm-up.
    """
    start = config.warmup_steps
    if config.kind == "linear":
        after = linear(k, start=start, end=steps, final=config.final)
    elif config.kind == "cosine":
        after = cosine(k, start=start, end=steps, final=config.final)
    elif config.kind == "length-triggered":
        after = length_triggered(
            k, surge=surge.step, start=start, period_ratio=config.decay_period_ratio, floor=config.floor
        )
    else:
        after = 1.0
    return warmup(k, start) * after
