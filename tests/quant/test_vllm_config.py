"""vLLM's own parser reads every target's `quantization_config` and recognizes the scheme, kernel or not."""

from __future__ import annotations

from typing import Any

import pytest

from quant.config import QuantConfig, TargetSpec, shipped
from quant.target import Target
from tests.tiny import tiny_model

pytestmark = pytest.mark.engine

# which of vLLM's own tests on (weights, activations) must say yes
RECOGNIZED = {
    "fp8-block": "_is_fp8_w8a8",
    "fp8-dynamic": "_is_fp8_w8a8",
    "fp8-static": "_is_fp8_w8a8",
    "int4-channel": "_is_wNa16_group_channel",
    "int4-g128": "_is_wNa16_group_channel",
    "int4-g128-asym": "_is_wNa16_group_channel",
    "int4-g128-mixed": "_is_wNa16_group_channel",
    "int4-g32": "_is_wNa16_group_channel",
    "int4-g64": "_is_wNa16_group_channel",
    "int8": "_is_dynamic_token_w8a8",
    "mxfp4": "_is_mxfp4",
    "mxfp8": "_is_mxfp8",
    "nvfp4": "_is_nvfp4_format",
    "nvfp4-a16": "_is_nvfp4_format",
    "w4a8": "_is_dynamic_token_w4a8_int",
    "w4a8-fp8": "_is_fp8_w4a8",
}
WEIGHTS_ONLY = {"_is_mxfp4", "_is_mxfp8", "_is_nvfp4_format"}


def parsed(spec: TargetSpec) -> Any:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    return CompressedTensorsConfig.from_config(
        Target.for_model(spec, tiny_model(num_hidden_layers=3, num_key_value_heads=2)).quantization_config()
    )


def test_the_table_names_every_target() -> None:
    assert set(RECOGNIZED) == set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_vllm_recognizes_the_scheme(name) -> None:
    """vLLM's predicate for the scheme that this target is meant for holds, the checkpoint format is the target's, and
    activations are parsed as the target has them; of the block formats no other one claims it."""
    spec = TargetSpec.load(name)
    config = parsed(spec)
    (scheme,) = config.target_scheme_map.values()
    weights, inputs = scheme["weights"], scheme["input_activations"]
    predicate = RECOGNIZED[name]
    assert getattr(config, predicate)(*([weights] if predicate in WEIGHTS_ONLY else [weights, inputs]))
    assert [other for other in sorted(WEIGHTS_ONLY) if getattr(config, other)(weights)] == [
        other for other in sorted(WEIGHTS_ONLY) if other == predicate
    ]
    assert (inputs is None) == (spec.input_activations is None)
    assert (
        config.quant_format
        == Target.for_model(spec, tiny_model(num_hidden_layers=3, num_key_value_heads=2)).scheme.format
    )
    assert config.kv_cache_scheme is None


def test_vllm_reads_the_kv_cache_and_what_is_kept() -> None:
    """An FP8 KV cache and layers kept in BF16 are in the parsed config; a kept layer gets no scheme."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    config = parsed(QuantConfig(target="int4-g128-mixed", kv_cache="fp8").spec())
    assert config.kv_cache_scheme["num_bits"] == 8
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    kept = {
        layer: should_ignore_layer(layer, ignore=config.ignore, fused_mapping=fused)
        for layer in ("model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj", "lm_head",
                      "model.layers.2.mlp.down_proj", "model.layers.1.mlp.gate")
    }  # fmt: skip
    assert list(kept.values()) == [True, False, True, True, True]
