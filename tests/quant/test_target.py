"""The target's tensors: against the scheme's definition, against llm-compressor, against themselves read back."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from quant.config import QuantConfig, TargetError, TargetSpec, shipped
from quant.export import read_tensors
from quant.target import Target, changed_codes
from quant.verify import digest
from tests.tiny import tiny_folder, tiny_model

SPEC = TargetSpec.load("int4-g128")


def test_codes_and_scales_follow_the_definition() -> None:
    """scale = bf16(amax / 7.5) per 128 columns, code = clamp(round(w / scale), -8, 7): worked in plain torch."""
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    packed = dict(target.compress(model.named_parameters()))
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_parameter(f"{name}.weight").detach()
    groups = weight.unflatten(-1, (-1, 128))
    scale = (groups.abs().amax(-1).float() / 7.5).bfloat16()
    codes = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    assert torch.equal(packed[f"{name}.weight_scale"], scale)
    assert torch.equal(unpack_from_int32(packed[f"{name}.weight_packed"], 4, weight.shape), codes)
    deployed = target.dequantize(packed)[f"{name}.weight"]
    assert torch.equal(deployed, (codes.unflatten(-1, (-1, 128)) * scale[..., None]).flatten(1).bfloat16())


def edge_case_model(**shape: Any):
    """Outlier channels, a zero row, a constant row, one huge value."""
    model = tiny_model(outlier_scale=16, num_key_value_heads=2, **shape)
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        weight[0], weight[1], weight[2, 5] = 0, 0.37, 1000
    return model


def ones(target: Target) -> dict[str, torch.Tensor]:
    return dict.fromkeys(target.static_scales, torch.ones(1))


@pytest.mark.parametrize("name", shipped())
def test_bit_exact_with_llm_compressor(tmp_path, name) -> None:
    """llm-compressor's own data-free result has the same tensors, bit for bit, for every shipped target: random,
    zero, constant and outlier weights. (Calibrated activations are left out: they are not data-free.)"""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from quant.export import read_tensors

    spec = TargetSpec.load(name)
    model = edge_case_model(num_hidden_layers=3)
    target = Target.for_model(spec, model)
    scales = ones(target)
    ours = {k: v for k, v in target.compress(model.named_parameters(), scales) if k not in scales}
    tiny_folder(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    scheme = target.scheme.model_copy(deep=True)
    if scales:
        scheme.input_activations = None
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=list(target.ignore))
    oneshot(model=str(tmp_path / "model"), recipe=recipe, output_dir=str(tmp_path / "theirs"))
    theirs = dict(read_tensors(tmp_path / "theirs"))
    assert set(ours) == set(theirs)
    assert {k: digest(v) for k, v in ours.items()} == {k: digest(v) for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["int4-g64", "int4-g128-asym", "int8", "fp8-static", "fp8-block", "nvfp4-a16"])
def test_batching_rows_changes_no_bit(monkeypatch, name) -> None:
    """Matrices quantized together, one by one, or a row at a time give the same tensors."""
    model = edge_case_model()
    target = Target.for_model(TargetSpec.load(name), model)
    together = dict(target.compress(model.named_parameters(), ones(target)))
    for elements in (1, 5_000):
        monkeypatch.setattr("quant.target.BATCH_ELEMENTS", elements)
        pieces = dict(target.compress(model.named_parameters(), ones(target)))
        assert {k: digest(v) for k, v in pieces.items()} == {k: digest(v) for k, v in together.items()}


@pytest.mark.parametrize("name", shipped())
def test_deployed_weights_without_packing_are_the_same(name) -> None:
    """Q(W) straight from the weights and Q(W) read from the packed tensors are equal, bit for bit."""
    model = edge_case_model(num_hidden_layers=3)
    target = Target.for_model(TargetSpec.load(name), model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    packed = target.dequantize(dict(target.compress(weights.items(), ones(target))))
    straight = target.deployed(weights)
    assert straight.keys() == packed.keys()
    assert all(torch.equal(straight[name] + 0.0, packed[name] + 0.0) for name in packed)


def test_every_target_is_near_and_the_order_is_the_expected_one() -> None:
    """Relative error ||Q(W) - W|| / ||W|| over all quantized weights: 8 bits beat 4, finer groups beat coarser ones, a
    zero point beats none."""
    model = tiny_model(outlier_scale=16, num_key_value_heads=2)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def error(name: str) -> float:
        deployed = Target.for_model(TargetSpec.load(name), model).deployed(weights)
        off = torch.cat([(deployed[n].float() - weights[n].float()).flatten() for n in deployed])
        return (off.norm() / torch.cat([weights[n].float().flatten() for n in deployed]).norm()).item()

    assert max(map(error, ("int8", "fp8-dynamic", "fp8-block", "mxfp8"))) < 0.04
    assert error("int4-g32") < error("int4-g64") < error("int4-g128") <= error("int4-channel") < 0.5
    assert error("int4-g128-asym") < error("int4-g128")
    assert error("nvfp4-a16") < error("mxfp4") < error("int4-g128")


def test_experts_are_quantized_one_by_one(tmp_path) -> None:
    """Qwen3-MoE holds its experts stacked; the target's tensors are those of every expert's own matrices, under the
    names a checkpoint has, the router stays BF16, and `deployed` keeps the stacks."""
    model = tiny_model(family="qwen3-moe")
    target = Target.for_model(TargetSpec.load("int4-g32"), model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    packed = dict(target.compress(weights.items()))
    model.save_pretrained(tmp_path)
    saved = dict(read_tensors(tmp_path))
    single = {name: w for name, w in saved.items() if name.removesuffix(".weight") in target.shapes}
    assert len([name for name in single if ".experts." in name]) == 3 * model.config.num_experts * 2
    for name, weight in single.items():
        module = name.removesuffix(".weight")
        groups = weight.unflatten(-1, (-1, 32))
        scale = (groups.abs().amax(-1).float() / 7.5).bfloat16()
        assert torch.equal(packed[f"{module}.weight_scale"], scale)
        value = ((groups / scale[..., None]).round().clamp(-8, 7) * scale[..., None]).flatten(1).bfloat16()
        assert torch.equal(target.dequantized(module, packed) + 0.0, value + 0.0)
    kept = {name for name in saved if name not in single}
    assert kept == {name for name in packed if name.rpartition(".")[0] not in target.shapes}
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.input_layernorm.weight"} <= kept
    deployed = target.deployed(weights)
    stack = deployed["model.layers.0.mlp.experts.gate_up_proj"]
    width = model.config.moe_intermediate_size
    assert torch.equal(stack[3, width:] + 0.0, target.dequantized("model.layers.0.mlp.experts.3.up_proj", packed) + 0.0)


def test_ends_and_patterns_stay_in_bf16() -> None:
    """`keep_first_layers`, `keep_last_layers` and patterns leave whole blocks or projections alone, and the checkpoint
    says so in words vLLM reads."""
    model = tiny_model(num_hidden_layers=4)
    target = Target.for_model(TargetSpec.load("int4-g128-mixed"), model)
    assert {name.split(".")[2] for name in target.modules} == {"1", "2"}
    assert r"re:model\.layers\.3\." in target.quantization_config()["ignore"]
    own = QuantConfig(target="int4-g128", ignore=(r"re:.*down_proj$",)).spec()
    assert not any("down_proj" in name for name in Target.for_model(own, model).modules)
    with pytest.raises(TargetError, match=r"keeps every one of the model's 2 decoder layers"):
        Target.for_model(TargetSpec.load("int4-g128-mixed"), tiny_model())


def test_half_of_a_fused_projection_is_refused() -> None:
    """vLLM multiplies q, k and v as one matrix: keeping q alone in BF16 is named with the module that is in the way."""
    spec = QuantConfig(target="int4-g128", ignore=(r"re:.*q_proj$",)).spec()
    with pytest.raises(TargetError, match=r"k_proj but not .*q_proj, which vLLM multiplies as one matrix"):
        Target.for_model(spec, tiny_model())


def test_calibrated_scales_must_be_there() -> None:
    """A target with static activations or an FP8 KV cache is not compressed without its scales."""
    model = tiny_model()
    target = Target.for_model(QuantConfig(target="int4-g128", kv_cache="fp8").spec(), model)
    assert target.static_scales == {f"model.layers.{i}.self_attn.{w}_scale" for i in (0, 1) for w in "kv"}
    with pytest.raises(ValueError, match=r"do not fit int4-g128: .*layers\.0\.self_attn\.k_scale"):
        list(target.compress(model.named_parameters()))
    assert target.quantization_config()["kv_cache_scheme"]["num_bits"] == 8
    static = Target.for_model(TargetSpec.load("fp8-static"), model)
    assert len(static.static_scales) == 14
    assert Target.for_model(TargetSpec.load("nvfp4"), model).static_scales == {
        f"{module}.input_global_scale" for module in static.modules
    }


def test_fp32_masters_are_refused() -> None:
    """Quantizing masters instead of the BF16 rounding would give codes that serving never sees."""
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    with pytest.raises(ValueError, match=r"BF16-rounded weights, got torch.float32"):
        list(target.compress(model.float().named_parameters()))


def test_embeddings_norms_and_head_stay() -> None:
    """Only the linear layers inside the blocks are quantized; all else is passed through unchanged."""
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    packed = dict(target.compress(model.named_parameters()))
    kept = {name for name in packed if not name.startswith(tuple(f"{m}." for m in target.modules))}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= kept
    assert len(target.modules) == 14
    assert all(torch.equal(packed[name], model.get_parameter(name)) for name in kept)


def test_changed_codes_counts_codes() -> None:
    """Flipping the sign of one weight of 131,072 quantized ones changes exactly one code."""
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    before = dict(target.compress(model.named_parameters()))
    assert changed_codes(before, before) == 0.0
    total = sum(8 * t.numel() for n, t in before.items() if n.endswith("weight_packed"))
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
        row = weight[0]
        largest_but_one = row.abs().topk(2).indices[1]
        row[largest_but_one] *= -1
    after = dict(target.compress(model.named_parameters()))
    assert changed_codes(before, after) == pytest.approx(1 / total)


@pytest.mark.parametrize("name", ["int8", "fp8-dynamic", "nvfp4-a16", "w4a8"])
def test_changed_codes_in_every_format(name) -> None:
    """Flipping the sign of one weight that no scale depends on changes one code, counted as one of all codes whether
    they are packed or not."""
    model = tiny_model()
    target = Target.for_model(TargetSpec.load(name), model)
    before = dict(target.compress(model.named_parameters()))
    with torch.no_grad():
        group = model.get_parameter("model.layers.0.self_attn.o_proj.weight")[0, :16]
        group[group.abs().topk(2).indices[1]] *= -1
    after = dict(target.compress(model.named_parameters()))
    total = sum(rows * width for rows, width in target.shapes.values())
    assert changed_codes(before, after) == pytest.approx(1 / total)


def test_width_that_does_not_fit_the_group_is_named() -> None:
    """Hidden size 96 with groups of 128: the module, its width and what it must be a multiple of are in the message."""
    with pytest.raises(TargetError, match=r"q_proj: input width 96 is not a multiple of 128"):
        Target.for_model(SPEC, tiny_model(hidden_size=96))


def test_blocks_must_fit() -> None:
    """A key projection of 64 rows under blocks of 128 x 128: vLLM could not load it, so it is refused by name."""
    with pytest.raises(TargetError, match=r"k_proj: 64 output rows are not a multiple of 128, as fp8-block needs"):
        Target.for_model(TargetSpec.load("fp8-block"), tiny_model())


GOOD = """name = "mine"
description = "x"
[weights]
num_bits = 4
type = "int"
strategy = "group"
group_size = 64
[needs]
cpu = ["avx512f"]
"""


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("group_size = 64", "group_size = 48", "group_size must be a multiple of 32"),
        ("group_size = 64", "", "group_size goes with strategy 'group'"),
        ("num_bits = 4", "num_bits = 3", r"weights\.num_bits: Input should be 4 or 8, got 3"),
        ("num_bits = 4", "num_bits = 4\ndynamic = true", "weights are static"),
        ('strategy = "group"', 'strategy = "block"', "block_structure goes with strategy 'block'|group_size goes"),
        ('description = "x"', 'description = "x"\nignore = ["re:("]', "is not a regular expression"),
        (
            "[needs]",
            '[input_activations]\nnum_bits = 8\ntype = "int"\nstrategy = "tensor"\nsymmetric = false\n[needs]',
            "static input_activations are calibrated symmetrically, with strategy 'tensor', got .* symmetric False",
        ),
        ("[needs]", "[neads]", "needs: Field required|neads"),
        ("num_bits = 4", "num_bits = ", "not valid TOML"),
    ],
)
def test_target_files(tmp_path, line, instead, message) -> None:
    """A user's own file works by path; a bad one is named with the field, what is allowed and what was given."""
    own = tmp_path / "mine.toml"
    own.write_text(GOOD)
    assert TargetSpec.load(str(own)).weights.group_size == 64
    own.write_text(GOOD.replace(line, instead))
    with pytest.raises(TargetError, match=message) as caught:
        TargetSpec.load(str(own))
    assert str(own) in str(caught.value)


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"'int3'; known: fp8-block, .*int4-g128"):
        TargetSpec.load("int3")
