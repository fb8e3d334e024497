"""Two trainer ranks and two rollout servers, by the real command, from no model to a verdict; a server is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.run_dir import RunDir, read_json, read_jsonl
from tests.machine import QUANTIZED

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent.parent
STEPS = 8
SMALL = (
    f"quant.target={QUANTIZED}",
    "name=run", "model.make.hidden_size=128", "model.make.intermediate_size=256", "model.make.layers=2",
    "model.make.heads=2", "model.make.kv_heads=1", "model.make.accuracy=0", "train.task.size=400",
    "train.task.heldout_size=48", "train.task.grader=tests.rewards:share_of_digits", "eval.grader=exact",
    "train.rollout.prompts=8", "train.rollout.group_size=4", f"train.steps={STEPS}", "train.lr=1e-4",
    "train.checkpoint_every=4", "eval.discrepancy_prompts=16", "eval.repeat_baseline=false",
    "signoff.baseline_arm=null", "train.distributed.processes=2", "train.rollout.engine=servers",
    "train.rollout.servers.count=2", "train.rollout.kv_cache_gib=0.05",
)  # fmt: skip


def test_the_demo_with_two_ranks_and_two_servers_survives_the_loss_of_one(tmp_path) -> None:
    """SIGKILL of one server's engine after the second step: the run says so once, makes all its steps with all their
    samples, exports what the last sync proved, evaluates it and judges it. Both servers made rollouts before, and no
    process is left after."""
    run = RunDir(tmp_path / "run")
    overrides = [part for setting in SMALL for part in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "run", "configs/demo-int4.toml", *overrides,
         "--runs", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"COLUMNS": "400", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not run.metrics.is_file() or len(read_jsonl(run.metrics)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    engines = [child for child in started if child.name().startswith("VLLM::Engine")]
    assert len(engines) == 2, started
    engines[0].send_signal(signal.SIGKILL)
    output = process.communicate(timeout=800)[0]
    assert process.returncode in (0, 1, 2), output
    assert "Traceback" not in output
    assert output.count("is lost:") == 1, output

    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["servers_alive"] for row in rows[:2]] == [2, 2]
    assert min(row["servers_alive"] for row in rows) == 1
    assert all(row["rollout_version_lag"] == 0 and row["reward_failed"] == 0 for row in rows)
    assert read_json(run.summary)["steps"] == STEPS
    signoff = read_json(run.signoff)
    passed = {check["name"] for check in signoff["checks"] if check["state"] == "pass"}
    assert {"quantized kernels", "export parity", "artifact integrity"} <= passed, signoff["checks"]
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
