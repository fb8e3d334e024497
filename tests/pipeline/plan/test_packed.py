"""The planned size of a deployed checkpoint is its size, to the byte."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pipeline.plan.packed import packed_size
from quant.calibrate import static_scales
from quant.config import QuantConfig, shipped
from quant.export import export
from quant.target import Target
from tests.tiny import Family, tiny_folder, tiny_model

# wide enough for blocks of 128, deep enough for first and last layer in BF16
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
KINDS: list[tuple[Family, bool]] = [("qwen3", False), ("qwen3", True), ("qwen2", False), ("qwen3-moe", False)]


@cache
def made(family: Family, tied: bool = False) -> Any:
    wide = {"moe_intermediate_size": 128} if family == "qwen3-moe" else {}
    return tiny_model(family=family, tied=tied, **SHAPE, **wide)


@pytest.mark.parametrize(("family", "tied"), KINDS)
@pytest.mark.parametrize("kv_cache", ["bf16", "fp8"])
@pytest.mark.parametrize("name", shipped())
def test_every_target_has_the_bytes_that_compress_makes(name, kv_cache, family, tied) -> None:
    """All shipped targets, with and without an FP8 KV cache, on dense, tied, biased and mixture models."""
    model = made(family, tied)
    target = Target.for_model(QuantConfig(target=name, kv_cache=kv_cache).spec(), model)
    scales = {
        name: torch.ones(1, dtype=torch.float32 if name.endswith("_global_scale") else torch.bfloat16)
        for name in target.static_scales
    }
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = dict(target.compress(weights.items(), scales))
    size = packed_size(target, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert size.total == sum(tensor.nbytes for tensor in tensors.values())
    assert size.kept == sum(tensor.nbytes for name, tensor in tensors.items() if name in weights_kept(target, tensors))
    assert size.quantized_parameters == sum(rows * columns for rows, columns in target.shapes.values())


def weights_kept(target: Target, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are no part of a quantized weight, and no calibrated scale."""
    parts = {n for n in tensors if n.rpartition(".")[0] in target.shapes and n.rpartition(".")[2].startswith("weight")}
    return tensors.keys() - parts - target.static_scales


def test_a_real_export_has_that_many_bytes_on_disk(tmp_path) -> None:
    """INT4 with an FP8 KV cache calibrated on real activations: the safetensors file's tensors are of the planned size,
    and the file is larger by its header alone."""
    folder = tiny_folder(tmp_path / "model", **SHAPE)
    model = tiny_model(**SHAPE)
    target = Target.for_model(QuantConfig(target="int4-g128", kv_cache="fp8").spec(), model)
    ids = torch.arange(3, 35).view(2, 16)
    scales = static_scales(model, target, [(ids, torch.ones_like(ids))])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(weights.items(), target, model_dir=folder, out=tmp_path / "out", source_step=0, scales=scales)
    size = packed_size(target, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == size.total  # noqa: SIM118 (no mapping)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size == header + size.total
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["target"] == "int4-g128"
