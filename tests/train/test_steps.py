"""Claims: every epoch takes the same mini-batches again, and all of them compare with the policy before the first;
the KL through the quantizer is there in the steps it is asked for, at the weight it has left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import train.trainer
from tests.train.recorded import CASES, made, steps
from train.config import ConstraintConfig
from train.distributed import World


@pytest.fixture
def two_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "epochs", ({}, {"epochs": 2, "minibatches": 2}))


def test_there_is_an_optimizer_step_per_mini_batch_and_epoch(two_epochs) -> None:
    trainer = made("epochs", World())
    steps(trainer, 1)
    taken = {int(state["step"]) for state in trainer.policy.optimizer.state.values()}
    assert taken == {trainer.config.updates} == {4}


def test_old_logprobs_are_those_of_before_the_first_update_in_every_epoch(two_epochs, monkeypatch) -> None:
    trainer, real, seen = made("epochs", World()), train.trainer.policy_loss, list[tuple[Tensor, Tensor]]()

    def recording(*args: Any, old: Tensor, logprobs: Tensor, **kwargs: Any) -> Any:
        seen.append((old.clone(), logprobs.detach().clone()))
        return real(*args, old=old, logprobs=logprobs, **kwargs)

    monkeypatch.setattr(train.trainer, "policy_loss", recording)
    steps(trainer, 1)
    epoch = len(seen) // 2
    for (first, _), (second, now) in zip(seen[:epoch], seen[epoch:], strict=True):
        assert torch.equal(first, second)
        assert not torch.allclose(now, second, atol=1e-4)  # the policy itself has moved
    old, logprobs = seen[0]
    torch.testing.assert_close(old, logprobs)  # the first mini-batch's own forward pass


def test_the_kl_is_added_in_one_of_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = ConstraintConfig(form="blend+distill", multiplier_init=0.5, distill_every=2)
    monkeypatch.setitem(CASES, "every second", ({}, {"constraint": constraint}))
    rows = steps(made("every second", World()), 4)
    kl = [row["distill_kl"] for row in rows]
    assert [value is None for value in kl] == [False, True, False, True]
    assert all(value > 0 for value in kl if value is not None)


def test_the_kl_halves_in_its_half_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """At step k its weight is distill_weight lambda 2^(-k / half-life), and 0 in the steps without it."""
    constraint = ConstraintConfig(multiplier_init=0.5, distill_weight=0.4, distill_every=4, distill_half_life=8)
    monkeypatch.setitem(CASES, "fading", ({}, {"constraint": constraint}))
    trainer = made("fading", World())
    weights = [trainer.constraint.pull_weight(replace(trainer.state, step=k)) for k in (0, 4, 6, 8, 16)]
    assert weights == pytest.approx([0.2, 0.2 / 2**0.5, 0.0, 0.1, 0.05])
