"""The attribution's maths against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from train.attribution import (
    Scores,
    attribute,
    blocks,
    even_shares,
    ignore_entry,
    standing_out,
    suggested_tolerance,
    with_quantized,
    worst_tokens,
)
from train.records import Completion, TokenBatch


def probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_each_part_is_the_gap_between_its_two_models() -> None:
    """Two tokens: p 0.5 and 0.8; Q(W) moves them by 0.2 and 0.2, the engine of the target back by 0.1 and on by 0.1:
    weights 0.2, kernels 0.1, total 0.2. The total is not their sum, and never above it."""
    p = probabilities([0.5, 0.8])
    scores = Scores(
        trainer=p,
        one_by_one=p.clone(),
        quantized=probabilities([0.7, 0.6]),
        engine=probabilities([0.49, 0.81]),
        deployed=probabilities([0.6, 0.5]),
    )
    parts = {part.name: part.gap for part in attribute(scores, torch.ones(1, 2))}
    expected = {"numerics": 0.0, "engine": 0.01, "weights": 0.2, "activations, KV, kernels": 0.1, "total": 0.2}
    assert {name: gap["prob_diff_mean"] for name, gap in parts.items()} == pytest.approx(expected, abs=1e-6)
    ratio = torch.tensor([5 / 7, 8 / 6], dtype=torch.double)
    assert parts["weights"]["k3"] == pytest.approx(float((ratio - ratio.log() - 1).mean()), rel=1e-5)
    assert parts["weights"]["k3_reverse"] == pytest.approx(float((1 / ratio + ratio.log() - 1).mean()), rel=1e-5)
    assert parts["weights"]["logp_abs_diff_max"] == pytest.approx(float(ratio.log().abs().max()), rel=1e-5)


def test_blocks_are_found_by_the_first_number_in_a_name() -> None:
    """Experts belong to their layer, layer 1 and layer 11 are two, a weight outside of layers is a block by itself."""
    names = [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.11.mlp.experts.3.up_proj.weight",
        "model.projector.weight",
    ]
    assert blocks(names) == {
        "model.layers.1": names[:2],
        "model.layers.11": [names[2]],
        "model.projector": [names[3]],
    }
    assert ignore_entry("model.layers.1") == r"re:.*layers\.1\..*"
    assert ignore_entry("model.projector") == "model.projector"


def test_one_block_at_q_and_the_rest_at_w() -> None:
    """Only the named weight is Q(W)'s."""
    weights = {"a": torch.zeros(1), "b": torch.zeros(1)}
    mixed = with_quantized(weights, {"a": torch.ones(1), "b": torch.ones(1)}, ["b"])
    assert {name: float(weight) for name, weight in mixed.items()} == {"a": 0.0, "b": 1.0}


def test_blocks_stand_out_from_the_even_share_and_the_floor() -> None:
    """0.01, 0.06, 0.05, 0.00 have mean 0.03: shares 1/3, 2, 5/3 and 0, so two stand out, the largest first; below a
    floor of 0.055 one of them says nothing; four alike stand out nowhere, and nor do four without a gap."""
    gaps = {"a": 0.01, "b": 0.06, "c": 0.05, "d": 0.0}
    assert even_shares(gaps) == pytest.approx({"a": 1 / 3, "b": 2.0, "c": 5 / 3, "d": 0.0})
    assert standing_out(gaps, floor=0.001) == ["b", "c"]
    assert standing_out(gaps, floor=0.055) == ["b"]
    assert standing_out(dict.fromkeys(gaps, 0.02), floor=0.001) == []
    assert standing_out(dict.fromkeys(gaps, 0.0), floor=0.0) == []


@pytest.mark.parametrize(
    ("first_step", "total", "floor", "expected"),
    [
        (0.2, 0.2, 0.001, 0.02),  # a tenth of the gap
        (0.2, 0.2, 0.05, 0.05),  # a tenth would be under the floor
        (0.3, 0.2, 0.05, 0.075),  # the same share of a gap measured at another temperature
        (0.004, 0.004, 0.005, 0.005),  # a gap within the floor
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_suggested_tolerance_is_never_under_the_floor(first_step, total, floor, expected) -> None:
    assert suggested_tolerance(first_step, total=total, floor=floor, ratio=0.1) == pytest.approx(expected)


def test_worst_tokens_are_ranked_and_a_context_counts_once() -> None:
    """Rows 0 and 1 are the same text: its token of difference 0.4 is listed once; then row 2's 0.3, and the two of 0.1;
    padding is not a token."""
    batch = TokenBatch.collate(
        [[1, 2], [1, 2], [1, 3]],
        [
            Completion((5, 6), (-1.0, -1.0), "stop"),
            Completion((5, 6), (-1.0, -1.0), "stop"),
            Completion((5,), (-1.0,), "stop"),
        ],
    )
    trainer = probabilities([0.5, 0.2], [0.5, 0.2], [0.6, 1.0])
    deployed = probabilities([0.6, 0.6], [0.6, 0.6], [0.3, 0.001])
    found = worst_tokens(trainer, deployed, batch, 10)
    assert [(t.sequence, t.position) for t in found] == [(0, 1), (2, 0), (0, 0)]
    assert (found[0].trainer, found[0].deployed) == pytest.approx((0.2, 0.6))
    assert len(worst_tokens(trainer, deployed, batch, 1)) == 1
