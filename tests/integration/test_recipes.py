"""The shipped recipes, whole, with the model swapped for a tiny one of its kind."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest

from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.preflight import preflight
from pipeline.run import export, open_run, prepare, train
from pipeline.run_dir import read_json, read_jsonl
from quant.gpus import known_gpu
from tests.machine import INT4, first_that_runs

RECIPES = sorted((Path(__file__).parent.parent.parent / "configs" / "recipes").glob("*.toml"))
MIXTURE = (pytest.mark.mixture,)


def on_this_cpu(path: Path, folder: Path) -> RunConfig:
    """A recipe with only its model, data, machine and sizes changed."""
    rows = [{"prompt": f"What is {a} + {b}?", "solution": str(a + b)} for a in range(2, 8) for b in range(2, 8)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts = "a3b" in path.stem
    made = {"hidden_size": 128, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 64}
    overrides = [
        "model.path=null", *(f"model.make.{name}={value}" for name, value in made.items()), "model.make.accuracy=0",
        f"model.make.experts={4 if experts else 0}",
        "train.task.source=jsonl", f"train.task.name={data}", "train.task.options={}", "train.task.heldout_size=8",
        "train.task.grader_workers=1", "train.steps=2", "train.rollout.prompts=4", "train.rollout.group_size=2",
        "train.rollout.max_tokens=8", "train.rollout.max_model_len=256", "train.microbatch_tokens=1024",
        "train.rollout.kv_cache_gib=0.05", "train.rollout.engine=vllm", "train.rollout.servers=null",
        "train.distributed.processes=1", "train.distributed.cpu_offload=false", "eval.suite=null",
        "eval.max_model_len=null",
    ]  # fmt: skip
    if experts:  # no CPU kernel for quantized experts
        overrides.append('quant.ignore=["re:.*experts.*"]')
    wanted = load_config(path).quant.target
    overrides.append(f"quant.target={first_that_runs(wanted, INT4)}")
    return load_config(path, tuple(overrides))


@pytest.mark.engine
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=MIXTURE if "a3b" in path.stem else (), id=path.stem) for path in RECIPES]
)
def test_a_recipe_trains_and_exports(tmp_path, path) -> None:
    """Prepare, two steps and export on the real engine: finite losses, a discrepancy and a multiplier in every step,
    lambda_0 as the recipe says, and an export that is the last sync bit for bit."""
    config = on_this_cpu(path, tmp_path)
    run = open_run(tmp_path / config.name, config)
    prepare(run, config)
    train(run, config)
    export(run, config)
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["loss"]) and 0 <= row["discrepancy"] <= 1 for row in rows)
    assert rows[0]["multiplier"] == config.train.constraint.multiplier_init
    moved = rows[0]["multiplier"] + config.train.constraint.multiplier_rate * (
        rows[0]["discrepancy"] - rows[0]["tolerance"]
    )
    assert rows[1]["multiplier"] == pytest.approx(min(1.0, max(0.0, moved)))
    assert read_json(run.export / "manifest.json")["tensors"] == read_json(run.last_sync)["tensors"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_the_check_for_a_gpu(path) -> None:
    """On an H100 and an H200 each is accepted as it is, without the hub."""
    config = load_config(path)
    for name in ("h100", "h200"):
        spec, device = preflight(config, known_gpu(name).device)
        assert (spec.name, device.kind) == (config.quant.target, "cuda")


def test_a_recipe_is_refused_for_a_gpu_without_its_kernels() -> None:
    """FP8 needs compute capability 8.9, which an A100 has not; INT4 runs there."""
    fp8, int4 = (load_config(path) for path in RECIPES if path.stem in ("qwen3-8b-fp8", "qwen3-8b-int4"))
    with pytest.raises(ConfigError, match=r"fp8-dynamic needs a GPU of compute capability 8\.9 or newer; NVIDIA A100"):
        preflight(fp8, known_gpu("a100-80").device)
    assert preflight(int4, known_gpu("a100-80").device)[0].name == "int4-g128"


def test_the_papers_numbers_are_in_its_recipes() -> None:
    """arXiv 2606.08779: group and batch, lengths, optimizer, clip, multiplier and tolerance, for both of its models."""
    for name, start, tolerance in (("qwen3-8b-fp8", 0.1, 0.0037), ("qwen3-30b-a3b-fp8", 0.05, 0.005)):
        table = tomllib.loads(next(path for path in RECIPES if path.stem == name).read_text())["train"]
        rollout, constraint = table["rollout"], table["constraint"]
        assert (rollout["prompts"], rollout["group_size"], rollout["max_tokens"]) == (64, 8, 8192)
        assert (table["lr"], table["betas"], table["loss"]["clip_high"]) == (1e-6, [0.9, 0.95], 0.24)
        assert (constraint["form"], constraint["multiplier_rate"]) == ("advantage", 1.0)
        assert (constraint["multiplier_init"], constraint["tolerance"]) == (start, tolerance)
