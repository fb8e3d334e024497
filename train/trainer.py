"""The loop and nothing else: sync -> rollout -> discrepancy -> constraint -> advantage -> loss -> optimizer.

`Trainer.step` is one training step, top to bottom; everything it calls is one idea in a file of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.target import Target
from train.advantage import penalized_advantages, penalized_rewards, token_advantages
from train.blend import blended
from train.checkpoint import LoopState
from train.config import TrainConfig
from train.correction import correction_weights
from train.discrepancy import mismatch_metrics, probability_difference, require_no_mismatch
from train.distill import pull
from train.loss import denominator, loss_metrics, policy_loss
from train.multiplier import BlockMultipliers, initial_multiplier, values_by_block
from train.otb import score_norms, variance_metrics
from train.overlong import overlong_punishment
from train.policy import NonFiniteError, Policy, TokenScores
from train.records import Completion, Problem, TokenBatch
from train.reference import Reference
from train.rollout import RolloutEngine
from train.sampling import Group, counted, other_problems, replace_equal
from train.schedule import lr_multiplier
from train.sign_skew import sign_skew
from train.sync import Synced, sync
from train.tasks import Task, TaskError, render
from train.timing import Stopwatch
from train.tolerance import block_gaps, first_tolerance, tolerance_floor


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
    given = config.constraint.tolerance
    return LoopState(0, initial_multiplier(config.constraint), None, given if isinstance(given, float) else None)


class Point(NamedTuple):
    """The weights of one optimizer step, name to BF16.

    Attributes:
        held: W, every name.
        deployed: Q(W), the quantized names; empty where no lever needs it.
        trained: what forward and backward run at, every name.
    """

    held: Mapping[str, Tensor]
    deployed: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]


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
        self.reference = Reference(policy) if config.loss.reference_kl > 0 else None

    def step(self) -> StepReport:
        """One training step; `state` moves only when all of it succeeded."""
        config, k, clock = self.config, self.state.step, Stopwatch()

        weights = self.policy.weights()
        deployed = self._blended_in(weights, clock)
        synced = self._sync(weights, deployed, clock)
        with clock("rollout"):
            batch, samples, drawn = self._roll_out(k)
        point = self._run_at(weights, deployed, clock)
        minibatches = self._minibatches(len(samples))
        with clock("old_logprobs"):
            # the first mini-batch's own forward pass gives its old log-probs: no update lies between
            scores = self.policy.all_scores(batch) if config.advantage == "otb" else None
            old = scores.logprobs if scores else self.policy.all_logprobs(batch, self._scored_first(minibatches))
        with clock("advantage"):
            rewards = torch.tensor([sample.reward for sample in samples]).view(-1, config.rollout.group_size)
            norms = self._score_norms(batch, scores)
            advantages = token_advantages(
                config.advantage,
                self._penalized(self._shaped(rewards, batch), old, batch),
                batch.mask,
                normalize_std=config.normalize_std,
                norms=norms,
            )
        lr = config.lr * lr_multiplier(config.schedule, k, steps=config.steps, surge=self.state.surge)
        self.policy.set_lr(lr)
        learned = counted(batch.mask, rewards) if config.sampling.dynamic else batch.mask
        stats = self._optimize(batch, minibatches, old, advantages, point, clock, learned)
        stats |= self._variance(advantages, norms, learned, stats["grad_norm"])
        with clock("constraint"):
            if config.rollout.engine == "exact":
                require_no_mismatch(old, batch.rollout_logprobs, batch.mask)
            mismatch = mismatch_metrics(old, batch.rollout_logprobs, batch.mask)
            state = self._with_tolerance(mismatch["prob_diff_mean"], batch, weights)
            multiplier = state.multiplier
            if state.tolerance is not None and config.constraint.acts:
                multiplier = multiplier.updated(mismatch["prob_diff_mean"], state.tolerance)

        lengths = batch.mask.sum(1)
        surge = self.state.surge.updated(k, lengths.mean().item(), config.schedule)
        metrics: dict[str, float | None] = {
            "step": k,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(1).mean().item(),
            "response_length": lengths.mean().item(),
            "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
            "discrepancy": mismatch["prob_diff_mean"],
            "tolerance": state.tolerance,
            "multiplier": state.multiplier.value,
            **self._constraint_details(state),
            **mismatch,
            **sign_skew(old, batch.rollout_logprobs, advantages, batch.mask),
            **stats,
            **drawn,
            "lr": lr,
            "length_surge_step": surge.step,
            "codes_changed": synced.changed,
            "sync_sent": synced.sent,
            "tokens": batch.response_tokens,
        }
        state = replace(state, step=k + 1, multiplier=multiplier, surge=surge)
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

    def _roll_out(self, k: int) -> tuple[TokenBatch, tuple[Sample, ...], dict[str, float]]:
        """Sample and grade the step's completions; with dynamic sampling, more in place of equal groups."""
        count, sampling, drawn = self.config.rollout.prompts, self.config.sampling, {}
        groups = self._sample(k, self.task.step_problems(k, count, self.seed))
        if sampling.dynamic:
            groups, drawn = replace_equal(
                groups,
                rounds=sampling.extra_rounds,
                problems=lambda extra, ids: other_problems(self.task, k, count, self.seed, extra, ids),
                sample=lambda problems, extra: self._sample(k, problems, extra),
            )
        prompts = [group.prompt for group in groups for _ in group.completions]
        batch = TokenBatch.collate(prompts, [c for group in groups for c in group.completions])
        return batch, tuple(sample for group in groups for sample in group.samples), drawn

    def _sample(self, k: int, problems: Sequence[Problem], extra: int = 0) -> list[Group]:
        """Each problem's group, sampled from the engine and graded; an extra round has seeds of its own."""
        size = self.config.rollout.group_size
        texts = render(problems, self.tokenizer, chat=self.config.task.chat)
        prompts = self.tokenizer(texts, add_special_tokens=False).input_ids
        first = (self.seed << 40) + (extra << 32) + k * self.config.rollout.prompts
        seeds = [first + i for i in range(len(problems))]
        completions = [c for group in self.engine.generate(prompts, seeds) for c in group]
        answers = self.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
        samples = tuple(
            self._graded(problems[i // size], text, completion)
            for i, (text, completion) in enumerate(zip(answers, completions, strict=True))
        )
        return [
            Group(tuple(prompt), tuple(completions[at : at + size]), samples[at : at + size])
            for prompt, at in zip(prompts, range(0, len(samples), size), strict=True)
        ]

    def _graded(self, problem: Problem, text: str, completion: Completion) -> Sample:
        reward = self.task.grade(problem, text)
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise TaskError(f"the reward of problem {problem.id} is {reward!r}; a reward must be a finite number")
        return Sample(problem, text, float(reward), completion.finish_reason)

    def _score_norms(self, batch: TokenBatch, scores: TokenScores | None) -> Tensor | None:
        """The squared score norms [N, T] of the optimal token baseline, where it is used."""
        if scores is None:
            return None
        weights = correction_weights(self.config.correction, scores.logprobs, batch.rollout_logprobs, batch.mask)
        return score_norms(scores.logprobs, scores.sum_pi_squared, batch.mask, weights)

    def _variance(
        self, advantages: Tensor, norms: Tensor | None, learned: Tensor, gradient_norm: float
    ) -> dict[str, float]:
        """The gradient's power and variance proxy, where the score norms are known."""
        if norms is None:
            return {}
        config = self.config
        return variance_metrics(
            advantages, norms, learned, gradient_norm, minibatches=config.minibatches, normalize=config.loss.normalize
        )

    def _with_tolerance(self, discrepancy: float, batch: TokenBatch, weights: Mapping[str, Tensor]) -> LoopState:
        """On the first step, fix the tolerance, unless it was given, and measure the blocks' gaps where they count.

        Args:
            discrepancy: the step's mean |probability difference|.
            batch: the step's sequences.
            weights: what they were sampled from; the masters have moved since.
        """
        constraint, state = self.config.constraint, self.state
        if state.first_discrepancy is not None or math.isnan(discrepancy):
            return state
        floor, multiplier = None, state.multiplier
        if constraint.tolerance == "auto":
            floor = tolerance_floor(self.policy, batch, weights, self._deployed(weights))
        if isinstance(multiplier, BlockMultipliers):
            multiplier = multiplier.measured(block_gaps(self.policy, batch, weights, self._deployed(weights)))
        tolerance = first_tolerance(constraint, discrepancy, floor)
        return replace(
            state, first_discrepancy=discrepancy, tolerance=tolerance, tolerance_floor=floor, multiplier=multiplier
        )

    def _constraint_details(self, state: LoopState) -> dict[str, float]:
        """What a row has beside lambda and c, where the config asks for it."""
        details = {} if state.tolerance_floor is None else {"tolerance_floor": state.tolerance_floor}
        return details | {f"multiplier/{name}": v for name, v in values_by_block(state.multiplier).items()}

    def _scored_first(self, minibatches: Sequence[range]) -> list[int]:
        """The rows whose old log-probs are needed before the first update: a penalty on the reward needs them all."""
        return [row for rows in minibatches[0 if self._penalizes("reward") else 1 :] for row in rows]

    def _penalizes(self, stage: str) -> bool:
        """Whether the advantage form subtracts anything at this stage in this step."""
        constraint = self.config.constraint
        return constraint.form == "advantage" and constraint.stage == stage and self.state.multiplier.value > 0

    def _shaped(self, rewards: Tensor, batch: TokenBatch) -> Tensor:
        """The rewards [P, G] less the overlong punishment, where there is one."""
        sampling, limit = self.config.sampling, self.config.rollout.max_tokens
        if not sampling.overlong_buffer:
            return rewards
        lengths = batch.mask.sum(1).view_as(rewards)
        return rewards + overlong_punishment(
            lengths, limit=limit, buffer=sampling.overlong_buffer, penalty=sampling.overlong_penalty
        )

    def _penalized(self, rewards: Tensor, old: Tensor, batch: TokenBatch) -> Tensor:
        """The rewards [P, G] that advantages are made of: less the constraint's penalty where it acts on them."""
        if not self._penalizes("reward"):
            return rewards
        return penalized_rewards(
            rewards,
            probability_difference(old, batch.rollout_logprobs, batch.mask),
            batch.mask,
            multiplier=self.state.multiplier.value,
            tolerance=self.state.tolerance or 0.0,  # unknown only in a first step of `full`, which does not use it
            penalty=self.config.constraint.penalty,
        )

    def _blended_in(self, weights: Mapping[str, Tensor], clock: Stopwatch) -> dict[str, Tensor]:
        """Q(W), where a lever of this step goes through the quantizer; else nothing."""
        constraint = self.config.constraint
        if not constraint.quantizes and constraint.kl_weight * self.state.multiplier.value == 0:
            return {}
        with clock("quantize"):
            return self._deployed(weights)

    def _deployed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.target is not None, "the config refuses such a constraint without a target"
        return self.target.deployed(weights)

    def _run_at(self, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], clock: Stopwatch) -> Point:
        """Put forward and backward at the BF16 weights, or at their blend with the deployed ones."""
        multiplier, trained = self.state.multiplier, weights
        with clock("constraint"):
            if self.config.constraint.quantizes:
                by_block = isinstance(multiplier, BlockMultipliers)
                share = multiplier.share(deployed) if by_block else multiplier.value
                trained = blended(weights, deployed, share)
            self.policy.run_at(trained)
        return Point(weights, deployed, trained)

    def _pull(self, batch: TokenBatch, micro: Sequence[int], tokens: Tensor, point: Point) -> float:
        """Add the straight-through KL's gradient, where the lever has one; returns its sum over these rows, nats."""
        scale = self.config.constraint.kl_weight * self.state.multiplier.value
        if scale == 0:
            return 0.0
        divergence = pull(
            self.policy, batch, micro, weights=point.held, deployed=point.deployed, scale=scale / tokens.item()
        )
        self.policy.run_at(point.trained)
        return divergence

    def _minibatches(self, count: int) -> list[range]:
        """The step's rows in mini-batches of whole groups."""
        size = count // self.config.minibatches
        return [range(start, start + size) for start in range(0, count, size)]

    def _optimize(
        self,
        batch: TokenBatch,
        minibatches: Sequence[range],
        old: Tensor,
        advantages: Tensor,
        point: Point,
        clock: Stopwatch,
        learned: Tensor,
    ) -> dict[str, float]:
        """One optimizer step per mini-batch, each normalized by its own global count of tokens or sequences.

        Fills in `old` [N, T] for the rows of the first mini-batch; the others' must be there. `learned` [N, T] is the
        mask of the tokens that count in the loss.
        """
        totals, sums = {"loss": 0.0, "grad_norm": 0.0, "kl": 0.0}, Counter[str]()
        for part, rows in enumerate(minibatches):
            if part > 0:
                weights = self.policy.weights()  # W moved, and so did Q(W)
                point = self._run_at(weights, self._blended_in(weights, clock), clock)
            with clock("train"):
                tokens = batch.mask[rows.start : rows.stop].sum()
                total = denominator(learned[rows.start : rows.stop], self.config.loss.normalize)
                for micro in self.policy.microbatches(batch, rows):
                    logprobs = self.policy.logprobs(batch, micro)
                    if part == 0:
                        old[micro] = logprobs.detach().cpu()
                    loss, stats = self._loss(logprobs, batch, micro, old, advantages, learned)
                    (loss / total).backward()
                    totals["kl"] += self._pull(batch, micro, tokens, point)
                    totals["loss"] += loss.item() / total.item() / len(minibatches)
                    sums.update(stats)
                if not math.isfinite(totals["loss"]):
                    raise NonFiniteError(
                        f"loss is {totals['loss']} in step {self.state.step}; the optimizer was not stepped"
                    )
                totals["grad_norm"] = max(totals["grad_norm"], self.policy.update())
        return {
            "loss": totals["loss"],
            "grad_norm": totals["grad_norm"],
            **loss_metrics(sums),
            **({"distill_kl": totals["kl"] / batch.response_tokens} if self.config.constraint.kl_weight else {}),
        }

    def _loss(
        self,
        logprobs: Tensor,
        batch: TokenBatch,
        micro: Sequence[int],
        old: Tensor,
        advantages: Tensor,
        learned: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The policy loss of one micro-batch, with the constraint's penalty and the correction the config asks for."""
        config, state = self.config, self.state
        device = logprobs.device
        old, rollout, mask, advantages = (
            tensor[micro].to(device) for tensor in (old, batch.rollout_logprobs, learned, advantages)
        )
        if self._penalizes("advantage"):
            advantages = penalized_advantages(
                advantages,
                probability_difference(old, rollout, mask),
                multiplier=state.multiplier.value,
                tolerance=state.tolerance or 0.0,  # unknown only in a first step of `full`, which does not use it
                penalty=config.constraint.penalty,
            )
        return policy_loss(
            config.loss,
            config.correction,
            logprobs=logprobs,
            old=old,
            rollout=rollout,
            advantages=advantages,
            mask=mask,
            reference=self.reference.logprobs(self.policy, batch, micro) if self.reference else None,
        )
