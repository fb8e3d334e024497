"""What a kernel's BF16 answers say of the codes behind them, on CPUs that round products and on those that cut them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.vllm_worker import _cut_off, _explained

INT4, INT8 = range(-8, 8), range(-128, 128)


def written(product: Tensor, *, cut: bool) -> Tensor:
    """FP32 products as a kernel leaves them: BF16, toward zero or to the nearest."""
    return _cut_off(product) if cut else product.bfloat16().float()


@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut off"])
@pytest.mark.parametrize(("codes", "multiple"), [(INT4, 1.0), (INT8, 127.0)], ids=["int4", "int8"])
def test_every_code_is_told_at_every_scale(codes: range, multiple: float, cut: bool) -> None:
    """All codes times all 128 BF16 significands of a scale, and a row of zeros: code * scale comes back exactly."""
    scales = torch.cat([1 + torch.arange(128.0) / 128, torch.zeros(1)]).mul(2.0**-9).unsqueeze(1)
    weights = scales * torch.tensor(list(codes), dtype=torch.float32)
    answer = written(multiple * weights, cut=cut)
    assert torch.equal(_explained(answer, multiple, scales), weights)


@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut off"])
def test_an_answer_that_no_code_explains_is_not_a_number(cut: bool) -> None:
    """A product that is 3% off at one element of a matrix is never passed off as a weight."""
    scales = (torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) + 1).bfloat16().float()
    codes = torch.randint(-8, 8, (64, 128), generator=torch.Generator().manual_seed(1)).float()
    codes[3, 5] = 7
    answer = written(codes * scales, cut=cut)
    answer[3, 5] *= 1 + 2.0**-5
    assert _explained(answer, 1.0, scales)[3, 5].isnan()
