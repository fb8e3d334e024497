"""The sign-skew probe against hand-computed numbers and its definition."""

from __future__ import annotations

import math

import pytest
import torch

from train.discrepancy import mismatch_metrics
from train.sign_skew import sign_skew


def test_by_hand() -> None:
    """Ratios 2, 0.5, 1.5 with advantages 1, 3, -2: C = -1, 1.5, 1; the means are 0.25 and 1, the skew -0.75. A token
    of advantage 0 and padding count nowhere."""
    rollout = torch.full((2, 3), -1.0)
    old = rollout + torch.tensor([[2.0, 0.5, 9.0], [1.5, 4.0, 7.0]]).log()
    advantages = torch.tensor([[1.0, 3.0, 0.0], [-2.0, 5.0, 5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    found = sign_skew(old, rollout, advantages, mask)
    assert found["mismatch_cost_positive"] == pytest.approx(0.25, abs=1e-6)
    assert found["mismatch_cost_negative"] == pytest.approx(1.0, abs=1e-6)
    assert found["mismatch_cost_skew"] == pytest.approx(-0.75, abs=1e-6)


def test_against_loops() -> None:
    """The definition in plain Python over 20 random sequences of different lengths."""
    torch.manual_seed(0)
    old, rollout, advantages = torch.randn(20, 9) * 0.3 - 1, torch.randn(20, 9) * 0.3 - 1, torch.randn(20, 9)
    lengths = [1 + i % 9 for i in range(20)]
    mask = torch.tensor([[float(t < n) for t in range(9)] for n in lengths])
    costs: dict[bool, list[float]] = {True: [], False: []}
    for i, n in enumerate(lengths):
        for t in range(n):
            a = advantages[i, t].item()
            costs[a > 0].append(-(math.exp(old[i, t].item() - rollout[i, t].item()) - 1) * a)
    means = {sign: sum(values) / len(values) for sign, values in costs.items()}
    found = sign_skew(old, rollout, advantages, mask)
    assert found["mismatch_cost_positive"] == pytest.approx(means[True], rel=1e-4)
    assert found["mismatch_cost_negative"] == pytest.approx(means[False], rel=1e-4)
    assert found["mismatch_cost_skew"] == pytest.approx(means[True] - means[False], rel=1e-4)


def test_it_shows_what_a_kl_hides() -> None:
    """All ratios 1% too large, centred advantages: k3 is 5e-5, the mean cost over all tokens 0, the skew -2%."""
    rollout, mask = torch.full((2, 5), -1.0), torch.ones(2, 5)
    advantages = torch.tensor([[1.0], [-1.0]]) * mask
    old = rollout + math.log(1.01)
    assert mismatch_metrics(old, rollout, mask)["k3"] < 1e-4
    found = sign_skew(old, rollout, advantages, mask)
    assert found["mismatch_cost_skew"] == pytest.approx(-0.02, rel=1e-3)
    assert sum(v or 0 for v in (found["mismatch_cost_positive"], found["mismatch_cost_negative"])) == pytest.approx(0)


def test_no_mismatch_is_zero_and_no_sign_is_none() -> None:
    """Equal log-probs give exactly 0; without a token of either sign there is no mean; a broken token stays finite."""
    same, mask = torch.full((2, 2), -1.0), torch.ones(2, 2)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert set(sign_skew(same, same, advantages, mask).values()) == {0.0}
    assert set(sign_skew(same, same, torch.zeros(2, 2), mask).values()) == {None}
    assert sign_skew(same, same, advantages.abs(), mask)["mismatch_cost_skew"] is None
    broken = sign_skew(same, same - 500, advantages, mask)["mismatch_cost_negative"]
    assert broken is not None
    assert math.isfinite(broken)
