"""`blend`: the multiplier as the share of quantization that the trainer sees. Ours, not a paper's.

The trainer runs forward and backward at W + lambda (Q(W) - W) and the gradient goes straight through to W. At
lambda = 0 this is plain RL on deployed rollouts, at lambda = 1 a fully straight-through quantized trainer. The
deployed engine moves with the weights (it samples from Q(W)), so only a term whose gradient passes through the
quantizer can lower the gap; this one needs no second forward. `straight-through` is the same at a fixed lambda of 1,
the quantization-aware trainer: the baseline to beat. With one multiplier per transformer block, each block is blended
by its own (`train.multiplier.BlockMultipliers`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def blended(
    weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], share: float | Mapping[str, float]
) -> dict[str, Tensor]:
    """W + lambda (Q(W) - W), computed in FP32 and rounded to BF16; exactly W at 0 and exactly Q(W) at 1.

    Args:
        weights: name to BF16 weight.
        deployed: name to BF16 Q(W), for the quantized names only; the others are not blended.
        share: lambda in [0, 1], one for all or one for each name in `deployed`.

    Returns:
        Name to BF16 weight, the keys of `weights`.

    Raises:
        ValueError: lambda outside [0, 1].
    """
    shares = share if isinstance(share, Mapping) else dict.fromkeys(deployed, share)
    for value in (share,) if isinstance(share, int | float) else share.values():
        if not 0 <= value <= 1:
            raise ValueError(f"the share of quantization must be in [0, 1], got {value}")
    mixed = dict(weights)
    for name, quantized in deployed.items():
        mixed[name] = torch.lerp(weights[name].float(), quantized.float(), shares[name]).to(torch.bfloat16)
    return mixed
