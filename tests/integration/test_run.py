"""The whole flow on the real engine and real servers, small; and resuming it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.run import export, open_run, prepare, run_all, train
from pipeline.run_dir import RunDir, read_json, read_jsonl
from quant.config import QuantConfig
from tests.machine import CODES, INT4, needs
from tests.tiny import Family, tiny_folder
from train.checkpoint import latest_checkpoint
from train.tasks import TaskError

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent.parent
FP8_CACHE = QuantConfig(target=INT4, kv_cache="fp8")
SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"


def gsm8k(folder: Path, *overrides: str, name: str = "tiny", family: Family = "qwen3") -> RunConfig:
    """The shipped recipe for a real model, pointed at a tiny one and at local rows in the hub's columns."""
    model = folder / "model"
    if not model.exists():
        tiny_folder(model, outlier_scale=16, family=family)
    return load_config(
        ROOT / "configs" / "gsm8k-int4.toml",
        (
            f"name={name}", f"model.path={model}", f"quant.target={INT4}",
            "train.task.source=jsonl", f"train.task.name={SAMPLE}",
            "train.task.heldout_options=null", "train.task.heldout_size=16", "train.steps=2", "train.lr=1e-3",
            "train.rollout.prompts=4", "train.rollout.group_size=2", "train.rollout.max_tokens=12",
            "train.rollout.max_model_len=256", "train.rollout.kv_cache_gib=0.05", "train.gradient_checkpointing=false",
            "train.checkpoint_every=1", "eval.discrepancy_prompts=8", *overrides,
        ),
    )  # fmt: skip


def test_the_real_model_recipe_runs_to_a_verdict(tmp_path) -> None:
    """Two steps of configs/gsm8k-int4.toml with a user's own reward: every artifact is there, the verdict is honest
    about 16 problems, the export is byte for byte the last sync, and after one flipped byte the sign-off refuses."""
    config = gsm8k(
        tmp_path,
        "train.task.grader=tests.rewards:share_of_digits",
        "eval.grader=math-verify",
        "eval.repeat_baseline=false",
    )
    run = open_run(tmp_path / "runs" / "tiny", config)
    assert run_all(run, config, until="train") == 0
    assert run.summary.is_file()
    assert not run.export.exists()
    assert run_all(run, config) in (1, 2)  # random weights on 16 problems can never be approved
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["codes_changed"] > 0
    assert all(0 <= row["discrepancy"] <= 1 and row["seconds/verify"] > 0 for row in rows)
    assert read_json(run.export / "manifest.json")["tensors"] == read_json(run.last_sync)["tensors"]
    signoff = read_json(run.signoff)
    states = {check["name"]: check["state"] for check in signoff["checks"]}
    assert states["export parity"] == "pass"
    assert "<svg" in run.report.read_text()
    weights = run.export / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert run_all(run, config) == 1
    parity = next(c for c in read_json(run.signoff)["checks"] if c["name"] == "export parity")
    assert parity["state"] == "fail"
    assert "model.safetensors" in parity["why"]


KV = ("quant.kv_cache=fp8", "quant.calibrate_every=2")
KILLED = """
import os, sys
from pathlib import Path
from pipeline.run import open_run, prepare, train
from tests.integration.test_run import gsm8k
import train.trainer as trainer
finish = trainer.Trainer.step
def step(self):
    if self.state.step == 2:
        os.kill(os.getpid(), 9)
    return finish(self)
trainer.Trainer.step = step
folder = Path(sys.argv[1])
config = gsm8k(folder, "train.steps=3", *sys.argv[2:], name="killed")
run = open_run(folder / "runs" / "killed", config)
prepare(run, config)
train(run, config)
"""


@pytest.mark.parametrize("cache", [pytest.param((), id="bf16"), pytest.param(KV, marks=needs(FP8_CACHE), id="fp8")])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, cache) -> None:
    """Graded by math-verify; with an FP8 KV cache, its scales are calibrated anew after steps 1 and 2. SIGKILL in the
    third step, then resume: metrics, final weights and scales equal an uninterrupted run's, bit for bit; the export has
    the scales, and one by a calibrated recipe replaces it."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *cache], cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == -9
    killed = RunDir(tmp_path / "runs" / "killed")
    latest = latest_checkpoint(killed.train)
    assert latest is not None
    assert latest.name in ("checkpoint-000001", "checkpoint-000002")  # the second was perhaps still being written
    train(killed, gsm8k(tmp_path, "train.steps=3", *cache, name="killed"))
    config = gsm8k(tmp_path, "train.steps=3", *cache, name="whole")
    whole = open_run(tmp_path / "runs" / "whole", config)
    prepare(whole, config)
    train(whole, config)
    assert timeless(killed) == timeless(whole)
    assert read_json(killed.last_sync) == read_json(whole.last_sync)
    export(whole, config)
    tensors = read_json(whole.export / "manifest.json")["tensors"]
    assert tensors == read_json(whole.last_sync)["tensors"]
    scales = [name for name in tensors if name.endswith("k_scale")]
    assert len(scales) == len({tensors[name] for name in scales}) == (2 if cache else 0)
    config = gsm8k(tmp_path, "train.steps=3", *cache, "quant.recipe=gptq", name="whole")
    assert open_run(whole.root, config) == whole
    assert not whole.export.exists()
    export(whole, config)
    manifest = read_json(whole.export / "manifest.json")
    assert manifest["recipe"] == "gptq"
    assert manifest["tensors"].keys() == tensors.keys()


@pytest.mark.mixture
def test_a_mixture_trains_with_replayed_routing(tmp_path) -> None:
    """Qwen3-MoE, attention in INT4 and experts in BF16 (all that a CPU without AMX can serve), two steps: codes move,
    the trainer replays the engine's routing, and the export equals the last sync."""
    config = gsm8k(
        tmp_path, 'quant.ignore=["re:.*experts.*"]', "train.rollout.routing_replay=true",
        "train.rollout.prefix_caching=false", "train.task.grader=tests.rewards:share_of_digits",
        "eval.grader=math-verify", family="qwen3-moe",
    )  # fmt: skip
    run = open_run(tmp_path / "runs" / "tiny", config)
    prepare(run, config)
    train(run, config)
    rows = read_jsonl(run.metrics)
    assert len(rows) == 2
    assert rows[1]["codes_changed"] > 0
    export(run, config)
    tensors = read_json(run.export / "manifest.json")["tensors"]
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in tensors
    assert f"model.layers.0.self_attn.q_proj.{CODES}" in tensors


def test_a_pattern_that_matches_nothing_is_refused(tmp_path) -> None:
    """A typo in quant.ignore would quantize what was meant to stay: it is named before training."""
    config = gsm8k(tmp_path, 'quant.ignore=["re:.*layer.0.*"]')
    run = open_run(tmp_path / "runs" / "tiny", config)
    prepare(run, config)
    with pytest.raises(
        ConfigError, match=r"quant\.ignore: 're:\.\*layer\.0\.\*' matches no linear layer, such as model"
    ):
        train(run, config)


def timeless(run: RunDir) -> list[dict[str, object]]:
    """The rows of metrics.jsonl without their seconds."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


def test_data_that_changed_after_prepare_is_refused_and_nothing_is_lost(tmp_path) -> None:
    """One more row would re-shuffle the split and train on held-out problems: an error, before anything is removed."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(SAMPLE.read_bytes())
    config = gsm8k(tmp_path, f"train.task.name={data}")
    run = open_run(tmp_path / "runs" / "tiny", config)
    prepare(run, config)
    run.report.write_text("an earlier report")
    with data.open("a") as file:
        file.write('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(TaskError, match=r"holds other problems than when .* was prepared"):
        train(run, config)
    assert run.report.read_text() == "an earlier report"


def test_a_prompt_without_room_for_an_answer_is_refused_before_training(tmp_path) -> None:
    """64 positions: the longest prompt's id and length, and the limit of 52, are in the message."""
    config = gsm8k(tmp_path, "train.rollout.max_model_len=64", "eval.max_model_len=64")
    with pytest.raises(TaskError, match=r"prompts are longer than .* = 52 tokens, the longest 'gsm8k_sample-\d+' with"):
        prepare(open_run(tmp_path / "runs" / "tiny", config), config)


@pytest.mark.parametrize("form", ["advantage", "none"])
def test_other_forms_train(tmp_path, form) -> None:
    """The paper's advantage form and the unconstrained arm run two steps; only the first moves its multiplier."""
    config = gsm8k(tmp_path, f"train.constraint.form={form}", "train.correction.weight=token-tis", name=form)
    run = open_run(tmp_path / "runs" / form, config)
    prepare(run, config)
    train(run, config)
    rows = read_jsonl(run.metrics)
    assert rows[0]["multiplier"] == 0
    assert (rows[1]["multiplier"] > 0) == (form == "advantage")
    assert read_json(run.summary)["form"] == form


def test_bf16_rollouts_train(tmp_path) -> None:
    """The baseline arm: a BF16 engine, no constraint; trainer and engine then differ by numerics alone."""
    config = gsm8k(tmp_path, "train.rollout.target=false", "train.constraint.form=none", name="bf16")
    run = open_run(tmp_path / "runs" / "bf16", config)
    prepare(run, config)
    train(run, config)
    assert all(row["discrepancy"] < 0.002 for row in read_jsonl(run.metrics))
