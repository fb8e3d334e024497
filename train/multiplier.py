"""The Lagrangian multiplier as a value: projected dual ascent on the measured discrepancy (arXiv 2606.08779)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Multiplier:
    """lambda, with its rule.

    Attributes:
        value: lambda, applied in the current step; dimensionless.
        rate: eta, change of lambda per unit of discrepancy above the tolerance.
        floor: lower bound of lambda.
        cap: upper bound of lambda.
    """

    value: float
    rate: float
    floor: float = 0.0
    cap: float = 1.0

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
        moved = self.value + self.rate * (discrepancy - tolerance)
        return replace(self, value=min(max(moved, self.floor), self.cap))
