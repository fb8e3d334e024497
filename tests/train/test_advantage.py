"""Group advantages and the penalty."""

import pytest
import torch

from train.advantage import group_advantages, penalized_advantages


def test_group_of_four_by_hand() -> None:
    """Rewards 1 0 0 1: mean 0.5, std (unbiased) sqrt(1/3), so +-0.866; without std +-0.5."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    expected = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    torch.testing.assert_close(group_advantages(rewards, normalize_std=False), 0.5 * expected)
    torch.testing.assert_close(group_advantages(rewards, normalize_std=True), 0.866 * expected, rtol=1e-3, atol=0)


def test_equal_rewards_teach_nothing() -> None:
    """A solved or a hopeless group gets exactly zero, also where floats do not average back to themselves."""
    rewards = torch.tensor([[0.1] * 7, [1.0] * 7])
    assert torch.equal(group_advantages(rewards, normalize_std=True), torch.zeros(2, 7))


def test_groups_do_not_mix() -> None:
    """Changing one group's rewards leaves the other's advantages alone."""
    one = group_advantages(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), normalize_std=True)
    two = group_advantages(torch.tensor([[1.0, 0.0], [5.0, 1.0]]), normalize_std=True)
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize(("penalty", "cost"), [("full", [0.02, 0.10]), ("excess", [-0.03, 0.05]), ("hinge", [0, 0.05])])
def test_penalty_by_hand(penalty, cost) -> None:
    """A = 1, lambda = 0.5, c = 0.05, delta = 0.02 and 0.10: A - 0.5 * cost for each form."""
    result = penalized_advantages(
        torch.ones(1, 2), torch.tensor([[0.02, 0.10]]), multiplier=0.5, tolerance=0.05, penalty=penalty
    )
    torch.testing.assert_close(result, 1 - 0.5 * torch.tensor([cost], dtype=torch.float32))
