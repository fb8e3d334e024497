"""The Lagrangian multiplier as a value, with the rule that moves it.

Every rule is a frozen value with `value`, the lambda of the current step, and `updated(discrepancy, tolerance)`, which
gives the next step's. The rules know nothing of levers. For all of them: lambda stays in [floor, cap]; a NaN
discrepancy moves nothing and is no step of the warm-up; in the warm-up lambda stays at its start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from train.attribution import blocks
from train.config import ConstraintConfig


@dataclass(frozen=True)
class Multiplier:
    """Projected dual ascent (arXiv 2606.08779).

    Attributes:
        value: lambda, applied in the current step; dimensionless.
        rate: eta, change of lambda per unit of discrepancy above the tolerance.
        floor: lower bound of lambda.
        cap: upper bound of lambda.
        warmup: updates that are still to leave lambda alone.
    """

    value: float
    rate: float
    floor: float = 0.0
    cap: float = 1.0
    warmup: int = 0

    def updated(self, discrepancy: float, tolerance: float) -> Multiplier:
        """lambda <- clip(lambda + eta (delta_bar - c), floor, cap), once per step, after the step has used it.

        Args:
            discrepancy: delta_bar of the step, a mean absolute probability difference.
            tolerance: c, in the same unit.

        Returns:
            The next step's multiplier; unchanged when the discrepancy is NaN (the step reports it).
        """
        if math.isnan(discrepancy):
            return self
        if self.warmup > 0:
            return replace(self, warmup=self.warmup - 1)
        moved = self.value + self.rate * (discrepancy - tolerance)
        return replace(self, value=min(max(moved, self.floor), self.cap))


@dataclass(frozen=True)
class PidMultiplier:
    """PID control of the multiplier (Stooke et al. 2020, arXiv 2007.03964, Algorithm 2).

    The integral alone is projected dual ascent; the proportional term answers at once, the derivative term damps a
    rising cost. Ours, where the paper leaves it open: the integral is projected on [floor, cap] and not only on >= 0,
    so that it does not wind up while lambda sits at its cap; it begins at lambda's start; the first measured cost has
    no derivative (the paper's previous cost begins at 0, which would kick lambda by K_D delta_bar).

    Attributes:
        value: lambda, applied in the current step; dimensionless.
        integral: I, the integral term in lambda's unit.
        proportional: K_P.
        rate: K_I.
        derivative: K_D.
        smoothing: a in [0, 1), what the averages keep of their past.
        floor: lower bound of lambda and of I.
        cap: upper bound of both.
        warmup: updates that are still to leave lambda and I alone; the average goes on.
        cost: the smoothed discrepancy; None before the first.
    """

    value: float
    integral: float
    proportional: float
    rate: float
    derivative: float
    smoothing: float = 0.0
    floor: float = 0.0
    cap: float = 1.0
    warmup: int = 0
    cost: float | None = None

    def updated(self, discrepancy: float, tolerance: float) -> PidMultiplier:
        """One step of the controller, after the step has used lambda.

        s <- a s + (1 - a) delta_bar (the first s is delta_bar); I <- clip(I + K_I (delta_bar - c), floor, cap);
        lambda <- clip(K_P (s - c) + I + K_D max(s - s_before, 0), floor, cap).

        Args:
            discrepancy: delta_bar of the step, a mean absolute probability difference.
            tolerance: c, in the same unit.

        Returns:
            The next step's multiplier; unchanged when the discrepancy is NaN (the step reports it).
        """
        if math.isnan(discrepancy):
            return self
        before = discrepancy if self.cost is None else self.cost
        cost = self.smoothing * before + (1 - self.smoothing) * discrepancy
        if self.warmup > 0:
            return replace(self, warmup=self.warmup - 1, cost=cost)
        integral = self._clipped(self.integral + self.rate * (discrepancy - tolerance))
        moved = self.proportional * (cost - tolerance) + integral + self.derivative * max(cost - before, 0.0)
        return replace(self, value=self._clipped(moved), integral=integral, cost=cost)

    def _clipped(self, value: float) -> float:
        return min(max(value, self.floor), self.cap)


Rule = Multiplier | PidMultiplier


@dataclass(frozen=True)
class BlockMultipliers:
    """One multiplier per transformer block, for the blend. Ours, not a paper's.

    Only the gap of the whole model can be measured at every step. It is put down to the blocks by what they add while
    block b runs at W_b + lambda_b (Q(W_b) - W_b), to first order: r_b = (1 - lambda_b) g_b, with g_b the gap of block b
    alone at Q(W_b) against the trainer at W, measured in the first step. Block b gets delta_b = delta_bar r_b / mean(r)
    and moves by its own rule towards the same c, so the mean of the delta_b is delta_bar and equal blocks give exactly
    the model's one multiplier. Because r_b falls as lambda_b rises, this settles where every block either adds the same
    or is free (lambda_b at its floor) and adds less: quantization is taken where it costs most. Left out: interactions
    between blocks, and drift of the g_b against each other (RL moves weights by far less than a quantization step).

    Attributes:
        start: the rule and its beginning, of each block.
        blocks: block to its multiplier; empty before the g_b are known, and then `start` is everyone's.
        gaps: block to g_b, a mean |probability difference|.
    """

    start: Rule
    blocks: Mapping[str, Rule] = field(default_factory=dict)
    gaps: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The mean lambda; exactly the bound where all blocks sit at one."""
        values = [block.value for block in self.blocks.values()] or [self.start.value]
        return min(max(fmean(values), min(values)), max(values))

    def measured(self, gaps: Mapping[str, float]) -> BlockMultipliers:
        """With every block's g_b, each block at its start."""
        return replace(self, blocks=dict.fromkeys(gaps, self.start), gaps=dict(gaps))

    def attributed(self, discrepancy: float) -> dict[str, float]:
        """delta_b of every block; delta_bar for each where none of them adds anything."""
        left = {name: (1 - block.value) * self.gaps[name] for name, block in self.blocks.items()}
        mean = fmean(left.values())
        return {name: discrepancy * (share / mean if mean > 0 else 1.0) for name, share in left.items()}

    def updated(self, discrepancy: float, tolerance: float) -> BlockMultipliers:
        """Every block's rule at its own delta_b; arguments as the rules' own."""
        if math.isnan(discrepancy):
            return self
        if not self.blocks:
            raise ValueError("the blocks' gaps must be measured before their multipliers can move")
        each = self.attributed(discrepancy)
        moved = {name: block.updated(each[name], tolerance) for name, block in self.blocks.items()}
        return replace(self, blocks=moved)

    def share(self, names: Iterable[str]) -> dict[str, float]:
        """Each quantized weight's lambda, that of its block."""
        values = values_by_block(self)
        return by_weight(values, names) if values else dict.fromkeys(names, self.start.value)


AnyMultiplier = Rule | BlockMultipliers


def values_by_block(multiplier: AnyMultiplier) -> dict[str, float]:
    """Each block's lambda; empty where there is one for the model."""
    if not isinstance(multiplier, BlockMultipliers):
        return {}
    return {name: block.value for name, block in multiplier.blocks.items()}


def by_weight(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Each quantized weight's lambda, from that of its block."""
    return {name: values[block] for block, inside in blocks(names).items() for name in inside}


def initial_multiplier(config: ConstraintConfig) -> AnyMultiplier:
    """What a run begins with. Where nothing moves it, it says the share of quantization that the trainer sees."""
    c = config
    if not c.acts:
        fixed = 1.0 if c.quantizes else 0.0
        return Multiplier(fixed, c.multiplier_rate, c.multiplier_min, c.multiplier_max)
    rule: Rule = Multiplier(
        c.multiplier_init, c.multiplier_rate, c.multiplier_min, c.multiplier_max, c.multiplier_warmup
    )
    if c.multiplier_rule == "pid":
        rule = PidMultiplier(
            c.multiplier_init, c.multiplier_init, c.pid_proportional, c.multiplier_rate, c.pid_derivative,
            c.pid_smoothing, c.multiplier_min, c.multiplier_max, c.multiplier_warmup,
        )  # fmt: skip
    return BlockMultipliers(rule) if c.groups == "block" else rule


def restored(state: Mapping[str, Any]) -> AnyMultiplier:
    """A multiplier from `dataclasses.asdict` of one, as a checkpoint's JSON holds it: the same value again."""
    if "start" in state:
        return BlockMultipliers(
            _rule(state["start"]), {name: _rule(block) for name, block in state["blocks"].items()}, state["gaps"]
        )
    return _rule(state)


def _rule(state: Mapping[str, Any]) -> Rule:
    return PidMultiplier(**state) if "integral" in state else Multiplier(**state)
