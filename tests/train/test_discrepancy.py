"""The discrepancy and its metrics against hand-computed numbers and brute-force definitions."""

import math

import pytest
import torch

from train.discrepancy import mismatch_metrics, probability_difference


def test_probability_difference_is_the_absolute_difference_of_probabilities() -> None:
    """|0.5 - 0.25| = 0.25 and |0.1 - 0.4| = 0.3; padding counts 0."""
    old = torch.tensor([[0.5, 0.1, 1.0]]).log()
    rollout = torch.tensor([[0.25, 0.4, 0.3]]).log()
    delta = probability_difference(old, rollout, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(delta, torch.tensor([[0.25, 0.3, 0.0]]))


def test_discrepancy_carries_no_gradient() -> None:
    """The deployed engine is a black box: nothing may push the policy through delta."""
    old = torch.full((1, 2), -1.0, requires_grad=True)
    assert not probability_difference(old, torch.zeros(1, 2), torch.ones(1, 2)).requires_grad


def test_metrics_against_hand_computed_values() -> None:
    """One token, p = log 0.5, q = log 0.25: l = log 2, so k1 = -log 2, k2 = log(2)^2 / 2, k3 = 2 - log 2 - 1."""
    metrics = mismatch_metrics(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), torch.ones(1, 1))
    log2 = math.log(2)
    expected = {
        "prob_diff_mean": 0.25, "prob_diff_std": 0.0, "prob_diff_max": 0.25,
        "k1": -log2, "k2": log2**2 / 2, "k3": 1 - log2, "k3_reverse": 0.5 + log2 - 1,
        "logp_abs_diff": log2, "logp_abs_diff_max": log2, "ppl_ratio": 0.5, "chi2_token": 3.0, "chi2_seq": 3.0,
        "ess": 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name


def test_metrics_against_brute_force() -> None:
    """Every metric equals its definition written as Python loops over the unmasked tokens."""
    torch.manual_seed(0)
    lengths = [3, 7, 1, 5]
    old, rollout = torch.randn(4, 7) * 0.3 - 1, torch.randn(4, 7) * 0.3 - 1
    mask = torch.tensor([[float(t < n) for t in range(7)] for n in lengths])
    pairs = [[(old[i, t].item(), rollout[i, t].item()) for t in range(n)] for i, n in enumerate(lengths)]
    tokens = [pair for row in pairs for pair in row]
    ratios = [p - q for p, q in tokens]
    mean_rho = sum(map(math.exp, ratios)) / len(ratios)
    expected = {
        "prob_diff_mean": sum(abs(math.exp(p) - math.exp(q)) for p, q in tokens) / len(tokens),
        "k3": sum(math.exp(r) - r - 1 for r in ratios) / len(ratios),
        "k3_reverse": sum(math.exp(-r) + r - 1 for r in ratios) / len(ratios),
        "chi2_token": sum(math.exp(2 * r) for r in ratios) / len(ratios) - 1,
        "chi2_seq": sum(math.exp(2 * sum(p - q for p, q in row)) for row in pairs) / 4 - 1,
        "ppl_ratio": sum(math.exp(sum(q - p for p, q in row) / len(row)) for row in pairs) / 4,
        "ess": 1 / (sum((math.exp(r) / mean_rho) ** 2 for r in ratios) / len(ratios)),
    }
    metrics = mismatch_metrics(old, rollout, mask)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_out_of_bounds_counts_both_sides() -> None:
    """Ratios 0.4, 0.6, 4 and 6 against [0.5, 5]: half of the tokens are outside; NaN stays NaN."""
    rollout = torch.full((1, 5), -1.0)
    old = rollout + torch.tensor([[0.4, 0.6, 4.0, 6.0, 99.0]]).log()
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    assert mismatch_metrics(old, rollout, mask)["out_of_bounds"] == 0.5
    old[0, 1] = math.nan
    assert math.isnan(mismatch_metrics(old, rollout, mask)["out_of_bounds"])


def test_metrics_do_not_see_padding() -> None:
    """Widening the padding, with garbage in it, changes no metric."""
    torch.manual_seed(1)
    old, rollout, mask = torch.randn(3, 4) - 1, torch.randn(3, 4) - 1, torch.ones(3, 4)
    wide = [torch.cat([x, torch.full((3, 5), fill)], 1) for x, fill in ((old, 9.0), (rollout, -9.0), (mask, 0.0))]
    plain, padded = mismatch_metrics(old, rollout, mask), mismatch_metrics(*wide)
    assert plain == pytest.approx(padded)


def test_one_bad_token_shows_in_the_reverse_direction() -> None:
    """-5 against -15: k3 is about 9 one way and about 22,000 the other; a report with one of them can miss it."""
    metrics = mismatch_metrics(torch.tensor([[-15.0]]), torch.tensor([[-5.0]]), torch.ones(1, 1))
    assert metrics["k3"] == pytest.approx(9.0, abs=0.01)
    assert metrics["k3_reverse"] == pytest.approx(22015, rel=0.001)


def test_equal_log_probs_have_zero_mismatch() -> None:
    """The same numbers on both sides: every distance is exactly 0, every ratio and correlation exactly 1."""
    same = torch.tensor([[-0.3, -2.0], [-1.0, -0.1]])
    metrics = mismatch_metrics(same, same.clone(), torch.ones(2, 2))
    assert {metrics[k] for k in ("prob_diff_mean", "k1", "k2", "k3", "chi2_seq", "logp_abs_diff_max")} == {0.0}
    assert metrics["correlation"] == metrics["ess"] == metrics["ppl_ratio"] == 1.0


def test_nan_is_shown() -> None:
    """A broken log-prob must not vanish in a mean."""
    metrics = mismatch_metrics(torch.tensor([[float("nan"), -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2))
    assert math.isnan(metrics["prob_diff_mean"])
