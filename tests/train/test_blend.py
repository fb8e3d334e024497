"""The blend: exact at both ends, linear between."""

import pytest
import torch

from train.blend import blended


def test_ends_are_exact_and_the_middle_is_the_mean() -> None:
    """lambda 0 is W and lambda 1 is Q(W), bit for bit; 0.5 is their BF16-rounded mean; other names pass through."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(64, 64).bfloat16(), "b": torch.randn(8).bfloat16()}
    deployed = {"a": torch.randn(64, 64).bfloat16()}
    assert torch.equal(blended(weights, deployed, 0.0)["a"], weights["a"])
    assert torch.equal(blended(weights, deployed, 1.0)["a"], deployed["a"])
    mean = ((weights["a"].float() + deployed["a"].float()) / 2).bfloat16()
    assert torch.equal(blended(weights, deployed, 0.5)["a"], mean)
    assert blended(weights, deployed, 0.5)["b"] is weights["b"]


def test_a_share_above_one_is_refused() -> None:
    """Extrapolating beyond the deployed weights has no meaning."""
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        blended({}, {}, 1.5)


def test_each_weight_has_its_own_share() -> None:
    """With shares by name, each is blended as if it were alone; one out of range is refused."""
    torch.manual_seed(0)
    weights = {name: torch.randn(16, 16).bfloat16() for name in "abc"}
    deployed = {name: torch.randn(16, 16).bfloat16() for name in "ab"}
    mixed = blended(weights, deployed, {"a": 0.0, "b": 0.3})
    assert torch.equal(mixed["a"], weights["a"])
    assert torch.equal(mixed["b"], blended(weights, deployed, 0.3)["b"])
    with pytest.raises(ValueError, match=r"\[0, 1\], got -0.1"):
        blended(weights, deployed, {"a": -0.1, "b": 0.3})
