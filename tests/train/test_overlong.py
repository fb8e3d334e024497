"""The overlong punishment by hand and against DAPO's three cases."""

import pytest
import torch

from train.overlong import overlong_punishment


def test_by_hand() -> None:
    """Limit 20, buffer 8, penalty 0.5: none up to 12 tokens, half of it at 16, all of it at 20 and beyond."""
    punishment = overlong_punishment(torch.tensor([1.0, 12.0, 14.0, 16.0, 20.0, 25.0]), limit=20, buffer=8, penalty=0.5)
    assert punishment.tolist() == pytest.approx([0, 0, -0.125, -0.25, -0.5, -0.5])


@pytest.mark.parametrize("buffer", [1, 7, 20])
def test_the_papers_cases(buffer) -> None:
    """0; ((L_max - L_cache) - |y|) / L_cache; -1: for every length from 0 to 30."""
    for length in range(31):
        if length <= 20 - buffer:
            expected = 0.0
        elif length <= 20:
            expected = (20 - buffer - length) / buffer
        else:
            expected = -1.0
        found = overlong_punishment(torch.tensor([float(length)]), limit=20, buffer=buffer, penalty=1.0)
        assert found.item() == pytest.approx(expected)
