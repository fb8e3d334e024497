"""A step's experience: problems drawn, completions sampled from the deployed engine, rewards given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.config import TrainConfig
from train.grading import Grade, failure_metrics, failures_allowed
from train.records import Problem, Sample, TokenBatch
from train.rollout import RolloutEngine
from train.sampling import Group, other_problems, replace_equal
from train.tasks import Task, render


class Experience(NamedTuple):
    """What a step learns from.

    Attributes:
        batch: N = P * G sequences, a prompt's group contiguous.
        samples: the same, decoded and graded.
        rewards: [P, G] float32; 0 for a sample that could not be graded, which must not be read.
        graded: [P, G] bool, whether there is a reward.
        metrics: of the grading ("reward_failed", extra rounds included), and of dynamic sampling where there is any.
        version: of the oldest weights that sampled any of it, as the engine counts them.
    """

    batch: TokenBatch
    samples: tuple[Sample, ...]
    rewards: Tensor
    graded: Tensor
    metrics: dict[str, float]
    version: int


@dataclass(frozen=True)
class Sampler:
    """Draws a step's problems and has the engine answer them; a function of (seed, step) and the engine's weights.

    Attributes:
        config: of the training.
        engine: serves the deployment target.
        task: problems and grader.
        tokenizer: of the model.
        seed: of the run.
    """

    config: TrainConfig
    engine: RolloutEngine
    task: Task
    tokenizer: Any
    seed: int

    def roll_out(self, step: int) -> Experience:
        """Sample and grade the step's completions; with dynamic sampling, more in place of equal groups.

        Raises:
            TaskError: more than `train.task.max_failed` of the samples could not be graded.
        """
        count, sampling, drawn = self.config.rollout.prompts, self.config.sampling, {}
        grades: list[Grade] = []
        groups = self._groups(step, self.task.step_problems(step, count, self.seed), grades)
        if sampling.dynamic:
            groups, drawn = replace_equal(
                groups,
                rounds=sampling.extra_rounds,
                problems=lambda extra, ids: other_problems(self.task, step, count, self.seed, extra, ids),
                sample=lambda problems, extra: self._groups(step, problems, grades, extra),
            )
        prompts = [group.prompt for group in groups for _ in group.completions]
        samples = tuple(sample for group in groups for sample in group.samples)
        shape = (-1, self.config.rollout.group_size)
        return Experience(
            batch=TokenBatch.collate(prompts, [c for group in groups for c in group.completions]),
            samples=samples,
            rewards=torch.tensor([0.0 if sample.reward is None else sample.reward for sample in samples]).view(shape),
            graded=torch.tensor([sample.failed is None for sample in samples]).view(shape),
            metrics=failure_metrics(grades) | drawn | self.engine.metrics(),
            version=min(c.version for group in groups for c in group.completions),
        )

    def _groups(self, step: int, problems: Sequence[Problem], grades: list[Grade], extra: int = 0) -> list[Group]:
        """Each problem's group, sampled and graded; an extra round has seeds of its own. Adds to the step's grades."""
        size = self.config.rollout.group_size
        texts = render(problems, self.tokenizer, chat=self.config.task.chat)
        prompts = self.tokenizer(texts, add_special_tokens=False).input_ids
        first = (self.seed << 40) + (extra << 32) + step * self.config.rollout.prompts
        seeds = [first + i for i in range(len(problems))]
        completions = [c for group in self.engine.generate(prompts, seeds) for c in group]
        answers = self.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
        asked = [(problems[i // size], text) for i, text in enumerate(answers)]
        given = self.task.grade(asked, failures_allowed(self.config.task.max_failed, grades, len(asked)))
        grades += given
        samples = tuple(
            Sample(problem, text, grade.reward, completion.finish_reason, grade.failed)
            for (problem, text), grade, completion in zip(asked, given, completions, strict=True)
        )
        return [
            Group(tuple(prompt), tuple(completions[at : at + size]), samples[at : at + size])
            for prompt, at in zip(prompts, range(0, len(samples), size), strict=True)
        ]
