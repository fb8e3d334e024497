"""Calibration: static scales equal llm-compressor's bit for bit; exports by recipe verify, load and beat rounding."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.calibrate import CalibrationError, calibrated_export, static_scales
from quant.config import TargetError, TargetSpec
from quant.export import read_tensors, verify_export
from quant.recipes import Recipe, recipe_refusal
from quant.target import Target
from quant.verify import VerificationError
from tests.machine import INT4, first_that_runs
from tests.tiny import Family, tiny_folder, tiny_model

FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": "static_minmax"}


def bound(name: str, model: Any, **changes: Any) -> Target:
    return Target.for_model(TargetSpec.load(name).model_copy(update=changes), model)


def sequences(count: int = 48, *, seed: int = 0) -> list[list[int]]:
    """Token ids of 8 to 39 tokens, each drawn near the one before: activations are correlated, as on text."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(8, 40, (count,), generator=generator).tolist():
        steps = torch.randint(-3, 4, (length,), generator=generator)
        found.append((3 + (torch.randint(0, 90, (1,), generator=generator) + steps.cumsum(0)) % 90).tolist())
    return found


def one_by_one(sequences: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids in sequences]


def padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return ids, mask


def loaded(folder: Path) -> Any:
    """The folder's model with the attention that llm-compressor calibrates under."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def oneshot_scales(folder: Path, data: list[list[int]], out: Path, scheme: str, **options: Any) -> dict[str, Tensor]:
    """Tensors of llm-compressor's own checkpoint, calibrated on the BF16 model's activations."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    kv = options.pop("kv_cache_scheme", None)
    oneshot(
        model=str(folder),
        recipe=QuantizationModifier(
            targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*mlp.gate$"], kv_cache_scheme=kv
        ),
        dataset=Dataset.from_dict({"input_ids": data}),
        num_calibration_samples=len(data),
        shuffle_calibration_samples=False,
        pipeline="basic",
        output_dir=str(out),
        **options,
    )
    return dict(read_tensors(out))


@pytest.mark.parametrize(
    ("family", "target", "scheme", "kv"),
    [
        ("qwen3", "fp8-static", "FP8", "fp8"),
        ("qwen2", "fp8-static", "FP8", "bf16"),
        ("llama", "nvfp4", "NVFP4", "bf16"),
        ("qwen3", "nvfp4", "NVFP4", "fp8"),
    ],
)
def test_static_scales_are_bit_exact_with_llm_compressor(tmp_path, family, target, scheme, kv) -> None:
    """Every calibrated tensor of llm-compressor's FP8, NVFP4 and FP8 KV cache checkpoints, in value and dtype."""
    folder = tiny_folder(tmp_path / "model", family=family, outlier_scale=16)
    model = loaded(folder)
    data = sequences(12)
    ours = static_scales(model, bound(target, model, kv_cache=kv), one_by_one(data))
    theirs = oneshot_scales(folder, data, tmp_path / "out", scheme, kv_cache_scheme=FP8_KV if kv == "fp8" else None)
    calibrated = {n for n in theirs if n.endswith((".input_scale", ".input_global_scale", ".k_scale", ".v_scale"))}
    assert ours.keys() == calibrated
    assert len(ours) == 14 + (4 if kv == "fp8" else 0)
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []


def test_experts_are_bit_exact_with_llm_compressor(tmp_path) -> None:
    """Stacked experts: each one's input scales from the tokens routed to it, as llm-compressor has them when it takes
    the stack apart and routes as the model does."""
    folder = tiny_folder(tmp_path / "model", family="qwen3-moe")
    model = loaded(folder)
    data = sequences(12)
    ours = static_scales(model, bound("fp8-static", model), one_by_one(data))
    theirs = oneshot_scales(folder, data, tmp_path / "out", "FP8", moe_calibrate_all_experts=False)
    assert len(ours) == 2 * (4 + 3 * 8)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_an_expert_without_tokens_takes_the_largest_of_its_layer() -> None:
    """One token reaches 2 of 8 experts; the other 6 get the larger of these two scales, projection by projection."""
    model = tiny_model(family="qwen3-moe")
    scales = static_scales(model, bound("fp8-static", model), one_by_one([[5]]))
    for part in ("gate_proj", "up_proj", "down_proj"):
        values = [scales[f"model.layers.0.mlp.experts.{e}.{part}.input_scale"].item() for e in range(8)]
        assert sum(value == max(values) for value in values) >= 7
    assert len(set(values)) == 2  # down_proj: the two experts that worked put out different magnitudes


def test_scales_follow_the_definition() -> None:
    """The first layer's scales, worked in plain torch: largest |x| / 448 of what enters q_proj, of v, and of k after
    its norm and rotary embedding."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    model = tiny_model()
    ids, mask = padded(sequences(6), pad=0)
    scales = static_scales(model, bound("fp8-static", model, kv_cache="fp8"), [(ids, mask)])
    layer, real = model.model.layers[0], mask.bool()
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        value = layer.self_attn.v_proj(x)
        key = layer.self_attn.k_norm(layer.self_attn.k_proj(x).unflatten(-1, (-1, 64))).transpose(1, 2)
        cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        key = apply_rotary_pos_emb(key, key, cos, sin)[1].transpose(1, 2)
    for name, values in (("q_proj.input_scale", x), ("k_scale", key), ("v_scale", value)):
        assert scales[f"model.layers.0.self_attn.{name}"] == values[real].abs().max() / 448


def test_padding_is_never_counted() -> None:
    """Right padding with a token of one huge channel (norms do not hide that) changes no bit of any scale, against
    padding with an ordinary one; experts and KV cache included. Counted as a token, it would."""
    model = tiny_model(family="qwen3-moe")
    target = bound("fp8-static", model, kv_cache="fp8")
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = 0
        model.model.embed_tokens.weight[1, 0] = 1
    data = sequences(6)
    ordinary = static_scales(model, target, [padded(data, pad=7)])
    huge = static_scales(model, target, [padded(data, pad=1)])
    assert all(torch.equal(ordinary[name], huge[name]) for name in ordinary)
    counted = static_scales(model, target, [(padded(data, pad=1)[0], torch.ones(6, max(map(len, data))))])
    assert any(not torch.equal(counted[name], huge[name]) for name in huge)


def test_batches_stream_as_running_maxima() -> None:
    """The scales of two batches, from an iterator read once, are the elementwise larger of each one's own."""
    model = tiny_model()
    target = bound("fp8-static", model, kv_cache="fp8")
    one, two = padded(sequences(4, seed=1), 0), padded(sequences(4, seed=2), 0)
    apart = [static_scales(model, target, [batch]) for batch in (one, two)]
    together = static_scales(model, target, iter([one, two]))
    assert all(torch.equal(together[n], torch.maximum(apart[0][n], apart[1][n])) for n in together)


def test_the_model_is_left_as_it_was() -> None:
    """Modes module by module, no hook, no gradient; after a batch that fails, too."""
    model = tiny_model().train()
    model.model.layers[1].eval()
    target = bound("fp8-static", model, kv_cache="fp8")
    modes = [module.training for module in model.modules()]
    static_scales(model, target, one_by_one(sequences(2)))
    with pytest.raises(IndexError):
        static_scales(model, target, one_by_one([[10**6]]))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_calibration_is_named() -> None:
    """Nothing to calibrate on, or an activation that is not finite."""
    model = tiny_model()
    target = bound("fp8-static", model)
    assert static_scales(model, bound("int8", model), []) == {}
    for batches in ([], [(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))]):
        with pytest.raises(CalibrationError, match="calibration has no tokens"):
            static_scales(model, target, batches)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj\.input_scale: .* is nan"):
        static_scales(model, target, one_by_one(sequences(2)))


def layer_error(model: Any, deployed: dict[str, Tensor], data: list[list[int]]) -> float:
    """Sum over quantized layers of ||X (W - Q)||² / ||X W||², X the BF16 model's inputs on the data."""
    names = {f"{name}.weight": module for name, module in model.named_modules() if f"{name}.weight" in deployed}
    error = dict.fromkeys(names, 0.0)
    energy = dict.fromkeys(names, 0.0)

    def watch(name: str, module: Any) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            x, w = args[0].float(), module.weight.float()
            error[name] += (x @ (w - deployed[name].float()).T).square().sum().item()
            energy[name] += (x @ w.T).square().sum().item()

        return module.register_forward_pre_hook(hook)

    handles = [watch(name, module) for name, module in names.items()]
    with torch.no_grad():
        for ids, mask in one_by_one(data):
            model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return sum(error[name] / energy[name] for name in names)


def logit_error(model: Any, other: Any, data: list[list[int]]) -> float:
    """Mean squared difference of the logits over their mean square."""
    with torch.no_grad():
        pairs = [(model(ids).logits.float(), other(ids).logits.float()) for ids, _ in one_by_one(data)]
    return sum((a - b).square().mean().item() for a, b in pairs) / sum(a.square().mean().item() for a, _ in pairs)


def with_tensors(model: Any, tensors: dict[str, Tensor]) -> Any:
    """The model with these tensors, experts restacked, instead of its own."""
    stacked = dict(tensors)
    for name in [name for name, _ in model.named_parameters() if ".experts." in name]:
        stem, _, leaf = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        count = model.config.num_experts
        stacked[name] = torch.stack(
            [torch.cat([tensors[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(count)]
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stacked[name])
    return model


def rounded_to_nearest(target: Target, model: Any) -> Any:
    """A copy of the model that runs at Q(W)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in target.deployed(dict(model.named_parameters())).items():
            other.get_parameter(name).copy_(weight)
    return other


def exported(
    tmp_path: Path, target: Target, recipe: Recipe, *, count: int = 48, **model: Any
) -> tuple[Path, dict[str, Tensor]]:
    """An export on the calibration data, and the BF16 tensors it computes with, all of them."""
    out = tmp_path / "export"
    folder = tiny_folder(tmp_path / "model", **model)
    manifest = calibrated_export(folder, target, recipe=recipe, sequences=sequences(count), out=out, source_step=3)
    assert verify_export(out) == manifest
    tensors = dict(read_tensors(out))
    return out, {name: t for name, t in tensors.items() if name.endswith((".weight", ".bias"))} | target.dequantize(
        tensors
    )


def test_gptq_beats_rounding_to_nearest(tmp_path) -> None:
    """INT4 by GPTQ: the layers' output error on held-out sequences is under 3/4 of rounding's, and so is that
    of the logits, as transformers loads and runs the folder."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(outlier_scale=16)
    target = bound("int4-g32", model)
    out, deployed = exported(tmp_path, target, "gptq", outlier_scale=16)
    rounded = target.deployed(dict(model.named_parameters()))
    held_out = sequences(seed=1)
    gptq, rtn = (layer_error(model, q, held_out) for q in ({n: deployed[n] for n in rounded}, rounded))
    assert gptq < 0.75 * rtn
    loaded = AutoModelForCausalLM.from_pretrained(out)
    of_rounding = rounded_to_nearest(target, model)
    assert logit_error(model, loaded, held_out) < 0.75 * logit_error(model, of_rounding, held_out)


def test_gptq_on_stacked_experts(tmp_path) -> None:
    """A mixture's experts come out one by one in INT4 with groups of 32, the router stays BF16, and the logits
    have under 3/4 of rounding's error."""
    model = tiny_model(family="qwen3-moe")
    target = bound("int4-g32", model)
    _, deployed = exported(tmp_path, target, "gptq", family="qwen3-moe")
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in deployed
    assert torch.equal(deployed["model.layers.1.mlp.gate.weight"], model.model.layers[1].mlp.gate.weight)
    held_out = sequences(seed=1)
    gptq = with_tensors(tiny_model(family="qwen3-moe"), deployed)
    of_rounding = rounded_to_nearest(target, model)
    assert logit_error(model, gptq, held_out) < 0.75 * logit_error(model, of_rounding, held_out)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """A torch.distributed group of one, as a vLLM engine leaves it behind in the process that exports."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("recipe", "target", "family", "share"),
    [
        ("awq", "int4-g32", "qwen3", 0.25),
        ("awq", "int4-g32", "qwen3-moe", 0.25),
        ("smoothquant", "int8", "qwen3", 0.25),
        ("smoothquant", "int8", "qwen3-moe", 0.25),
        ("smoothquant", "fp8-static", "llama", 2),
    ],
)
def test_transforms_keep_the_function(tmp_path, recipe: Recipe, target, family: Family, share) -> None:
    """AWQ and SmoothQuant shift outliers between norms and weights: norms more than double, yet the weights' part of
    the logits' error is under a quarter of rounding's (FP8 weights gain nothing: their error is relative)."""
    model = tiny_model(family=family, outlier_scale=16)
    to_export = bound(target, model)
    _, deployed = exported(tmp_path, to_export, recipe, count=12, family=family, outlier_scale=16)
    changes = [
        ((deployed[name] - weight).abs() / weight.abs()).max().item()
        for name, weight in model.named_parameters()
        if name.endswith("input_layernorm.weight")
    ]
    assert min(changes) > 1
    held_out = sequences(seed=1)
    error = logit_error(model, with_tensors(tiny_model(family=family), deployed), held_out)
    assert error < share * logit_error(model, rounded_to_nearest(to_export, model), held_out)


def test_a_recipe_calibrates_static_scales_too(tmp_path) -> None:
    """GPTQ under an FP8 KV cache: the folder holds k and v scales within a tenth of those of the BF16 model (its
    layers see what the quantized ones before them put out)."""
    model = tiny_model()
    target = bound("int4-g32", model, kv_cache="fp8")
    out, _ = exported(tmp_path, target, "gptq")
    found = dict(read_tensors(out))
    expected = static_scales(model, target, one_by_one(sequences()))
    assert len(expected) == 4
    for name, scale in expected.items():
        torch.testing.assert_close(found[name], scale, rtol=0.1, atol=0)


def test_config_says_what_the_target_says(tmp_path) -> None:
    """config.json is the model's with the target's quantization_config; llm-compressor's own differs from that only in
    what an engine does not read (observers, the order in which GPTQ went through the columns) and in naming ignored
    modules one by one."""
    from quant.calibrate import _oneshot

    target = bound("int4-g128-mixed", tiny_model(family="qwen2", num_hidden_layers=3))
    out, _ = exported(tmp_path, target, "gptq", family="qwen2", num_hidden_layers=3)
    written = json.loads((out / "config.json").read_text())
    plain = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written.pop("quantization_config") == json.loads(json.dumps(target.quantization_config()))
    assert written == plain
    _oneshot(tmp_path / "model", target, "gptq", sequences(), tmp_path / "theirs", log=tmp_path / "log")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    ours = json.loads(json.dumps(target.quantization_config()))
    assert {name for name in theirs["ignore"] if ".1." in name} == set()
    assert len(theirs["ignore"]) == 1 + 2 * 7  # the head and both ends, module by module instead of by pattern
    for config in (theirs, ours):
        for key in ("actorder", "observer", "observer_kwargs"):
            config["config_groups"]["group_0"]["weights"].pop(key)
        for key in ("ignore", "version", "sparsity_config", "transform_config"):
            config.pop(key, None)
    assert theirs == ours


def test_export_is_reproducible_and_says_what_it_was_made_from(tmp_path) -> None:
    """Twice the same inputs give the same tensors; the manifest counts and digests the sequences; another sequence,
    another digest."""
    model = tiny_model()
    target = bound("int4-g32", model)
    folder = tiny_folder(tmp_path / "model")
    first, again, other = (
        calibrated_export(folder, target, recipe="gptq", sequences=data, out=tmp_path / "export", source_step=3)
        for data in (sequences(8), sequences(8), sequences(8, seed=1))
    )
    assert first["tensors"] == again["tensors"] != other["tensors"]
    assert first["calibration"] == again["calibration"] != other["calibration"]
    assert first["calibration"]["sequences"] == 8
    assert first["calibration"]["tokens"] == sum(map(len, sequences(8)))
    assert (first["target"], first["recipe"], first["source_step"]) == ("int4-g32", "gptq", 3)
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < files
    assert {path.name for path in tmp_path.iterdir()} == {"model", "export", "export.log"}


def test_a_checkpoint_of_another_layout_is_refused(tmp_path, monkeypatch) -> None:
    """If llm-compressor wrote groups of 64 where the target says 32, no folder appears and a tensor is named."""
    from quant import calibrate

    model = tiny_model()
    run, wrong = calibrate._oneshot, bound("int4-g64", model)
    monkeypatch.setattr(
        "quant.calibrate._oneshot", lambda folder, _target, *rest, **log: run(folder, wrong, *rest, **log)
    )
    with pytest.raises(VerificationError, match=r"14 of 42 tensors differ, first .*weight_scale: .*, not "):
        exported(tmp_path, bound("int4-g32", model), "gptq")
    assert not (tmp_path / "export").exists()


def test_recipes_refuse_targets_they_are_not_for(tmp_path) -> None:
    """Which recipe exports which shipped target; the refusal names target, reason and what to use; so does an export
    without sequences."""
    allowed = {
        recipe: {name for name in TARGETS if recipe_refusal(recipe, TargetSpec.load(name)) is None}
        for recipe in ("gptq", "awq", "smoothquant")
    }
    weight_only = {"int4-channel", "int4-g128", "int4-g128-asym", "int4-g128-mixed", "int4-g32", "int4-g64"}
    assert allowed["awq"] == weight_only
    assert allowed["gptq"] == weight_only | {"int8", "w4a8", "w4a8-fp8"}
    assert allowed["smoothquant"] == {"int8", "fp8-dynamic", "fp8-static"}
    model = tiny_model()
    with pytest.raises(
        TargetError, match=r"^fp8-dynamic has floating point weights, .*; use smoothquant, or no recipe$"
    ):
        exported(tmp_path, bound("fp8-dynamic", model), "gptq")
    with pytest.raises(CalibrationError, match=r"got 0, at least one must be given"):
        calibrated_export(
            tmp_path / "model", bound("int8", model), recipe="gptq", sequences=[], out=tmp_path / "x", source_step=0
        )


TARGETS = (
    "fp8-block", "fp8-dynamic", "fp8-static", "int4-channel", "int4-g128", "int4-g128-asym", "int4-g128-mixed",
    "int4-g32", "int4-g64", "int8", "mxfp4", "mxfp8", "nvfp4", "nvfp4-a16", "w4a8", "w4a8-fp8",
)  # fmt: skip


@pytest.mark.engine
def test_vllm_serves_a_gptq_export(tmp_path) -> None:
    """The engine loads the folder with its INT4 kernels and generates; its log-probs are those of the dequantized
    weights in transformers to 0.02 in the mean, and not those of the BF16 model."""
    from train.config import RolloutConfig
    from train.vllm_engine import VllmEngine

    model = tiny_model(outlier_scale=16)
    target = bound(first_that_runs("int4-g32", INT4), model)
    out, deployed = exported(tmp_path, target, "gptq", outlier_scale=16)
    engine = VllmEngine(out, RolloutConfig(prompts=4, group_size=4, max_tokens=12, max_model_len=64), seed=0)
    prompts = sequences(4, seed=1)
    groups = engine.generate(prompts, [1, 2, 3, 4])
    gaps = []
    for other in (with_tensors(tiny_model(outlier_scale=16), deployed), model):
        differences = []
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                ids = torch.tensor([prompt + list(completion.token_ids)])
                with torch.no_grad():
                    logprobs = other(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                chosen = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
                differences.append((chosen - torch.tensor(completion.logprobs)).abs())
        gaps.append(torch.cat(differences).mean().item())
    assert gaps[0] < 0.02
    assert gaps[1] > 3 * gaps[0]
