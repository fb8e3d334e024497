"""The policy loss and the importance weight against numbers worked by hand."""

import pytest
import torch

from train.correction import token_tis
from train.loss import grpo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.24}


def test_on_policy_gradient_is_minus_the_advantage() -> None:
    """At ratio 1, d loss / d logp_t = -A_t: rewarded tokens become likelier."""
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), torch.tensor([[2.0, -3.0]]), torch.ones(1, 2), **CLIP)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2.0, 3.0]]))


def test_clip_stops_the_gradient_on_the_outer_side_only() -> None:
    """Ratio 1.5 with A > 0 and ratio 0.5 with A < 0 are clipped (no gradient); the inner sides are not."""
    old = torch.zeros(1, 4)
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    logprobs = ratios.log().requires_grad_()
    loss, stats = grpo_loss(logprobs, old, torch.tensor([[1.0, -1.0, -1.0, 1.0]]), torch.ones(1, 4), **CLIP)
    loss.backward()
    # clipped values 1.24 and -0.8, unclipped -1.5 and 0.5
    assert loss.item() == pytest.approx(-(1.24 - 0.8 - 1.5 + 0.5))
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 1.5, -0.5]]))
    assert stats["clipped"] == 2


def test_micro_batches_add_up() -> None:
    """The sum over any split of the rows is the loss of the whole."""
    torch.manual_seed(0)
    logprobs, old, advantages = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)
    mask = (torch.rand(6, 5) > 0.3).float()
    whole, _ = grpo_loss(logprobs, old, advantages, mask, **CLIP)
    parts = [grpo_loss(logprobs[r], old[r], advantages[r], mask[r], **CLIP)[0] for r in ([0, 3], [1], [2, 4, 5])]
    torch.testing.assert_close(sum(parts), whole)


def test_padding_changes_nothing() -> None:
    """Garbage log-probs behind the mask, even ones whose ratio overflows, leave loss and gradient alone."""
    logprobs = torch.tensor([[-1.0, 500.0]], requires_grad=True)
    loss, _ = grpo_loss(logprobs, torch.tensor([[-1.1, -500.0]]), torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-(2.718281828**0.1))
    assert logprobs.grad is not None
    assert logprobs.grad[0, 1] == 0


def test_truncated_importance_weight() -> None:
    """exp(p - q) = 0.5 stays, 8 is cut at C = 2; the weight scales the token's loss and has no gradient."""
    old = torch.tensor([[0.25, 0.8]]).log().requires_grad_()
    weights = token_tis(old, torch.tensor([[0.5, 0.1]]).log(), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0]]))
    assert not weights.requires_grad
    plain, _ = grpo_loss(old, old.detach(), torch.ones(1, 2), torch.ones(1, 2), **CLIP)
    weighted, _ = grpo_loss(old, old.detach(), torch.ones(1, 2), torch.ones(1, 2), weights=weights, **CLIP)
    assert plain.item() == pytest.approx(-2.0)
    assert weighted.item() == pytest.approx(-2.5)
