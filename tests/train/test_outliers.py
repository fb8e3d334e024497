"""Outlier channels: the function stays, quantization hurts."""

import copy

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from train.outliers import inject_outliers


def test_a_mixture_of_experts_is_preserved_too() -> None:
    """Stacked experts and the router under S = 16: not one logit changes, every expert's columns do."""
    plain, spiked = (tiny_model(family="qwen3-moe") for _ in range(2))
    inject_outliers(spiked, 16, seed=1)
    ids = torch.randint(0, 64, (4, 12))
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, spiked(ids).logits)
    name = "model.layers.0.mlp.experts.down_proj"
    ratio = spiked.get_parameter(name).abs().amax((1, 2)) / plain.get_parameter(name).abs().amax((1, 2))
    assert (ratio > 4).all()


def test_function_is_preserved_bit_for_bit_and_quantization_error_grows() -> None:
    """In BF16, S = 16 leaves every logit identical and multiplies the INT4 error of the logits at least by 3."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}  # fmt: skip
    plain = Qwen3ForCausalLM(Qwen3Config(**shape)).bfloat16()
    spiked = copy.deepcopy(plain)
    inject_outliers(spiked, 16, seed=1)
    ids = torch.randint(0, 64, (4, 12))
    with torch.no_grad():
        before, after = plain(ids).logits, spiked(ids).logits
        assert torch.equal(before, after)
        errors = []
        for model in (plain, spiked):
            target = Target.for_model(TargetSpec.load("int4-g128"), model)
            deployed = target.dequantize(dict(target.compress(model.named_parameters())))
            for name, weight in deployed.items():
                model.get_parameter(name).copy_(weight)
            errors.append((model(ids).logits - before).float().abs().mean().item())
    assert errors[1] > 3 * errors[0]
