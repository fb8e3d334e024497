"""KL between two models' next-token distributions from BF16 logits, without an FP32 copy of [tokens, V].

As in token_logprobs.py: a few tokens at a time go through FP32, in forward and again in backward, with autograd's own
operations in its order, so that the gradient has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 256  # tokens in FP32 at a time; four times [256, V] are held


class TokenKl(torch.autograd.Function):
    """sum_t KL(softmax(teacher / T) || softmax(student / T)); see `kl_divergence`."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), device=student.device)
        for one, other in zip(teacher.split(AT_ONCE), student.split(AT_ONCE), strict=True):
            p, q = ((part.float() / temperature).log_softmax(1) for part in (one, other))
            total += (p.exp() * (p - q)).sum()
        ctx.save_for_backward(teacher, student)
        ctx.temperature = temperature
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """d/dz_v = g (softmax(student)_v - softmax(teacher)_v) / T, rounded to the logits' dtype."""
        teacher, student = ctx.saved_tensors
        out = torch.empty_like(student)
        for start in range(0, len(student), AT_ONCE):
            span = slice(start, start + AT_ONCE)
            p, q = ((part[span].float() / ctx.temperature).log_softmax(1) for part in (teacher, student))
            gradient = p.exp_().mul_(-gradients[0])
            out[span] = torch._log_softmax_backward_data(gradient, q, 1, torch.float32).div_(ctx.temperature)
        return None, out, None


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """sum_t KL(p_t || q_t) = sum_t sum_v p_t(v) (log p_t(v) - log q_t(v)) over the whole vocabulary, with p_t and q_t
    the softmax of the logits over the temperature.

    The *sum*, so that micro-batches add up. Its gradient at the student's logits is (q - p) / temperature, token by
    token; the teacher is constant.

    Args:
        teacher: [tokens, V] logits of p, any float dtype.
        student: [tokens, V] logits of q, with gradient.
        temperature: above 0.

    Returns:
        Scalar float32, nats, >= 0 up to rounding.
    """
    return TokenKl.apply(teacher.detach(), student, temperature)
