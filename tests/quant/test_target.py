"""The target's tensors: against the scheme's definition, against llm-compressor, against themselves read back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from quant.config import TargetError, TargetSpec
from quant.target import Target, changed_codes
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


def test_bit_exact_with_llm_compressor(tmp_path) -> None:
    """llm-compressor's own data-free W4A16 writes the same packed codes and scales, outliers included."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from quant.export import read_tensors

    model = tiny_model(outlier_scale=16)
    with torch.no_grad():  # edge cases: a zero group, a constant group, one huge value
        weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        weight[0], weight[1], weight[2, 5] = 0, 0.37, 1000
    ours = dict(Target.for_model(SPEC, model).compress(model.named_parameters()))
    tiny_folder(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    recipe = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    oneshot(model=str(tmp_path / "model"), recipe=recipe, output_dir=str(tmp_path / "theirs"))
    theirs = dict(read_tensors(tmp_path / "theirs"))
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def test_batching_rows_changes_no_bit(monkeypatch) -> None:
    """Matrices quantized together or one by one give the same tensors."""
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    together = dict(target.compress(model.named_parameters()))
    monkeypatch.setattr("quant.target.BATCH_ELEMENTS", 1)
    alone = dict(target.compress(model.named_parameters()))
    assert set(together) == set(alone)
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert all(torch.equal(w, target.dequantize(alone)[n]) for n, w in target.dequantize(together).items())


def test_deployed_weights_without_packing_are_the_same() -> None:
    """Q(W) straight from the weights and Q(W) read from the packed tensors are equal, bit for bit."""
    model = tiny_model(outlier_scale=16)
    target = Target.for_model(SPEC, model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0] = 0
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    packed = target.dequantize(dict(target.compress(weights.items())))
    straight = target.deployed(weights)
    assert straight.keys() == packed.keys()
    assert all(torch.equal(straight[name] + 0.0, packed[name] + 0.0) for name in packed)


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


def test_width_that_does_not_fit_the_group_is_named() -> None:
    """Hidden size 96 with groups of 128: the module, its width and the group size are in the message."""
    with pytest.raises(TargetError, match=r"q_proj: input width 96 .* group size 128"):
        Target.for_model(SPEC, tiny_model(hidden_size=96))


def test_target_files(tmp_path) -> None:
    """A user's own file works by path; an unknown name and a bad field are named with what is allowed."""
    own = tmp_path / "mine.toml"
    own.write_text('name = "mine"\ndescription = "x"\n[weights]\ngroup_size = 64\n')
    assert TargetSpec.load(str(own)).weights.group_size == 64
    with pytest.raises(TargetError, match=r"'int3'; known: int4-g128"):
        TargetSpec.load("int3")
    own.write_text('name = "mine"\ndescription = "x"\n[weights]\ngroup_size = 48\n')
    with pytest.raises(TargetError, match="multiple of 32"):
        TargetSpec.load(str(own))
    own.write_text('name = "mine"\ndescription = "x"\n[weights]\nnum_bits = 3\n')
    with pytest.raises(TargetError, match=r"weights\.num_bits: Input should be 4, got 3"):
        TargetSpec.load(str(own))
