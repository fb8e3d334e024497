"""The loop and nothing else: sync -> rollout -> discrepancy -> constraint -> advantage -> loss -> optimizer.

`Trainer.step` is one training step, top to bottom; everything it calls is one idea in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.target import Target
from train.advantage import group_advantages, penalized_advantages
from train.blend import blended
from train.checkpoint import LoopState
from train.config import TrainConfig
from train.correction import token_tis
from train.discrepancy import mismatch_metrics, probability_difference
from train.loss import grpo_loss
from train.multiplier import Multiplier
from train.policy import NonFiniteError, Policy
from train.records import Completion, Problem, TokenBatch
from train.rollout import RolloutEngine
from train.sync import Synced, sync
from train.tasks import Task, TaskError, render
from train.timing import Stopwatch


@dataclass(frozen=True)
class Sample:
    """One rollout as a reader sees it.

    Attributes:
        problem: what was asked.
        text: the completion, decoded.
        reward: what it earned.
        finish_reason: "stop" or "length".
    """

    problem: Problem
    text: str
    reward: float
    finish_reason: str


@dataclass(frozen=True)
class StepReport:
    """A finished step.

    Attributes:
        metrics: flat name to number, one row of metrics.jsonl.
        samples: every rollout of the step, groups contiguous.
    """

    metrics: dict[str, float | None]
    samples: tuple[Sample, ...]


def initial_state(config: TrainConfig) -> LoopState:
    """The loop's state before its first step."""
    c = config.constraint
    value = 0.0 if c.form == "none" else c.multiplier_init
    multiplier = Multiplier(value, c.multiplier_rate, c.multiplier_min, c.multiplier_max)
    return LoopState(0, multiplier, None, c.tolerance)


class Trainer:
    """RL of a BF16 policy on rollouts from its own deployment target.

    Attributes:
        state: step, multiplier, tolerance; what a checkpoint holds besides the policy.
        synced: what the engine holds.
        calibrate_every: steps between refreshes of a target's static scales, from the rollouts just made; the first
            step refreshes them too, because they began from prompts alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        policy: Policy,
        engine: RolloutEngine,
        target: Target | None,
        task: Task,
        tokenizer: Any,
        seed: int,
        state: LoopState,
        calibrate_every: int = 20,
    ) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.target = target
        self.task = task
        self.tokenizer = tokenizer
        self.seed = seed
        self.state = state
        self.calibrate_every = calibrate_every
        self.synced: Synced | None = None

    def step(self) -> StepReport:
        """One training step; `state` moves only when all of it succeeded."""
        config, k, clock = self.config, self.state.step, Stopwatch()

        weights = self.policy.weights()
        deployed = self._blended_in(weights, clock)
        synced = self._sync(weights, deployed, clock)
        with clock("rollout"):
            batch, samples = self._roll_out(k)
        self._run_at(weights, deployed, clock)
        minibatches = self._minibatches(len(samples))
        with clock("old_logprobs"):
            # the first mini-batch's own forward pass gives its old log-probs: no update lies between
            old = self.policy.all_logprobs(batch, [row for rows in minibatches[1:] for row in rows])
        with clock("advantage"):
            rewards = torch.tensor([sample.reward for sample in samples]).view(-1, config.rollout.group_size)
            groups = group_advantages(rewards, normalize_std=config.normalize_std)
            advantages = groups.view(-1, 1) * batch.mask
        stats = self._optimize(batch, minibatches, old, advantages, clock)
        with clock("constraint"):
            mismatch = mismatch_metrics(old, batch.rollout_logprobs, batch.mask)
            state = self._with_tolerance(mismatch["prob_diff_mean"])
            multiplier = state.multiplier
            if state.tolerance is not None and config.constraint.form != "none":
                multiplier = multiplier.updated(mismatch["prob_diff_mean"], state.tolerance)

        lengths = batch.mask.sum(1)
        metrics: dict[str, float | None] = {
            "step": k,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(1).mean().item(),
            "response_length": lengths.mean().item(),
            "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
            "discrepancy": mismatch["prob_diff_mean"],
            "tolerance": state.tolerance,
            "multiplier": state.multiplier.value,
            **mismatch,
            **stats,
            "lr": config.lr,
            "codes_changed": synced.changed,
            "sync_sent": synced.sent,
            "tokens": batch.response_tokens,
        }
        state = replace(state, step=k + 1, multiplier=multiplier)
        if self.target is not None and self.target.static_scales and (k == 0 or (k + 1) % self.calibrate_every == 0):
            with clock("calibrate"):
                state = replace(state, scales=self.policy.static_scales(self.target, batch.sequences))
        self.state = state
        return StepReport(metrics | clock.metrics(), samples)

    def finish(self) -> Synced:
        """Sync the final weights, so that what is exported is what the engine was last proven to hold."""
        return self._sync(self.policy.weights(), {}, Stopwatch())

    def _sync(self, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], clock: Stopwatch) -> Synced:
        """Put weights into the engine, verified."""
        self.synced = sync(
            weights, self.target, self.engine, step=self.state.step, previous=self.synced, clock=clock,
            scales=self.state.scales, deployed=deployed,
        )  # fmt: skip
        return self.synced

    def _roll_out(self, k: int) -> tuple[TokenBatch, tuple[Sample, ...]]:
        """Sample the step's completions from the engine and grade them."""
        size = self.config.rollout.group_size
        count = self.config.rollout.prompts
        problems = self.task.step_problems(k, count, self.seed)
        texts = render(problems, self.tokenizer, chat=self.config.task.chat)
        prompts = self.tokenizer(texts, add_special_tokens=False).input_ids
        seeds = [(self.seed << 40) + k * count + i for i in range(count)]
        completions = [c for group in self.engine.generate(prompts, seeds) for c in group]
        answers = self.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
        samples = tuple(
            self._graded(problems[i // size], text, completion)
            for i, (text, completion) in enumerate(zip(answers, completions, strict=True))
        )
        return TokenBatch.collate([p for p in prompts for _ in range(size)], completions), samples

    def _graded(self, problem: Problem, text: str, completion: Completion) -> Sample:
        reward = self.task.grade(problem, text)
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise TaskError(f"the reward of problem {problem.id} is {reward!r}; a reward must be a finite number")
        return Sample(problem, text, float(reward), completion.finish_reason)

    def _with_tolerance(self, discrepancy: float) -> LoopState:
        """On the first step, fix the tolerance from the discrepancy just measured, unless it was given."""
        constraint, state = self.config.constraint, self.state
        if state.first_discrepancy is not None or math.isnan(discrepancy):
            return state
        tolerance = constraint.tolerance or constraint.tolerance_ratio * discrepancy
        return replace(state, first_discrepancy=discrepancy, tolerance=tolerance)

    def _blended_in(self, weights: Mapping[str, Tensor], clock: Stopwatch) -> dict[str, Tensor]:
        """Q(W), where the trainer runs at a blend with it; else nothing."""
        if self.config.constraint.form != "blend":
            return {}
        assert self.target is not None, "the config refuses a blend without a target"
        with clock("quantize"):
            return self.target.deployed(weights)

    def _run_at(self, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], clock: Stopwatch) -> None:
        """Put forward and backward at the BF16 weights, or at their blend with the deployed ones."""
        with clock("constraint"):
            self.policy.run_at(blended(weights, deployed, self.state.multiplier.value) if deployed else weights)

    def _minibatches(self, count: int) -> list[range]:
        """The step's rows in mini-batches of whole groups."""
        size = count // self.config.minibatches
        return [range(start, start + size) for start in range(0, count, size)]

    def _optimize(
        self, batch: TokenBatch, minibatches: Sequence[range], old: Tensor, advantages: Tensor, clock: Stopwatch
    ) -> dict[str, float]:
        """One optimizer step per mini-batch, each normalized by its own global token count.

        Fills in `old` [N, T] for the rows of the first mini-batch; the others' must be there.
        """
        totals = {"loss": 0.0, "grad_norm": 0.0, "clipped": 0.0, "tokens": 0.0}
        for part, rows in enumerate(minibatches):
            if part > 0:
                weights = self.policy.weights()  # W moved, and so did Q(W)
                self._run_at(weights, self._blended_in(weights, clock), clock)
            with clock("train"):
                tokens = batch.mask[rows.start : rows.stop].sum()
                for micro in self.policy.microbatches(batch, rows):
                    logprobs = self.policy.logprobs(batch, micro)
                    if part == 0:
                        old[micro] = logprobs.detach().cpu()
                    loss, stats = self._loss(logprobs, batch, micro, old, advantages)
                    (loss / tokens).backward()
                    totals["loss"] += loss.item() / tokens.item() / len(minibatches)
                    totals["clipped"] += stats["clipped"]
                    totals["tokens"] += stats["tokens"]
                if not math.isfinite(totals["loss"]):
                    raise NonFiniteError(
                        f"loss is {totals['loss']} in step {self.state.step}; the optimizer was not stepped"
                    )
                totals["grad_norm"] = max(totals["grad_norm"], self.policy.update())
        return {
            "loss": totals["loss"],
            "grad_norm": totals["grad_norm"],
            "clip_fraction": totals["clipped"] / totals["tokens"],
        }

    def _loss(
        self, logprobs: Tensor, batch: TokenBatch, micro: Sequence[int], old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The policy loss of one micro-batch, with the constraint's penalty and the correction the config asks for."""
        config, state = self.config, self.state
        device = logprobs.device
        old, rollout, mask, advantages = (
            tensor[micro].to(device) for tensor in (old, batch.rollout_logprobs, batch.mask, advantages)
        )
        if config.constraint.form == "advantage" and state.multiplier.value > 0:
            advantages = penalized_advantages(
                advantages,
                probability_difference(old, rollout, mask),
                multiplier=state.multiplier.value,
                tolerance=state.tolerance or 0.0,  # unknown only in a first step of `full`, which does not use it
                penalty=config.constraint.penalty,
            )
        weights = token_tis(old, rollout, cap=config.correction_cap) if config.correction == "token-tis" else None
        return grpo_loss(
            logprobs, old, advantages, mask, clip_low=config.clip_low, clip_high=config.clip_high, weights=weights
        )
