"""log pi of given tokens from BF16 logits, without an FP32 copy of [tokens, V] in forward or backward.

Autograd would keep the FP32 logits for backward and make two gradients of that size. Here a few tokens at a time go
through FP32, in forward and again in backward; kept are the BF16 logits and one number per token. The operations and
their order are autograd's, so value and gradient have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1024  # tokens in FP32 at a time


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / temperature) at the labels; see `token_logprobs`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        normalizers, values = [], []
        for part, chosen in zip(logits.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            scaled = part.float() / temperature
            normalizers.append(scaled.logsumexp(1))
            values.append(scaled.gather(1, chosen[:, None]).squeeze(1) - normalizers[-1])
        ctx.save_for_backward(logits, labels, torch.cat(normalizers))
        ctx.temperature = temperature
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d/dz_v = g (1[v = y] - softmax_v) / temperature, rounded to the logits' dtype."""
        logits, labels, normalizers = ctx.saved_tensors
        out = torch.empty_like(logits)
        for start in range(0, len(logits), AT_ONCE):
            span = slice(start, start + AT_ONCE)
            gradient = gradients[0][span, None]
            scaled = logits[span].float().div_(ctx.temperature)
            scaled.sub_(normalizers[span, None]).exp_().mul_(-gradient)
            scaled.scatter_add_(1, labels[span, None], gradient)
            out[span] = scaled.div_(ctx.temperature)
        return out, None, None


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log softmax(z / temperature)[y], with gradient to z.

    Args:
        logits: [tokens, V] z, any float dtype.
        labels: [tokens] int64, y.
        temperature: above 0.

    Returns:
        [tokens] float32, nats.
    """
    return TokenLogprobs.apply(logits, labels, temperature)
