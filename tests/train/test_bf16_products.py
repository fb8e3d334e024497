"""Claim: BF16 products through FP32 are the hardware's, rounded once, in forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.machine import DEVICE
from tests.tiny import tiny_model
from train.bf16_products import ThroughFp32, compute_through_fp32, native, recomputation

HALF_ULP = 2.0**-8  # of BF16, relative to the value, at most


@pytest.mark.parametrize("product", [nn.functional.linear, lambda x, w: x @ w.T, lambda x, w: torch.matmul(x, w.mT)])
def test_a_product_and_its_gradients_are_the_exact_ones_rounded_once(product):
    torch.manual_seed(0)
    x, w, g = (torch.randn(*shape).bfloat16() for shape in ((33, 64), (48, 64), (33, 48)))
    x.requires_grad_()
    w.requires_grad_()
    with ThroughFp32():
        out = product(x, w)
        to_x, to_w = torch.autograd.grad(out, (x, w), g)
    assert (out.dtype, to_x.dtype, to_w.dtype) == (torch.bfloat16,) * 3
    for got, exact in (
        (out, x.double() @ w.double().T), (to_x, g.double() @ w.double()), (to_w, g.double().T @ x.double()),
    ):  # fmt: skip
        # rounding moves a value by half a unit in its last place; sums near 0 err by FP32's rounding of their terms
        torch.testing.assert_close(got.double(), exact.detach(), rtol=1.001 * HALF_ULP, atol=1e-4)


@pytest.mark.skipif(not DEVICE.flags, reason="the kernel's flags of a CPU are what is compared with")
def test_native_means_the_cpu_lists_instructions_for_bf16():
    """AVX-512 alone is not enough: torch's BF16 products took 4 times as long as FP32's there (Intel Cascade Lake)."""
    assert native(torch.device("cpu")) == bool({"avx512_bf16", "amx_tile"} & DEVICE.flags)
    assert native(torch.device("cuda"))


def test_other_dtypes_are_left_alone():
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    with ThroughFp32():
        assert torch.equal(nn.functional.linear(x, w), x @ w.T)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_computes_the_same_to_bf16_rounding(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    wide = copy.deepcopy(model)
    compute_through_fp32(wide)
    ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for module in (model, wide):
        logits = module(input_ids=ids, use_cache=False).logits
        assert logits.dtype == torch.bfloat16
        logits.float().logsumexp(-1).sum().backward()
        found.append((logits, module.model.layers[0].mlp.up_proj.weight.grad))
    (one, gradient), (other, wide_gradient) = found
    assert (one - other).abs().max() < 8 * HALF_ULP * one.abs().max()
    assert (gradient - wide_gradient).norm() < 0.02 * gradient.norm()


def test_a_copy_computes_with_its_own_weights_and_is_saved_under_its_own_name(tmp_path):
    model = tiny_model()
    compute_through_fp32(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(other(input_ids=ids).logits, before)
    other.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Qwen3ForCausalLM"]


def test_checkpointed_layers_are_recomputed_through_fp32_too():
    """The gradients of a model whose layers are checkpointed are those of one without, bit for bit."""
    ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointed in (False, True):
        model = tiny_model()
        compute_through_fp32(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputation})
            model.train()
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
