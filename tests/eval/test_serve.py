"""The server's life and death, with stand-ins for vLLM; the real one is in tests/integration/test_served_facts.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quant.server_process as server_process
from eval.client import ServeError
from eval.config import EvalConfig
from eval.kernels import KernelReportError, read_kernels
from eval.serve import _explained, _launch, serve, serve_all
from quant.server_process import process_group

STUBBORN = ["/bin/sh", "-c", 'trap "" TERM; sleep 100 & wait']


def alive(group: int) -> list[str]:
    """Names of the processes of a group that still run; zombies wait for their parent only."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        state, _, pgrp = rest.split()[:3]
        if int(pgrp) == group and state != "Z":
            found.append(name)
    return found


def gone(group: int | None, seconds: float = 3.0) -> bool:
    assert group is not None
    deadline = time.monotonic() + seconds
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(group)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "stand-in"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_missing_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """The error names the folder, and comes within a second."""
    started = time.monotonic()
    with (
        pytest.raises(ServeError, match=r"absent: not a model folder"),
        serve(tmp_path / "absent", EvalConfig(), max_model_len=64, log=tmp_path / "log"),
    ):
        pass
    assert time.monotonic() - started < 1


def test_a_dead_server_is_reported_with_the_end_of_its_log(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code and last words are in the message, long before the timeout; the API key is in neither."""
    stand_in(monkeypatch, tmp_path, 'echo "$@"; echo no kernel for this; exit 3')
    with (
        pytest.raises(ServeError, match=r"(?s)model died with exit code 3.*no kernel for this") as error,
        serve(model, EvalConfig(), max_model_len=64, log=tmp_path / "log"),
    ):
        pass
    assert "--api-key" not in str(error.value)


def test_a_server_that_hangs_is_killed_at_its_timeout(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After startup_timeout the block ends with an error, and no process is left, SIGTERM ignored or not."""
    stand_in(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; trap '' TERM; sleep 100 & wait")
    monkeypatch.setattr(server_process, "STOP_SECONDS", 0.2)
    with (
        pytest.raises(ServeError, match="not healthy after 1 s"),
        serve(model, EvalConfig(startup_timeout=0.6), max_model_len=64, log=tmp_path / "log"),
    ):
        pass
    assert gone(int((tmp_path / "pid").read_text()))


def test_one_of_two_servers_dying_ends_both(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are launched before either is waited for, with a log each; the survivor does not stay."""
    stand_in(monkeypatch, tmp_path, f"echo $$ >> {tmp_path}/pids; test $(wc -l < {tmp_path}/pids) = 2 || sleep 100")
    with (
        pytest.raises(ServeError, match="died with exit code"),
        serve_all({"a": model, "b": model}, EvalConfig(startup_timeout=3), max_model_len=64, log_dir=tmp_path),
    ):
        pass
    assert (tmp_path / "server_a.log").exists()
    assert (tmp_path / "server_b.log").exists()
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_the_group_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the parent leaves it no time to clean up; its server and the server's children end all the same."""
    code = (
        "import sys, time; from pathlib import Path; from quant.server_process import process_group\n"
        f"with process_group({STUBBORN!r}, {{}}, Path({str(tmp_path / 'log')!r})) as process:\n"
        "    print(process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    assert alive(group)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    assert gone(group)


def test_an_error_inside_the_block_stops_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's exception passes through, after the group is gone."""
    monkeypatch.setattr(server_process, "STOP_SECONDS", 0.2)
    group = 0
    with pytest.raises(KeyboardInterrupt), process_group(STUBBORN, dict(os.environ), tmp_path / "log") as process:  # noqa: PT012
        group = process.pid
        raise KeyboardInterrupt
    assert gone(group)


def test_what_gives_back_its_memory_is_waited_for(tmp_path: Path) -> None:
    """The leader's child has touched a gibibyte, which takes a killed process some time to free; when the block is over
    it does not run any more."""
    touch = f"import pathlib, time; held = bytearray(b'x') * 2**30; pathlib.Path({str(tmp_path / 'up')!r}).touch()"
    command = ["/bin/sh", "-c", 'trap "" TERM; "$0" -c "$1; time.sleep(100)" & wait', sys.executable, touch]
    with process_group(command, dict(os.environ), tmp_path / "log", patience=0.1) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(alive(process.pid)) == 2
    assert alive(process.pid) == []


def test_the_server_gets_the_worker_that_reports_and_no_key_of_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker class is found from any folder, reports beside the log, not over an older report; the key of someone
    else's endpoint stays here."""
    stand_in(monkeypatch, tmp_path, 'echo "$@"; env; exit 3')
    monkeypatch.setenv("BORESIGHT_API_KEY", "of-another-server")
    stale = tmp_path / "server.kernels" / "rank0.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    with (
        pytest.raises(ServeError),
        serve(model, EvalConfig(), max_model_len=64, log=tmp_path / "server.log"),
    ):
        pass
    said = (tmp_path / "server.log").read_text()
    assert "--worker-cls eval.kernel_report.ReportingWorker" in said
    assert f"BORESIGHT_KERNEL_REPORT={stale.parent}\n" in said
    assert f"PYTHONPATH={Path(server_process.__file__).parent.parent}" in said
    assert "PYTHONSAFEPATH=1" in said
    assert "of-another-server" not in said
    assert not stale.exists()
    with pytest.raises(KernelReportError, match="0 of 1 ranks"):
        read_kernels(stale.parent)


def test_a_server_that_dies_later_is_the_cause_that_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests fail because their server has died: the error is its exit code and last words, the request's its cause;
    while it lives, the request's own."""
    stand_in(monkeypatch, tmp_path, "sleep 0.5; echo out of memory; exit 3")
    failed = ServeError("prompt 7: no answer")
    with _launch(model, EvalConfig(), max_model_len=64, log=tmp_path / "log", seed=0) as launch:
        with pytest.raises(ServeError) as told, _explained((launch,)):
            raise failed
        assert told.value is failed
        launch.process.wait()
        words = r"(?s)model died with exit code 3.*out of memory"
        with pytest.raises(ServeError, match=words) as told, _explained((launch,)):
            raise failed
        assert told.value.__cause__ is failed
