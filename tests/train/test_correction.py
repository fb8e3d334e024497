"""Importance weights and masks against loops over their definitions, and what they make of a gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from train.config import CorrectionConfig
from train.correction import (
    correction_sums,
    correction_weights,
    geometric_mask,
    max_k2_mask,
    mean_k1_mask,
    mean_k3_mask,
    sequence_masked,
    sequence_tis,
    token_masked,
    token_tis,
    veto_mask,
)

WEIGHTS = ("token-tis", "sequence-tis", "token-masked", "sequence-masked", "icepop")
MASKS = ("geometric", "veto", "max-k2", "mean-k3", "mean-k1")


def batch(spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """old, rollout and mask of 40 responses of 1 to 6 tokens; garbage behind the mask."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(40, 6, generator=generator, dtype=torch.float64) * 3
    rollout = old + spread * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 7, (40,), generator=generator)
    mask = (torch.arange(6) < lengths[:, None]).double()
    return torch.where(mask.bool(), old, 700.0), torch.where(mask.bool(), rollout, -700.0), mask


def definition(name: str, row: list[float], config: CorrectionConfig) -> list[float]:
    """One weight or mask of one response, from its log ratios, by plain loops."""
    rho = [math.exp(x) for x in row]
    product = math.prod(rho)
    mean = sum(row) / len(row)
    low, high = config.bounds or (0.0, 0.0)
    match name:
        case "token-tis":
            return [min(r, config.cap) for r in rho]
        case "sequence-tis":
            return [min(product, config.cap)] * len(row)
        case "token-masked" | "icepop":
            return [r if low <= r <= high else 0.0 for r in rho]
        case "sequence-masked":
            return [product if low <= product <= high else 0.0] * len(row)
        case "geometric":
            keep = config.geometric[0] <= product ** (1 / len(row)) <= config.geometric[1]
        case "veto":
            keep = not any(r < config.veto for r in rho)
        case "max-k2":
            keep = max(x * x / 2 for x in row) <= config.max_k2
        case "mean-k3":
            keep = sum(r - x - 1 for r, x in zip(rho, row, strict=True)) / len(row) <= config.mean_k3
        case _:
            keep = abs(mean) <= config.mean_k1
    return [float(keep)] * len(row)


@pytest.mark.parametrize("name", [*WEIGHTS, *MASKS])
def test_each_is_its_definition_for_every_token(name) -> None:
    """40 responses: a loop over each response's log ratios gives the same; some are dropped and some kept, a weight
    is cut somewhere; what stands behind the mask (ratios of e^1400) does not count, nor does the micro-batch."""
    options = {"geometric": (0.9, 1.2), "veto": 0.4, "max_k2": 0.4, "mean_k3": 0.1, "mean_k1": 0.2, "cap": 1.3}
    chosen = {"weight": name} if name in WEIGHTS else {"masks": (name,)}
    config = CorrectionConfig.model_validate(options | chosen)
    old, rollout, mask = batch()
    weights = correction_weights(config, old.requires_grad_(), rollout, mask)
    assert weights is not None
    assert not weights.requires_grad
    assert weights.shape == mask.shape
    found = set()
    for i, length in enumerate(mask.sum(1).int().tolist()):
        expected = definition(name, (old - rollout)[i, :length].tolist(), config)
        assert weights[i, :length].tolist() == pytest.approx(expected, rel=1e-9)
        found |= set(expected)
    if name in MASKS:
        assert found == {0.0, 1.0}
    else:
        assert (0.0 in found) if "tis" not in name else (1.3 in found)
    parts = [correction_weights(config, old[r], rollout[r], mask[r]) for r in (slice(0, 7), slice(7, 40))]
    assert torch.equal(torch.cat([p for p in parts if p is not None]), weights)


def test_by_hand() -> None:
    """Ratios 0.5 and 8: product 4, geometric mean 2, k2 0.240 and 2.162, mean k3 2.807, mean l 0.693."""
    old = torch.tensor([[0.25, 0.8]], dtype=torch.float64).log()
    rollout = torch.tensor([[0.5, 0.1]], dtype=torch.float64).log()
    mask = torch.ones(1, 2, dtype=torch.float64)

    def is_(values: torch.Tensor, *expected: float) -> None:
        torch.testing.assert_close(values, torch.tensor([expected], dtype=torch.float64))

    is_(token_tis(old, rollout, cap=2.0), 0.5, 2.0)
    is_(sequence_tis(old, rollout, mask, cap=5.0), 4.0, 4.0)
    is_(sequence_tis(old, rollout, mask, cap=2.0), 2.0, 2.0)
    is_(token_masked(old, rollout, low=0.4, high=5.0), 0.5, 0.0)
    is_(sequence_masked(old, rollout, mask, low=0.5, high=5.0), 4.0, 4.0)
    is_(sequence_masked(old, rollout, mask, low=0.5, high=3.9), 0.0, 0.0)
    for high, kept in ((2.01, 1.0), (1.99, 0.0)):
        is_(geometric_mask(old, rollout, mask, low=0.99, high=high), kept, kept)
    for threshold, kept in ((0.49, 1.0), (0.51, 0.0)):
        is_(veto_mask(old, rollout, mask, threshold=threshold), kept, kept)
    for limit, kept in ((2.17, 1.0), (2.16, 0.0)):
        is_(max_k2_mask(old, rollout, mask, limit=limit), kept, kept)
    # ((0.5 + 0.693 - 1) + (8 - 2.079 - 1)) / 2 = 2.557
    for limit, kept in ((2.56, 1.0), (2.55, 0.0)):
        is_(mean_k3_mask(old, rollout, mask, limit=limit), kept, kept)
    for limit, kept in ((0.70, 1.0), (0.69, 0.0)):
        is_(mean_k1_mask(old, rollout, mask, limit=limit), kept, kept)


def test_weights_and_masks_compose() -> None:
    """Token TIS with sequence rejection by k3 is the product of both; five masks are the product of five."""
    old, rollout, mask = batch(0.05)
    both = correction_weights(CorrectionConfig(weight="token-tis", masks=("mean-k3",)), old, rollout, mask)
    expected = token_tis(old, rollout, cap=2.0) * mean_k3_mask(old, rollout, mask, limit=0.001)
    assert both is not None
    assert torch.equal(both, expected)
    assert 0 < (both * mask).count_nonzero() < mask.sum()
    every = correction_weights(CorrectionConfig(masks=MASKS), old, rollout, mask)
    single = [correction_weights(CorrectionConfig(masks=(name,)), old, rollout, mask) for name in MASKS]
    assert every is not None
    assert torch.equal(every, torch.stack([s for s in single if s is not None]).prod(0))
    assert correction_weights(CorrectionConfig(), old, rollout, mask) is None


@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_log_probs_are_weighted_by_exactly_one(name) -> None:
    """Every weight and all masks at rho = 1: 1.0 to the last bit."""
    old, _, mask = batch()
    weights = correction_weights(CorrectionConfig(weight=name, masks=MASKS), old, old, mask)
    assert weights is not None
    assert torch.equal(weights, torch.ones_like(mask))


def test_sums_count_dropped_tokens_and_sequences() -> None:
    """Weights 2 0 | 0 0 | 0.5 (one token): 2 dropped tokens of sequence 2, 1 of sequence 1, 1 sequence; padding is
    none, and a sequence that does not count at all is none either."""
    weights = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    sums = correction_sums(weights, mask)
    assert sums == {"weight": 2.5, "masked_tokens": 3.0, "masked_sequences": 1.0, "sequences": 3.0}


def test_importance_weights_give_the_gradient_of_the_policy_itself() -> None:
    """Two-token responses over three words, all nine enumerated with their probability under mu: weighted by the
    sequence's ratio the expected REINFORCE gradient is that of E_pi[R] by finite differences; without weights it is
    not; weighted by the token's ratio it is neither."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    mu = (theta + 0.7 * torch.randn(2, 3, generator=generator, dtype=torch.float64)).log_softmax(1)
    responses = torch.tensor(list(itertools.product(range(3), repeat=2)))
    reward = torch.rand(9, generator=generator, dtype=torch.float64)

    def logprobs(logits: torch.Tensor, of: torch.Tensor = responses) -> torch.Tensor:
        return logits.log_softmax(1)[torch.arange(2), of]

    def value(logits: torch.Tensor) -> float:
        return (logprobs(logits).sum(1).exp() * reward).sum().item()

    exact = torch.zeros_like(theta)
    for index in itertools.product(range(2), range(3)):
        step = torch.zeros_like(theta)
        step[index] = 1e-6
        exact[index] = (value(theta + step) - value(theta - step)) / 2e-6

    rollout, mask = mu[torch.arange(2), responses], torch.ones(9, 2, dtype=torch.float64)

    def gradient(weight: str) -> torch.Tensor:
        logits = theta.clone().requires_grad_()
        new = logprobs(logits)
        config = CorrectionConfig.model_validate({"weight": weight, "cap": 1e9})
        weights = correction_weights(config, new, rollout, mask)
        weights = mask if weights is None else weights
        (rollout.sum(1).exp()[:, None] * weights * reward[:, None] * new).sum().backward()
        assert logits.grad is not None
        return logits.grad

    torch.testing.assert_close(gradient("sequence-tis"), exact, atol=1e-8, rtol=0)
    assert (gradient("none") - exact).abs().max() > 1e-2
    assert (gradient("token-tis") - exact).abs().max() > 1e-3
