"""The policy losses against numbers worked by hand, loops over their definitions, and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from train.config import CorrectionConfig, LossConfig
from train.correction import token_tis
from train.loss import denominator, grpo_loss, gspo_loss, loss_metrics, policy_loss, qurl_loss, reference_kl

CLIP = {"clip_low": 0.2, "clip_high": 0.24}
LOSSES = ("grpo", "dapo", "gspo", "qurl", "reinforce")


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


def toy(spread: float = 0.3) -> dict[str, torch.Tensor]:
    """Six responses of 1 to 5 tokens in double precision, advantages per token, garbage nowhere."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(6, 5, generator=generator, dtype=torch.float64)

    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]).double()
    old = -normal().abs() * mask
    return {
        "logprobs": old + spread * normal() * mask,
        "old": old,
        "rollout": old + spread * normal() * mask,
        "advantages": normal().sign() * (1 + normal().abs()) * mask,
        "mask": mask,
    }


def tables(name: str, **options: Any) -> tuple[LossConfig, CorrectionConfig]:
    """A loss and the correction it needs."""
    weight = "token-tis" if name == "qurl" else "none"
    return LossConfig.model_validate({"name": name, **options}), CorrectionConfig.model_validate({"weight": weight})


def value(loss: LossConfig, correction: CorrectionConfig, data: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    """The whole loss: the sum over its denominator."""
    total, _ = policy_loss(loss, correction, **data, **more)
    return total / denominator(data["mask"], loss.normalize)


def looped(loss: LossConfig, data: dict[str, torch.Tensor], cap: float | None = None) -> float:
    """The definition of each loss, token by token."""
    d = {name: tensor.tolist() for name, tensor in data.items()}
    low, high = loss.clip_low or 0.0, loss.clip_high or 0.0
    rows = []
    for i, length in enumerate(int(n) for n in data["mask"].sum(1)):
        anchor = d["old"][i] if loss.ratio == "decoupled" else d["rollout"][i]
        log_ratios = [d["logprobs"][i][t] - anchor[t] for t in range(length)]
        objectives = []
        for t in range(length):
            a, rho = d["advantages"][i][t], math.exp(d["old"][i][t] - d["rollout"][i][t])
            ratio, upper = math.exp(log_ratios[t]), 1 + high
            if loss.name == "gspo":
                ratio = math.exp(sum(log_ratios) / length)
            if loss.name == "qurl":
                upper = (1 + high) / rho
            objective = min(ratio * a, min(max(ratio, 1 - low), upper) * a)
            if loss.name == "reinforce":
                objective = d["logprobs"][i][t] * a
            objectives.append(objective * (1.0 if cap is None else min(rho, cap)))
        rows.append(objectives)
    if loss.normalize == "token-mean":
        return -sum(map(sum, rows)) / sum(map(len, rows))
    return -sum(sum(row) / len(row) for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("name", "ratio", "normalize"),
    [
        (name, ratio, normalize)
        for name in LOSSES
        for ratio in ("decoupled", "bypass")
        for normalize in ("token-mean", "sequence-mean")
        if (name, normalize) not in (("gspo", "token-mean"), ("dapo", "sequence-mean"))
        if (name, ratio) != ("qurl", "bypass")
    ],
)
def test_each_loss_is_its_definition(name, ratio, normalize) -> None:
    """A loop over the tokens gives the same; so does every split into micro-batches, with more padding; and garbage
    behind the mask changes neither the loss nor the gradient. Bypass does not read the old log-probs."""
    loss, correction = tables(name, ratio=ratio, normalize=normalize)
    data = toy()
    found = value(loss, correction, data)
    assert found.item() == pytest.approx(looped(loss, data, 2.0 if name == "qurl" else None), rel=1e-12)
    sums = []
    for rows in ([0, 3], [1], [2, 4, 5]):
        part = {k: torch.nn.functional.pad(v[rows], (0, 2)) for k, v in data.items()}
        sums.append(policy_loss(loss, correction, **part)[0])
    torch.testing.assert_close(sum(sums) / denominator(data["mask"], normalize), found, rtol=1e-12, atol=0)
    padding = 1 - data["mask"]
    garbage = data | {k: data[k] + 300 * sign * padding for k, sign in (("logprobs", 1), ("old", -1), ("rollout", -1))}
    leaves = [d["logprobs"].clone().requires_grad_() for d in (data, garbage)]
    for leaf, d in zip(leaves, (data, garbage), strict=True):
        value(loss, correction, d | {"logprobs": leaf}).backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    if ratio == "bypass":
        blind = data | {"old": torch.full_like(data["old"], math.nan)}
        assert torch.equal(value(loss, correction, blind), found)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name) -> None:
    """d loss / d logits of an exact softmax over four words equals central differences. For gspo the differences are
    those of the paper's own objective, mean_i min(s_i A_i, clip(s_i) A_i), with one advantage per sequence."""
    generator = torch.Generator().manual_seed(3)
    data = toy(0.1)
    words = torch.randint(0, 4, (6, 5), generator=generator)
    theta = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    loss, correction = tables(name, clip_low=None if name == "reinforce" else 0.05)
    if name == "gspo":
        data["advantages"] = data["advantages"][:, :1].sign() * data["mask"]

    def at(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        logprobs = logits.log_softmax(1)[torch.arange(5), words] * data["mask"]
        return data | {"logprobs": logprobs, "old": logprobs0, "rollout": logprobs0 + shift}

    logprobs0 = theta.log_softmax(1)[torch.arange(5), words] * data["mask"]
    shift = 0.1 * torch.randn(6, 5, generator=generator, dtype=torch.float64) * data["mask"]
    here = theta + 0.15 * torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def paper(logits: torch.Tensor) -> float:
        if name != "gspo":
            return value(loss, correction, at(logits)).item()
        d = at(logits)
        s = ((d["logprobs"] - d["old"]).sum(1) / d["mask"].sum(1)).exp()
        a = data["advantages"][:, 0]
        assert loss.clip_low is not None
        assert loss.clip_high is not None
        return -torch.minimum(s * a, s.clamp(1 - loss.clip_low, 1 + loss.clip_high) * a).mean().item()

    leaf = here.clone().requires_grad_()
    total, sums = policy_loss(loss, correction, **at(leaf))
    (total / denominator(data["mask"], loss.normalize)).backward()
    assert 0 < sums["clipped"] < sums["tokens"] or name == "reinforce"
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-3
    for i in range(5):
        for j in range(4):
            step = torch.zeros_like(theta)
            step[i, j] = 1e-6
            difference = (paper(here + step) - paper(here - step)) / 2e-6
            assert leaf.grad[i, j].item() == pytest.approx(difference, abs=1e-8)


@pytest.mark.parametrize(
    ("weight", "ratio"),
    [
        ("none", "bypass"), ("none", "decoupled"), ("token-tis", "decoupled"), ("sequence-tis", "decoupled"),
        ("token-masked", "decoupled"), ("sequence-masked", "decoupled"), ("icepop", "decoupled"),
    ],
)  # fmt: skip
def test_without_a_discrepancy_it_is_plain_grpo_bit_for_bit(weight, ratio) -> None:
    """Equal log-probs of trainer and engine: whatever corrects, loss and gradient are those of the formula without
    corrections, to the last bit, in float32."""
    data = {name: tensor.float() for name, tensor in toy().items()}
    data["rollout"] = data["old"]
    # of bypass the masks see the present policy, so nothing must be masked away for its drift
    masks = ("geometric", "veto", "max-k2", "mean-k3", "mean-k1") if ratio == "decoupled" else ()
    results = []
    for plain in (True, False):
        leaf = data["logprobs"].clone().requires_grad_()
        if plain:
            r = ((leaf - data["old"]) * data["mask"]).exp()
            objective = torch.minimum(r * data["advantages"], r.clamp(1 - 0.2, 1 + 0.24) * data["advantages"])
            total = -(objective * data["mask"]).sum()
            (total / data["mask"].sum()).backward()
        else:
            correction = CorrectionConfig.model_validate({"weight": weight, "masks": masks})
            total, _ = policy_loss(LossConfig(ratio=ratio), correction, **data | {"logprobs": leaf})
            (total / denominator(data["mask"], "token-mean")).backward()
        assert leaf.grad is not None
        results.append((total.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_dropped_sequence_stays_in_the_denominator() -> None:
    """Two sequences of two tokens, A = 1, on policy; the second is vetoed: the first one's gradient is -1/4 per token,
    as it was, the second's 0; the metrics say half of the tokens, half of the sequences, mean weight 0.5."""
    old = torch.full((2, 2), -1.0)
    rollout = torch.tensor([[-1.0, -1.0], [-1.0, 10.0]])
    for masks, expected in (((), -0.25), (("veto",), 0.0)):
        leaf = old.clone().requires_grad_()
        total, sums = policy_loss(
            LossConfig(), CorrectionConfig(masks=masks), logprobs=leaf, old=old, rollout=rollout,
            advantages=torch.ones(2, 2), mask=torch.ones(2, 2),
        )  # fmt: skip
        (total / denominator(torch.ones(2, 2), "token-mean")).backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [[-0.25, -0.25], [expected, expected]]
    metrics = loss_metrics(sums)
    assert metrics["correction_weight"] == metrics["correction_masked_tokens"] == 0.5
    assert metrics["correction_masked_sequences"] == 0.5


def test_gspo_by_hand() -> None:
    """Token ratios 2 and 0.5: the sequence's is 1 although each token's is far off. Each token has the gradient
    -s A / |y| = -1/2 under a sequence mean. Ratios 1.01 twice with A > 0 are clipped at 1.0004: no gradient."""
    clip = {"clip_low": 3e-4, "clip_high": 4e-4}
    mask = torch.ones(1, 2, dtype=torch.float64)
    for ratios, loss, gradient, clipped in (([2.0, 0.5], -1.0, -0.5, 0), ([1.01, 1.01], -1.0004, 0.0, 2)):
        leaf = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
        total, stats = gspo_loss(leaf, 0 * mask, mask, mask, weights=mask / 2, **clip)
        total.backward()
        assert leaf.grad is not None
        assert total.item() == pytest.approx(loss)
        assert leaf.grad.tolist() == [pytest.approx([gradient, gradient])]
        assert stats["clipped"] == clipped


def test_qurl_holds_the_ratio_to_the_engine() -> None:
    """pi_theta / pi_old = 1.5, A = 1, clip_high 0.24. rho = 0.8: the upper clip is 1.55 and leaves it; rho = 1.0: 1.24
    clips it; rho = 1.6: 0.775 does. The value is weight times clipped ratio."""
    rho = torch.tensor([[0.8, 1.0, 1.6]])
    leaf = torch.full((1, 3), 1.5).log().requires_grad_()
    old, ones = torch.zeros(1, 3), torch.ones(1, 3)
    weights = token_tis(old, -rho.log(), cap=1.2)
    total, stats = qurl_loss(leaf, old, -rho.log(), ones, ones, weights=weights, **CLIP)
    total.backward()
    assert total.item() == pytest.approx(-(0.8 * 1.5 + 1.24 + 1.2 * 0.775))
    torch.testing.assert_close(leaf.grad, torch.tensor([[-1.2, 0.0, 0.0]]))
    assert stats["clipped"] == 2


def test_reference_kl_by_hand_and_in_expectation() -> None:
    """exp(d) - d - 1 for d = ln 2 is 0.307; summed over a softmax with pi's probabilities it is KL(pi || ref); its
    gradient pulls up a token that the reference likes more, and weighs in at the coefficient over the denominator."""
    logprobs, reference, mask = torch.tensor([[-2.0]]), torch.tensor([[-2.0 + math.log(2)]]), torch.ones(1, 1)
    assert reference_kl(logprobs, reference, mask).item() == pytest.approx(1 - math.log(2))
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    k3 = reference_kl(pi.log()[None], ref.log()[None], torch.ones(1, 3))
    assert (pi * k3).sum().item() == pytest.approx((pi * (pi / ref).log()).sum().item())
    for normalize, share in (("token-mean", 1 / 3), ("sequence-mean", 1 / 2)):
        data = {
            "old": torch.zeros(2, 2), "rollout": torch.zeros(2, 2), "advantages": torch.zeros(2, 2),
            "mask": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        }  # fmt: skip
        leaf = torch.zeros(2, 2, requires_grad=True)
        total, sums = policy_loss(
            LossConfig(normalize=normalize, reference_kl=0.5), CorrectionConfig(), logprobs=leaf,
            reference=torch.tensor([[math.log(2), 9.0], [0.0, 0.0]]), **data,
        )  # fmt: skip
        (total / denominator(data["mask"], normalize)).backward()
        # d k3 / d logp = 1 - exp(d) = -1
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, torch.tensor([[-0.5 * share, 0.0], [0.0, 0.0]]))
        assert loss_metrics(sums)["reference_kl"] == pytest.approx((1 - math.log(2)) / 3)


def test_a_step_without_anything_to_learn_is_zero() -> None:
    """Every group dropped: sum 0 over denominator 1, no NaN."""
    data = toy() | {"mask": torch.zeros(6, 5, dtype=torch.float64)}
    for normalize in ("token-mean", "sequence-mean"):
        loss = LossConfig(normalize=normalize)
        total, sums = policy_loss(loss, CorrectionConfig(weight="token-tis", masks=("mean-k3",)), **data)
        assert total.item() == 0
        assert denominator(data["mask"], normalize) == 1
        assert loss_metrics(sums)["clip_fraction"] == 0
