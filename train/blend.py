"""`blend`: the multiplier as the share of quantization that the trainer sees. Ours, not a paper's.

The trainer runs forward and backward at W + lambda (Q(W) - W) and the gradient goes straight through to W. At
lambda = 0 this is plain RL on deployed rollouts, at lambda = 1 a fully straight-through quantized trainer. The
deployed engine moves with the weights (it samples from Q(W)), so only a term whose gradient passes through the
quantizer can lower the gap; this one needs no second forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def blended(weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """W + lambda (Q(W) - W), computed in FP32 and rounded to BF16; exactly W at 0 and exactly Q(W) at 1.

    Args:
        weights: name to BF16 weight.
        deployed: name to BF16 Q(W), for the quantized names only; the others are not blended.
        share: lambda in [0, 1].

    Returns:
        Name to BF16 weight, the keys of `weights`.

    Raises:
        ValueError: lambda outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of quantization must be in [0, 1], got {share}")
    mixed = dict(weights)
    for name, quantized in deployed.items():
        mixed[name] = torch.lerp(weights[name].float(), quantized.float(), share).to(torch.bfloat16)
    return mixed
