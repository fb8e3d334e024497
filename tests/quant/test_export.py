"""The export: complete, equal to the last sync, and any changed byte is found."""

import pytest
import torch

from quant.config import TargetSpec
from quant.export import export, read_tensors, verify_export
from quant.target import Target
from quant.verify import VerificationError, digest, digests, fingerprint
from tests.tiny import tiny_folder, tiny_model

SPEC = TargetSpec.load("int4-g128")


@pytest.fixture
def made(tmp_path):
    model = tiny_model()
    target = Target.for_model(SPEC, model)
    weights = dict(model.named_parameters())
    return weights, target, tiny_folder(tmp_path / "model"), tmp_path / "export"


def test_export_equals_the_sync_and_reads_back(made) -> None:
    """What is on disk is what was compressed, and its manifest checks."""
    weights, target, model_dir, out = made
    synced = digests(target.compress(weights.items()))
    manifest = export(weights.items(), target, model_dir=model_dir, out=out, source_step=7, synced=synced)
    assert manifest["tensors"] == synced == digests(read_tensors(out))
    assert verify_export(out)["source_step"] == 7


def test_export_refuses_weights_that_were_not_synced(made) -> None:
    """One weight moved after the last sync: no folder appears, and the tensor is named."""
    weights, target, model_dir, out = made
    synced = digests(target.compress(weights.items()))
    with torch.no_grad():
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    with pytest.raises(VerificationError, match=r"against the last sync: .*layers\.0\.mlp\.up_proj\.weight_"):
        export(weights.items(), target, model_dir=model_dir, out=out, source_step=7, synced=synced)
    assert not out.exists()


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_byte_is_found(made, victim) -> None:
    """Any byte of any file: verify_export names the file."""
    weights, target, model_dir, out = made
    export(weights.items(), target, model_dir=model_dir, out=out, source_step=0)
    path = out / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=victim):
        verify_export(out)


def test_shards_hold_the_same_tensors(made, monkeypatch) -> None:
    """Split into many files, with an index: transformers' loader and we read the same tensors."""
    weights, target, model_dir, out = made
    whole = export(weights.items(), target, model_dir=model_dir, out=out, source_step=0)["tensors"]
    monkeypatch.setattr("quant.export.SHARD_BYTES", 50_000)
    manifest = export(weights.items(), target, model_dir=model_dir, out=out, source_step=0)
    assert len([name for name in manifest["files"] if name.endswith(".safetensors")]) > 3
    assert manifest["tensors"] == whole
    assert "model.safetensors.index.json" in manifest["files"]


@pytest.mark.parametrize(
    ("name", "family", "atol"),
    [
        ("int4-g128", "qwen3", 0.0),
        ("int4-g128-asym", "qwen3", 0.0),
        ("nvfp4-a16", "qwen3", 0.0),
        ("mxfp4", "qwen3", 0.0),
        ("int4-g32", "qwen3-moe", 0.0),
        ("mxfp4", "qwen3-moe", 0.0),
        ("int8", "qwen3", 0.06),  # transformers quantizes activations too
        ("fp8-dynamic", "qwen3-moe", 0.1),
    ],
)
def test_transformers_reads_back_the_export(tmp_path, name, family, atol) -> None:
    """AutoModelForCausalLM on the folder computes with the target's dequantized weights, experts too: the same logits
    bit for bit where activations stay BF16, and near where they do not."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family=family)
    target = Target.for_model(TargetSpec.load(name), model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder = tiny_folder(tmp_path / "model", family=family)
    export(weights.items(), target, model_dir=folder, out=tmp_path / "export", source_step=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.randint(2, 60, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        for parameter, weight in target.deployed(weights).items():
            model.get_parameter(parameter).copy_(weight)
        expected = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=atol)
    assert not torch.equal(before, expected)


def test_digest_sees_dtype_shape_and_bytes_and_fingerprint_only_values() -> None:
    """Same bytes in another shape or dtype digest differently; -0.0 and +0.0 fingerprint the same."""
    zeros = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert len({digest(zeros), digest(zeros.view(3, 2)), digest(zeros.view(torch.int16))}) == 3
    assert fingerprint(zeros) == fingerprint(-zeros)
    assert fingerprint(zeros) != fingerprint(zeros + 1e-5)
