"""The KL a few tokens at a time: its definition, the same gradient as autograd's, in much less memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.token_kl import AT_ONCE, kl_divergence

ROOT = Path(__file__).parent.parent.parent


def test_by_hand_and_by_loops() -> None:
    """(0.5, 0.5) against (0.25, 0.75): 0.5 ln 2 + 0.5 ln(2/3) = 0.1438; and a random [3, 5] against plain loops."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q, 1.0).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    torch.manual_seed(0)
    p, q = torch.randn(3, 5).log_softmax(1), torch.randn(3, 5).log_softmax(1)
    loops = sum(math.exp(p[t, v]) * (p[t, v].item() - q[t, v].item()) for t in range(3) for v in range(5))
    assert kl_divergence(p, q, 1.0).item() == pytest.approx(loops, rel=1e-5)
    assert kl_divergence(p, p, 0.7).item() == 0


def test_it_moves_the_student_alone() -> None:
    """The gradient at the student's logits is (q - p) / T, none reaches the teacher, and a step down lowers the KL."""
    torch.manual_seed(0)
    teacher, student = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    before = kl_divergence(teacher, student, 0.7)
    before.backward()
    assert teacher.grad is None
    assert student.grad is not None
    q, p = (student / 0.7).softmax(1), (teacher / 0.7).softmax(1)
    torch.testing.assert_close(student.grad, ((q - p) / 0.7).detach())
    assert kl_divergence(teacher, student - 0.1 * student.grad, 0.7) < before


def plain(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """By autograd, over [tokens, V] in FP32."""
    p, q = ((logits.float() / temperature).log_softmax(1) for logits in (teacher, student))
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 96), (5, 96), (AT_ONCE + 30, 96), (2 * AT_ONCE, 500)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_autograds(tokens, vocabulary, temperature) -> None:
    """Bit for bit, BF16 logits, less and more tokens than go through FP32 at a time; the sum to rounding."""
    draw = torch.Generator().manual_seed(0)
    teacher, logits = ((3 * torch.randn(tokens, vocabulary, generator=draw)).bfloat16() for _ in range(2))
    expected_at, found_at = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, found = plain(teacher, expected_at, temperature), kl_divergence(teacher, found_at, temperature)
    (0.3 * expected).backward()
    (0.3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected_at.grad is not None
    assert found_at.grad is not None
    assert torch.equal(found_at.grad, expected_at.grad)


PEAK = """
import re, sys, torch
from pathlib import Path
from tests.train.test_token_kl import plain
from train.token_kl import kl_divergence
teacher = torch.zeros(8192, 8192, dtype=torch.bfloat16)
student = torch.zeros(8192, 8192, dtype=torch.bfloat16, requires_grad=True)
def peak():  # of this program, in MiB
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
{"lean": kl_divergence, "plain": plain}[sys.argv[1]](teacher, student, 1.0).backward()
print(peak() - before)
"""


def test_it_holds_no_copy_in_fp32() -> None:
    """8192 tokens over a vocabulary of 8192, 128 MiB of logits on each side: forward and backward add less than a
    quarter of what autograd's own adds."""
    added = {
        kind: float(
            subprocess.run(
                [sys.executable, "-c", PEAK, kind], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for kind in ("lean", "plain")
    }
    assert added["lean"] < added["plain"] / 4, added
