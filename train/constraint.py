"""The constraint at work in a step: what the multiplier moves, whichever lever the config names.

The levers' maths is in advantage.py (a penalty), blend.py (the weights that the trainer runs at) and distill.py (a
pull through the quantizer); the multiplier's in multiplier.py. This decides which of them act, and when Q(W) is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from quant.target import Target
from train import shards
from train.advantage import penalized_advantages, penalized_rewards
from train.blend import blended
from train.checkpoint import LoopState
from train.config import ConstraintConfig
from train.discrepancy import probability_difference
from train.distill import pull
from train.multiplier import BlockMultipliers, values_by_block
from train.policy import Policy
from train.records import TokenBatch
from train.tolerance import block_gaps, first_tolerance, tolerance_floor, unblended_gap

Stage = Literal["advantage", "reward"]


class Point(NamedTuple):
    """The weights of one optimizer step, name to BF16; in shards over several ranks.

    Attributes:
        held: W, every name.
        deployed: Q(W), the quantized names; empty where no lever needs it.
        trained: what forward and backward run at, every name.
    """

    held: Mapping[str, Tensor]
    deployed: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]


@dataclass(frozen=True)
class Constraint:
    """The lever of one run; stateless: lambda and c come with the loop's state.

    Attributes:
        config: the constraint's table.
        policy: what is trained.
        target: the deployment target; None where rollouts are BF16, where no form but `none` is allowed.
        start: name to BF16 weight that training began with, where the KL pulls towards these; else None.
    """

    config: ConstraintConfig
    policy: Policy
    target: Target | None
    start: Mapping[str, Tensor] | None = None

    def penalizes(self, stage: Stage, state: LoopState) -> bool:
        """Whether the advantage form subtracts anything at this stage in this step."""
        return self.config.form == "advantage" and self.config.stage == stage and state.multiplier.value > 0

    def penalized_rewards(self, rewards: Tensor, old: Tensor, batch: TokenBatch, state: LoopState) -> Tensor:
        """The rewards [P, G] that advantages are made of: less the penalty, where it acts on them.

        Args:
            rewards: [P, G].
            old: [N, T] p_t, nats; every row of it, where a penalty acts here.
            batch: the step's sequences.
            state: the multiplier and the tolerance.
        """
        if not self.penalizes("reward", state):
            return rewards
        return penalized_rewards(
            rewards,
            probability_difference(old, batch.rollout_logprobs, batch.mask),
            batch.mask,
            multiplier=state.multiplier.value,
            tolerance=state.tolerance or 0.0,  # unknown only in a first step of `full`, which does not use it
            penalty=self.config.penalty,
        )

    def penalized_advantages(
        self, advantages: Tensor, old: Tensor, rollout: Tensor, mask: Tensor, state: LoopState
    ) -> Tensor:
        """The advantages less the penalty, where it acts on them; all tensors [n, T], log-probs in nats."""
        if not self.penalizes("advantage", state):
            return advantages
        return penalized_advantages(
            advantages,
            probability_difference(old, rollout, mask),
            multiplier=state.multiplier.value,
            tolerance=state.tolerance or 0.0,  # unknown only in a first step of `full`, which does not use it
            penalty=self.config.penalty,
        )

    def deployed(self, weights: Mapping[str, Tensor], state: LoopState) -> dict[str, Tensor]:
        """Q(W), where a lever of this step goes through the quantizer; else nothing."""
        if not self.config.quantizes and self.pull_weight(state) == 0:
            return {}
        return self._deployed(weights)

    def run_at(self, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], state: LoopState) -> Point:
        """Put forward and backward at the BF16 weights, or at their blend with the deployed ones."""
        multiplier, trained = state.multiplier, weights
        if self.config.quantizes:
            by_block = isinstance(multiplier, BlockMultipliers)
            trained = blended(weights, deployed, multiplier.share(deployed) if by_block else multiplier.value)
        self.policy.run_at(trained)
        return Point(weights, deployed, trained)

    def pull_weight(self, state: LoopState) -> float:
        """What the straight-through KL of a step is multiplied by; 0 in a step without it."""
        if state.step % self.config.distill_every:
            return 0.0
        half_life = self.config.distill_half_life
        left = 1.0 if half_life is None else 0.5 ** (state.step / half_life)
        return left * self.config.kl_weight * state.multiplier.value

    def pull(self, batch: TokenBatch, micro: Sequence[int], tokens: Tensor, point: Point, state: LoopState) -> float:
        """Add the straight-through KL's gradient, where the lever has one.

        Args:
            batch: the step's sequences.
            micro: a micro-batch's rows.
            tokens: how many the whole optimizer step has.
            point: the weights of this optimizer step.
            state: the multiplier.

        Returns:
            The rows' sum of KL, nats.
        """
        scale = self.pull_weight(state)
        if scale == 0:
            return 0.0
        divergence = pull(
            self.policy, batch, micro, teacher=self.start or point.held, weights=point.held, deployed=point.deployed,
            scale=scale / tokens.item(),
        )  # fmt: skip
        self.policy.run_at(point.trained)
        return divergence

    def measured(
        self, state: LoopState, discrepancy: float, batch: TokenBatch, weights: Mapping[str, Tensor]
    ) -> LoopState:
        """On the first step, fix the tolerance, unless it was given, and measure the blocks' gaps where they count.

        Args:
            state: of the step.
            discrepancy: the step's mean |probability difference|.
            batch: the step's sequences.
            weights: what they were sampled from; the masters have moved since.
        """
        if state.first_discrepancy is not None or math.isnan(discrepancy):
            return state
        floor, multiplier = None, state.multiplier
        if self.config.tolerance == "auto" and self.target is not None:
            floor = tolerance_floor(self.policy, batch, weights, self._deployed(weights))
        if isinstance(multiplier, BlockMultipliers):
            multiplier = multiplier.measured(block_gaps(self.policy, batch, weights, self._deployed(weights)))
        at_blend = self.config.quantizes and self.config.acts and multiplier.value > 0
        gap = unblended_gap(self.policy, batch, weights) if at_blend else discrepancy
        tolerance = first_tolerance(self.config, gap, floor)
        return replace(
            state, first_discrepancy=discrepancy, tolerance=tolerance, tolerance_floor=floor, multiplier=multiplier
        )

    def updated(self, state: LoopState, discrepancy: float) -> LoopState:
        """The state with the next step's multiplier, where one moves a lever."""
        if state.tolerance is None or not self.config.acts:
            return state
        return replace(state, multiplier=state.multiplier.updated(discrepancy, state.tolerance))

    def metrics(self, state: LoopState) -> dict[str, float | None]:
        """lambda and c of a step, and what the config asks for beside them."""
        floor = {} if state.tolerance_floor is None else {"tolerance_floor": state.tolerance_floor}
        blocks = {f"multiplier/{name}": value for name, value in values_by_block(state.multiplier).items()}
        return {"tolerance": state.tolerance, "multiplier": state.multiplier.value, **floor, **blocks}

    def _deployed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.target is not None, "the config refuses such a constraint without a target"
        return shards.deployed(self.target, weights)
