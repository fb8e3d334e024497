"""The loop and nothing else: sync -> rollout -> discrepancy -> constraint -> advantage -> loss -> optimizer.

`Trainer.step` is one training step, top to bottom; everything it calls is one idea in a file of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quant.target import Target
from train.advantage import countable, mean_group_std, token_advantages
from train.ahead import Rollouts, staleness
from train.checkpoint import LoopState
from train.config import TrainConfig
from train.constraint import Constraint, Point
from train.correction import correction_weights
from train.critic import Critic
from train.discrepancy import mismatch_metrics, require_no_mismatch
from train.experience import Experience, Sampler
from train.loss import denominator, loss_metrics, policy_loss
from train.multiplier import initial_multiplier
from train.nonfinite import evidence
from train.otb import score_norms, variance_metrics
from train.overlong import overlong_punishment
from train.policy import NonFiniteError, Policy, TokenScores, TokenStates
from train.records import Sample, TokenBatch
from train.reference import Reference
from train.rollout import RolloutEngine
from train.sampling import counted
from train.schedule import lr_multiplier
from train.shards import gathered
from train.sign_skew import sign_skew
from train.sync import Synced, held_before, sync
from train.tasks import Task
from train.timing import Stopwatch


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


class Trainer:
    """RL of a BF16 policy on rollouts from its own deployment target.

    Attributes:
        world: the ranks; every one makes each step with the others, see `train.distributed`.
        state: step, multiplier, tolerance; what a checkpoint holds besides the policy.
        engine: what samples, on the first rank alone.
        synced: what the engine holds.
        calibrate_every: steps between refreshes of a target's static scales, from the rollouts just made; the first
            step refreshes them too, because they began from prompts alone.
        faults: where a step that is not finite leaves what it was about; None leaves nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        policy: Policy,
        engine: RolloutEngine | None,
        target: Target | None,
        task: Task,
        tokenizer: Any,
        seed: int,
        state: LoopState,
        calibrate_every: int = 20,
        faults: Path | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.world = policy.world
        self.engine = engine
        self.target = target
        assert (engine is not None) == self.world.first, "the first rank samples for all"
        self.sampler = Sampler(config, engine, task, tokenizer, seed) if engine else None
        self.rollouts = Rollouts(self.sampler, ahead=config.rollout.ahead, steps=config.steps) if self.sampler else None
        keeps_start = config.constraint.keeps_start
        start = Reference(policy) if keeps_start or config.loss.reference_kl > 0 else None
        self.reference = start if config.loss.reference_kl > 0 else None
        self.constraint = Constraint(
            config.constraint, policy, target, start.weights if start and keeps_start else None
        )
        self.state = state
        self.calibrate_every = calibrate_every
        self.faults = faults
        self.synced: Synced | None = None
        self.sampled_at: Mapping[str, Tensor] | None = None  # ahead: what the step before trained at
        if engine and self.rollouts and state.held:
            self.synced = held_before(engine, state.held, step=state.step - 1)
            self.rollouts.start(state.step)
        self.critic: Critic | None = None
        if config.critic is not None:
            width = policy.module.config.hidden_size
            self.critic = Critic(width, config.critic, seed=seed, device=policy.device, tensors=state.critic)

    def step(self) -> StepReport:
        """One training step; `state` moves only when all of it succeeded."""
        config, k, clock = self.config, self.state.step, Stopwatch()

        weights = self.policy.weights()
        with clock("quantize"):
            deployed = self.constraint.deployed(weights, self.state)
        with clock("rollout"):
            if self.rollouts:
                self.rollouts.wait()
        synced = self._sync(weights, deployed, clock)
        with clock("rollout"):
            (batch, samples, rewards, graded, drawn, _), lag = self.world.shared(lambda: self._experience(k))
        before = self._sampling_logprobs(batch, clock)
        with clock("constraint"):
            point = self.constraint.run_at(weights, deployed, self.state)
        minibatches = self._minibatches(len(samples))
        with evidence(self.faults, self.state, batch, rewards) as found:
            with clock("old_logprobs"):
                # the first mini-batch's own forward pass gives its old log-probs: no update lies between
                scores = self._scores(batch)
                old = scores.logprobs if scores else self.policy.all_logprobs(batch, self._scored_first(minibatches))
            with clock("advantage"):
                norms = self._score_norms(batch, scores)
                credited = self.constraint.penalized_rewards(self._shaped(rewards, batch), old, batch, self.state)
                learned = countable(batch.mask, graded)
                advantages, judged = self._advantages(credited, batch, learned, scores, norms)
                found |= {"old_logprobs": old, "advantages": advantages}
            lr = config.lr * lr_multiplier(config.schedule, k, steps=config.steps, surge=self.state.surge)
            self.policy.set_lr(lr)
            if config.sampling.dynamic:
                learned = counted(learned, rewards)
            norm, stats = self._optimize(batch, minibatches * config.epochs, old, advantages, point, clock, learned)
        stats |= self._variance(advantages, norms, learned, norm)
        with clock("constraint"):
            if config.rollout.engine == "exact":
                require_no_mismatch(old, batch.rollout_logprobs, batch.mask)
            mismatch = mismatch_metrics(old, batch.rollout_logprobs, batch.mask)
            state = self.constraint.measured(self.state, mismatch["prob_diff_mean"], batch, weights)
            following = self.constraint.updated(state, mismatch["prob_diff_mean"])

        lengths = batch.mask.sum(1)
        surge = self.state.surge.updated(k, lengths.mean().item(), config.schedule)
        metrics: dict[str, float | None] = {
            "step": k,
            "reward": rewards[graded].mean().item(),
            "reward_std": mean_group_std(rewards, graded),
            "response_length": lengths.mean().item(),
            "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
            "discrepancy": mismatch["prob_diff_mean"],
            **self.constraint.metrics(state),
            **mismatch,
            **sign_skew(old, batch.rollout_logprobs, advantages, batch.mask),
            **stats,
            **judged,
            **drawn,
            **self._staleness(old, before, batch, point),
            "lr": lr,
            "length_surge_step": surge.step,
            "codes_changed": synced.changed,
            "sync_sent": synced.sent,
            "rollout_version_lag": lag,
            "tokens": batch.response_tokens,
        }
        critic = self.critic.tensors() if self.critic else {}
        state = replace(following, step=k + 1, surge=surge, critic=critic, held=synced.tensors)
        if self.target is not None and self.target.static_scales and (k == 0 or (k + 1) % self.calibrate_every == 0):
            with clock("calibrate"):
                state = replace(state, scales=self.policy.static_scales(self.target, batch.sequences))
        self.state = state
        return StepReport(metrics | clock.metrics(), samples)

    def finish(self) -> Synced:
        """Sync the final weights, so that what is exported is what the engine was last proven to hold."""
        return self._sync(self.policy.weights(), {}, Stopwatch())

    def _experience(self, step: int) -> tuple[Experience, int]:
        """The step's, and how many syncs ago its weights were the engine's."""
        assert self.rollouts is not None, "asked of the first rank alone"
        assert self.engine is not None
        experience = self.rollouts.take(step)
        return experience, self.engine.version - experience.version

    def _sync(self, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], clock: Stopwatch) -> Synced:
        """Put weights into the engine, verified; a rank without one hands over its share."""
        whole = gathered(weights, self.world, self.policy.device)
        if self.engine is None:
            return Synced(self.state.step, {}, 0.0, None)
        self.synced = sync(
            whole, self.target, self.engine, step=self.state.step, previous=self.synced, clock=clock,
            scales=self.state.scales, deployed=deployed if whole is weights else None,
        )  # fmt: skip
        return self.synced

    def _sampling_logprobs(self, batch: TokenBatch, clock: Stopwatch) -> Tensor | None:
        """The trainer's log-probs [N, T] at its weights of the step before, where these sampled the batch."""
        if self.sampled_at is None:
            return None
        with clock("staleness"):
            self.policy.run_at(self.sampled_at)
            return self.policy.all_logprobs(batch)

    def _staleness(
        self, old: Tensor, before: Tensor | None, batch: TokenBatch, point: Point
    ) -> dict[str, float | None]:
        """The part of the gap that sampling ahead makes; None where the sampling weights are not known any more."""
        if not self.config.rollout.ahead:
            return {}
        self.sampled_at = point.trained
        return {"staleness_prob_diff": None if before is None else staleness(old, before, batch.mask)}

    def _scores(self, batch: TokenBatch) -> TokenScores | TokenStates | None:
        """What an advantage needs besides rewards, with every row's old log-probs; None where it needs no more."""
        if self.critic is not None:
            return self.policy.all_states(batch)
        return self.policy.all_scores(batch) if self.config.advantage == "otb" else None

    def _advantages(
        self,
        rewards: Tensor,
        batch: TokenBatch,
        mask: Tensor,
        scores: TokenScores | TokenStates | None,
        norms: Tensor | None,
    ) -> tuple[Tensor, dict[str, float | None]]:
        """The tokens' advantages [N, T] from rewards [P, G]; with a critic, which learns from them, its metrics.

        `mask` [N, T] is the batch's without what could not be graded.
        """
        estimator = self.config.advantage
        if estimator != "gae":
            normalize_std = self.config.normalize_std
            return token_advantages(estimator, rewards, mask, normalize_std=normalize_std, norms=norms), {}
        assert self.critic is not None, "the config gives 'gae' a critic"
        assert isinstance(scores, TokenStates), "the critic reads the policy's states"
        if not mask.any():  # nothing to judge or to learn from
            return mask.clone(), {}
        return self.critic.step(scores.states[mask[batch.mask.bool()].bool()], rewards.flatten(), mask)

    def _score_norms(self, batch: TokenBatch, scores: TokenScores | TokenStates | None) -> Tensor | None:
        """The squared score norms [N, T] of the optimal token baseline, where it is used."""
        if not isinstance(scores, TokenScores):
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

    def _scored_first(self, minibatches: Sequence[range]) -> list[int]:
        """The rows whose old log-probs are needed before the first update: a penalty on the reward needs them all."""
        first = 0 if self.constraint.penalizes("reward", self.state) else 1
        return [row for rows in minibatches[first:] for row in rows]

    def _shaped(self, rewards: Tensor, batch: TokenBatch) -> Tensor:
        """The rewards [P, G] less the overlong punishment, where there is one."""
        sampling, limit = self.config.sampling, self.config.rollout.max_tokens
        if not sampling.overlong_buffer:
            return rewards
        lengths = batch.mask.sum(1).view_as(rewards)
        return rewards + overlong_punishment(
            lengths, limit=limit, buffer=sampling.overlong_buffer, penalty=sampling.overlong_penalty
        )

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
    ) -> tuple[float, dict[str, float | None]]:
        """One optimizer step per mini-batch, each normalized by its own global count of tokens or sequences.

        The mini-batches of every epoch in turn; a later epoch's old log-probs are those of before the first update.

        Every rank sums over its own micro-batches; what is decided on or returned is the sum over the ranks. Fills in
        `old` [N, T] for the rows of the first mini-batch; the others' must be there. `learned` [N, T] is the mask of
        the tokens that count in the loss.

        Returns:
            The largest gradient norm before clipping, and the metrics.
        """
        totals, sums, norm = {"loss": 0.0, "kl": 0.0}, Counter[str](), 0.0
        overall = totals
        for part, rows in enumerate(minibatches):
            if part > 0:
                weights = self.policy.weights()  # W moved, and so did Q(W)
                with clock("quantize"):
                    deployed = self.constraint.deployed(weights, self.state)
                with clock("constraint"):
                    point = self.constraint.run_at(weights, deployed, self.state)
            with clock("train"):
                span = slice(rows.start, rows.stop)
                tokens = batch.mask[span].sum()
                total = denominator(learned[span], self.config.loss.normalize)
                if part == 0:
                    old[span] = 0.0  # each rank fills in its own rows
                for micro in self.policy.microbatches(batch, rows):
                    logprobs = self.policy.logprobs(batch, micro)
                    if part == 0:
                        old[micro] = logprobs.detach().cpu()
                    loss, stats = self._loss(logprobs, batch, micro, old, advantages, learned)
                    (loss / total).backward()
                    totals["kl"] += self.constraint.pull(batch, micro, tokens, point, self.state)
                    totals["loss"] += loss.item() / total.item() / len(minibatches)
                    sums.update(stats)
                if part == 0:
                    old[span] = self.world.sum_(old[span].clone())
                overall = self.world.summed(totals)
                if not math.isfinite(overall["loss"]):
                    raise NonFiniteError(
                        f"loss is {overall['loss']} in step {self.state.step}; the optimizer was not stepped"
                    )
                norm = max(norm, self.policy.update())
        pulling = self.constraint.pull_weight(self.state) > 0
        pulled = overall["kl"] / batch.response_tokens / self.config.epochs if pulling else None
        return norm, {
            "loss": overall["loss"],
            "grad_norm": norm,
            **loss_metrics(self.world.summed(sums)),
            **({"distill_kl": pulled} if self.config.constraint.kl_weight else {}),
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
        config, device = self.config, logprobs.device
        old, rollout, mask, advantages = (
            tensor[micro].to(device) for tensor in (old, batch.rollout_logprobs, learned, advantages)
        )
        return policy_loss(
            config.loss,
            config.correction,
            logprobs=logprobs,
            old=old,
            rollout=rollout,
            advantages=self.constraint.penalized_advantages(advantages, old, rollout, mask, self.state),
            mask=mask,
            reference=self.reference.logprobs(self.policy, batch, micro) if self.reference else None,
        )
