"""The command as a user runs it: bad input ends in one line and exit code 2, before any minute of work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.preflight import preflight
from quant.config import TargetSpec, shipped
from quant.hardware import Device, unsupported_reason
from tests.machine import INT4

ROOT = Path(__file__).parent.parent.parent
DEMO = str(ROOT / "configs" / "demo-int4.toml")
HERE = ("--set", f"quant.target={INT4}")  # the demo's target, or the nearest that this machine runs


def boresight(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    # the demo names a curve beside its config, relative to the project's root
    (cwd / "configs").exists() or (cwd / "configs").symlink_to(ROOT / "configs")
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env=os.environ)


def model_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
             "max_position_embeddings": 128} | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_targets_are_listed_with_what_they_need(tmp_path) -> None:
    """Every shipped target is named once, with its kernels' needs and whether this machine runs it."""
    done = boresight("targets", cwd=tmp_path)
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [line[0] for line in lines] == shipped()
    assert "nvfp4            not here  (no CPU kernel, GPU 10.0+, static scales)" in done.stdout


def test_check_says_what_would_run(tmp_path) -> None:
    """Exit code 0, the target and the task named, in less than two seconds even on a busy machine."""
    start = time.perf_counter()
    done = boresight("check", DEMO, *HERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert INT4 in done.stdout
    assert "reasoning-gym products" in done.stdout
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=5"], "train.stepz: unknown key"),
        (["model.make=null", "model.path=./nowhere"], "model.path: no such folder: ./nowhere"),
        (["quant.target=int3"], "quant.target: no quantization target 'int3'; known: fp8-block"),
        (["model.make.hidden_size=96"], "multiples of 128; model.make has hidden_size = 96"),
        (["train.rollout.top_p=0.9"], "top_p must be 1.0, got 0.9"),
        (["train.task.source=jsonl", "train.task.grader=exact", "train.task.name=gone.jsonl"],
         "train.task.name: no such JSONL file: gone.jsonl"),
        (["train.task.source=jsonl", "train.task.grader=exact", "train.task.name=empty.jsonl"],
         "train.task.name: empty.jsonl is empty"),
        (["train.task.source=jsonl", "train.task.grader=exact", "train.task.name=latin.jsonl"],
         "latin.jsonl, first line is not JSON"),
        (["train.task.source=jsonl", "train.task.grader=exact", "train.task.name=two.jsonl"],
         "'{expression}=' cannot be filled from two.jsonl: 'expression'; it has ['answer', 'prompt']"),
        (["train.task.source=jsonl", "train.task.grader=exact", "train.task.name=two.jsonl",
          "train.task.prompt={prompt}"], "1000 held-out problems cannot be split off the 2 rows"),
        (["train.task.heldout_size=12000"], "heldout_size (12000) must be below size (12000)"),
        (["eval.max_tokens=64"], "eval.max_tokens (64) must be below eval.max_model_len (64)"),
        (["seed=99999"], "seed: Input should be less than 32768, got 99999"),
        (["train.task.grader=no_such_module:f", "eval.grader=exact"], "cannot find module 'no_such_module'"),
        (["train.task.grader=own.gone:f", "eval.grader=exact"], "train.task.grader: cannot find module 'own.gone'"),
        (["model.make.solution=gone:f"], "model.make.solution: cannot find module 'gone'"),
        (["signoff.baseline_arm=gone.jsonl"], "signoff.baseline_arm: no such file: gone.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_before_any_work(tmp_path, overrides, message) -> None:
    """`run` refuses with exit code 2, one line on stderr, no traceback, and no run directory."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("raise SystemExit('checking must not import it')")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": ""}\n'.encode("latin-1"))
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    arguments = [part for override in overrides for part in ("--set", override)]
    done = boresight("run", DEMO, *HERE, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"intermediate_size": 300}, None, "intermediate_size = 300"),
        ({"max_position_embeddings": 32}, None, "max_model_len: 64 is over the model's 32 positions"),
        ({"quantization_config": {}}, None, "is quantized already"),
        ({"num_experts": 8}, None, "mixture of experts"),
        ({"num_attention_heads": 0, "hidden_size": 100}, None, "hidden_size = 100"),
        ({}, "tokenizer.json", "has no tokenizer"),
        ({}, "model.safetensors", "has no safetensors weights"),
    ],
)
def test_model_folders_are_looked_into(tmp_path, changes, missing, message) -> None:
    """Shapes against the target, positions against the rollout's length, and each file that must be there."""
    folder = model_folder(tmp_path / "model", **changes)
    if missing:
        (folder / missing).unlink()
    done = boresight("check", DEMO, *HERE, "--set", "model.make=null", "--set", f"model.path={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_hardware_that_cannot_run_the_target_is_refused() -> None:
    """A CPU without AVX-512 and a GPU older than 8.0 get the reason, in `check` before anything else; an FP8 KV cache
    with what is allowed. A CPU with AVX-512 passes."""
    spec = TargetSpec.load("int4-g128")
    old_cpu = Device("cpu", "old", (0, 0), frozenset({"avx2"}))
    assert "needs a CPU with avx512f" in str(unsupported_reason(spec, old_cpu))
    assert "compute capability 8.0" in str(unsupported_reason(spec, Device("cuda", "T4", (7, 5), frozenset())))
    assert unsupported_reason(spec, Device("cuda", "H200", (9, 0), frozenset())) is None
    new_cpu = Device("cpu", "new", (0, 0), frozenset({"avx2", "avx512f"}))
    config = load_config(Path(DEMO), ("signoff.baseline_arm=null",))
    assert preflight(config, new_cpu)[0] == spec
    with pytest.raises(ConfigError, match=r"quant\.target: int4-g128 .* the nearest target it can run is w4a8$"):
        preflight(config, old_cpu)
    cached = load_config(Path(DEMO), ("signoff.baseline_arm=null", "quant.target=fp8-dynamic", "quant.kv_cache=fp8"))
    assert preflight(cached, new_cpu)[0].kv_cache == "fp8"
    with pytest.raises(ConfigError, match=r'FP8 KV cache needs a CPU with avx512f; .* set quant\.kv_cache = "bf16"'):
        preflight(cached, old_cpu)


def test_servers_gpus_are_counted_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config for two servers of two GPUs each: refused on this machine with three, not for a machine that is named;
    experts are shared out on GPUs alone, and only where there are any."""
    monkeypatch.setattr("pipeline.preflight.visible_gpus", lambda: ["0", "1", "2"])
    servers = ("signoff.baseline_arm=null", "quant.target=fp8-dynamic", "train.rollout.engine=servers",
               "train.rollout.servers.count=2", "train.rollout.servers.tensor_parallel=2")  # fmt: skip
    config, h100 = load_config(Path(DEMO), servers), Device("cuda", "H100", (9, 0), frozenset())
    with pytest.raises(ConfigError, match=r"count \* tensor_parallel \* data_parallel is 4, this process sees 3 GPUs"):
        preflight(config)
    assert preflight(config, h100)[1] == h100
    spread = load_config(Path(DEMO), (*servers, "train.rollout.servers.expert_parallel=true"))
    with pytest.raises(ConfigError, match=r"expert_parallel: model\.make is no mixture of experts"):
        preflight(spread, h100)
    with pytest.raises(ConfigError, match=r"expert_parallel: needs GPUs"):
        preflight(spread, Device("cpu", "new", (0, 0), frozenset({"avx2", "avx512f"})))


def test_a_folder_that_is_no_run_is_refused(tmp_path) -> None:
    """Stage commands name what is missing; `run` will not write into a folder of something else."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "thesis.txt").write_text("mine")
    assert "is not a run directory" in boresight("export", "runs/demo", cwd=tmp_path).stderr
    done = boresight("run", DEMO, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not empty and holds no run" in done.stderr
    assert (tmp_path / "runs" / "demo" / "thesis.txt").read_text() == "mine"
