"""FP8 blocks on any CPU, for tests: what vLLM's GPU kernels for them compute, in torch; all around it is vLLM's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def choose_block_kernel(patch: pytest.MonkeyPatch) -> None:
    """Every linear layer in 128 x 128 blocks of FP8 is multiplied by `apply_block_scaled_mm` below."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class TorchBlockScaledMMKernel(Fp8BlockScaledMMLinearKernel):
        """Per block of 128 columns: an exact FP8 product summed in FP32, times both scales."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, *operands: Tensor, **named: Tensor) -> Tensor:
            """[M, K], [N, K], [M, K / 128], [N / 128, K / 128] -> [M, N] BF16."""
            x, codes, x_scale, scale = (*operands, *named.values())
            parts: Any = zip(x.float().split(128, 1), codes.float().split(128, 1), strict=True)
            rows = scale.repeat_interleave(128, 0)[: len(codes)]
            products = [a @ b.t() * x_scale[:, k : k + 1] * rows[:, k] for k, (a, b) in enumerate(parts)]
            return torch.stack(products).sum(0).bfloat16()

    patch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, [TorchBlockScaledMMKernel])
