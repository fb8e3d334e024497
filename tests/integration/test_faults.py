"""Faults planted in runs: signals, a full disk, damaged artifacts, kills: what the user sees, and that it goes on.

Most train on the exact engine, which starts fast and shares checkpoints, stages and the command with all others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import RunConfig, load_config
from pipeline.run import export, open_run, prepare, run_all, train
from pipeline.run_dir import RunDir, read_json, read_jsonl
from tests.machine import QUANTIZED

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "methods" / "exact.toml"
SETTINGS = (
    "name=run",
    f"quant.target={QUANTIZED}",
    "train.task.grader=tests.rewards:share_of_digits", "eval.grader=exact", "train.lr=1e-3",
    "train.steps=4", "train.checkpoint_every=1", "eval.discrepancy_prompts=4", "train.rollout.kv_cache_gib=0.05",
)  # fmt: skip
COMMAND = "from pipeline.cli import main; main()"


def boresight(folder: Path, *settings: str) -> subprocess.Popen[str]:
    """`boresight run` as a process of its own, its run in `folder/run`."""
    overrides = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(CONFIG), *overrides, "--runs", str(folder)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip


def until(process: subprocess.Popen[str], condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the run ended or took too long: {process.communicate()}")
        time.sleep(0.02)


def steps(run: RunDir) -> int:
    return len(read_jsonl(run.metrics)) if run.metrics.is_file() else 0


def timeless(run: RunDir) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their seconds."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in read_jsonl(run.metrics)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[RunDir, RunConfig]:
    """A run that nothing happened to, as far as its export."""
    config = load_config(CONFIG, SETTINGS)
    run = open_run(tmp_path_factory.mktemp("whole") / "run", config)
    prepare(run, config)
    train(run, config)
    export(run, config)
    return run, config


def trained_like(run: RunDir, config: RunConfig, whole: RunDir) -> None:
    """Go on in this process; the numbers and the weights must be those of the run that nothing happened to."""
    train(run, config)
    assert timeless(run) == timeless(whole)
    assert run.rollouts.read_bytes() == whole.rollouts.read_bytes()
    assert read_json(run.last_sync) == read_json(whole.last_sync)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_ends_after_the_step_with_a_checkpoint(tmp_path, whole, number, code) -> None:
    """Checkpoints are due every 50 steps, of which there are 50; the signal comes in the second or later: the run ends
    with a checkpoint of exactly the steps logged, says how to go on and exits with 128 + the signal's number. Gone on
    with to the fourth step, metrics, rollouts and weights are those of a run that was left alone."""
    run = RunDir(tmp_path / "run")
    process = boresight(tmp_path, "train.steps=50", "train.checkpoint_every=50")
    until(process, lambda: steps(run) >= 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    done = steps(run)
    assert 1 <= done < 50
    assert [path.name for path in run.train.glob("checkpoint-*")] == [f"checkpoint-{done:06d}"]
    assert "stopping after this step, with a checkpoint; once more to stop at once" in err
    assert f"stopped by {number.name}; to go on: boresight run" in out.replace("\n", " ")
    assert done <= 4, "steps take a quarter of a second at least, and the signal came after the first"
    run.config.write_text(whole[1].to_json())
    trained_like(run, whole[1], whole[0])


def test_a_signal_while_servers_run_leaves_none(tmp_path, whole) -> None:
    """SIGTERM when both servers have written to their logs: exit code 143, and none of the processes that the run had
    started is there any more, counted."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole[0].root, run.root)
    process = boresight(tmp_path)
    until(process, lambda: all((run.evaluate / f"server_{m}.log").is_file() for m in ("candidate", "baseline")))
    time.sleep(5)
    started = psutil.Process(process.pid).children(recursive=True)
    assert sum("vllm" in " ".join(child.cmdline()) for child in started) >= 2
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "stopped by SIGTERM; to go on: boresight run" in out.replace("\n", " ")
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert not run.discrepancy.exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of eight megabytes; a run of this model wants about twelve."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "boresight-test", mount]
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(small_disk, whole) -> None:
    """The disk fills up for good while checkpoints are written: exit code 2, one line that names the file and says "No
    space left on device". With room, the run goes on to the numbers and weights of one that had room all along."""
    process = boresight(small_disk)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"could not write {small_disk}" in line
    assert "No space left on device" in line
    assert "Traceback" not in err
    run = RunDir(small_disk / "run")
    assert not run.summary.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    trained_like(run, whole[1], whole[0])


def test_a_damaged_checkpoint_is_said_and_the_one_before_gives_the_same_run(tmp_path, whole, capsys) -> None:
    """One bit of the last checkpoint's masters: a warning names the file, training goes on from the one before, and
    ends in the same numbers, rollouts and weights."""
    run, config = RunDir(tmp_path / "run"), whole[1]
    shutil.copytree(whole[0].root, run.root)
    run.summary.unlink()
    masters = run.train / "checkpoint-000004" / "masters.safetensors"
    flip(masters)
    trained_like(run, config, whole[0])
    said = "".join(capsys.readouterr().out.split())
    assert "masters.safetensorsisdamaged" in said
    assert "resumingafterstep3from" in said
    assert [path.name for path in sorted(run.train.glob("checkpoint-*"))] == ["checkpoint-000003", "checkpoint-000004"]


def test_a_damaged_export_is_not_served(tmp_path, whole, capsys) -> None:
    """One bit of the exported weights: `boresight evaluate` ends with exit code 2 and one line that names the file and
    the command that makes it again, before any server is started; `boresight run` makes it again, with the same bytes,
    and says so."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole[0].root, run.root)
    weights = run.export / "model.safetensors"
    good = weights.read_bytes()
    flip(weights)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "evaluate", str(run.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "1 of 6 files differ: model.safetensors; make it again with: boresight export" in line
    assert not run.evaluate.exists()

    class FakeServersError(Exception):
        """Ends the run where its servers would start."""

    def fake(run: RunDir, config: RunConfig) -> None:
        raise FakeServersError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.evaluate", fake)
        with pytest.raises(FakeServersError):
            run_all(run, whole[1])
    assert "it is made again from" in " ".join(capsys.readouterr().out.split())
    assert weights.read_bytes() == good


def flip(path: Path) -> None:
    """One bit, near the end."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
