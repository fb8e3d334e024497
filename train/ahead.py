"""Rollouts of the next step while this one trains: one step stale, and measured.

A step's experience is sampled with the weights of the step before, in a thread, while that step trains; the engine
takes new weights only between the two. A resumed run samples it again, from the tensors the engine held
(`LoopState.held`), so it goes on as if it had not been stopped; only the first step's staleness is not measured. The
discrepancy, and so the constraint, then includes the staleness: its tolerance must have room for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from train.discrepancy import masked_mean, probability_difference
from train.experience import Experience, Sampler


class Rollouts:
    """A step's experience, sampled when it is asked for, or ahead of that."""

    def __init__(self, sampler: Sampler, *, ahead: bool, steps: int) -> None:
        """Nothing is sampled yet.

        Args:
            sampler: of the run.
            ahead: whether to sample the next step's while a step trains.
            steps: of the run; nothing is sampled beyond them.
        """
        self._sampler, self._ahead, self._steps = sampler, ahead, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, Future[Experience]] | None = None

    def start(self, step: int) -> None:
        """Begin with a step's, from the weights that the engine holds now, where the run samples ahead."""
        if self._ahead and step < self._steps:
            self._next = step, self._thread.submit(self._sampler.roll_out, step)

    def wait(self) -> None:
        """Until the engine is idle, and may get other weights."""
        if self._next is not None:
            self._next[1].exception()  # raised by whoever takes it

    def take(self, step: int) -> Experience:
        """The step's, sampled before or now; then the following one's begins.

        Raises:
            Exception: what sampling it raised.
        """
        if self._next is not None:
            begun, future = self._next
            assert begun == step, f"step {begun} was sampled ahead, step {step} is asked for"
            self._next, taken = None, future.result()
        else:
            taken = self._sampler.roll_out(step)
        self.start(step + 1)
        return taken


def staleness(now: Tensor, sampling: Tensor, mask: Tensor) -> float:
    """mean_t |exp(p_t) - exp(s_t)|: the part of the gap that is there because the policy has moved since it sampled.

    Like the other parts of an attribution a distance, not a share: the mean |probability difference| between trainer
    and deployed engine is at most this plus the one at the sampling weights (triangle inequality).

    Args:
        now: [N, T] p_t, the trainer's log-probs at the weights that are trained, nats.
        sampling: [N, T] s_t, the trainer's at its weights of the step whose deployed weights sampled the batch.
        mask: [N, T], 1 on response tokens.
    """
    return masked_mean(probability_difference(now, sampling, mask), mask).item()
