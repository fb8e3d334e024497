"""BF16 matrix products on a CPU without BF16 instructions: computed in FP32, rounded once, as the hardware would.

There torch multiplies BF16 matrices in a scalar loop, fifty times slower than FP32 ones (AMD Zen 3, torch 2.13), or,
with AVX-512, by instructions for FP32, three to five times slower (Intel Cascade Lake). The product of two BF16 numbers
is exact in FP32, and BF16 hardware adds them up in FP32 too, so that the results are the same but for the order of the
sum.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {
        nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm,
        nn.functional.scaled_dot_product_attention,
    }
)  # fmt: skip


def native(device: torch.device) -> bool:
    """Whether torch multiplies BF16 matrices by instructions made for it.

    On x86 oneDNN says yes to AVX-512 alone, so the instructions themselves are asked for.
    """
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class ThroughFp32(TorchFunctionMode):
    """While it is on, BF16 products are computed in FP32 and rounded to BF16, forward and backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        return func(*map(_wide, args), **_wide_values(kwargs)).to(torch.bfloat16)


def compute_through_fp32(module: nn.Module) -> None:
    """Have a module's forward pass, and the backward pass of it, run under `ThroughFp32`; its weights stay BF16.

    By a subclass of its class, so that a copy of the module computes with its own weights.
    """
    plain = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ThroughFp32():
            return plain.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, plain.forward)
    # the name goes into a saved model's config.json
    module.__class__ = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})


def recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What torch's checkpoint runs its forward pass and its recomputation under: the second happens in the backward
    pass, outside the module's forward."""
    return nullcontext(), ThroughFp32()


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _wide_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _wide(value) for name, value in values.items()}
