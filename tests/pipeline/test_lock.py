"""One process per run directory, and no lock outlives its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.lock import LockError, hold
from tests.machine import INT4

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.lock import hold
hold(Path(sys.argv[1]))
hold(Path(sys.argv[1]))  # again in the same process is nothing
read, write = os.pipe()
child = os.fork() if sys.argv[2] == "fork" else None
if child == 0:
    os.write(write, b"x")
    time.sleep(60)  # a child that outlives its parent
    os._exit(0)
if child:
    os.read(read, 1)  # it is at its own work
print(child, flush=True)
time.sleep(60)
"""


def holder(folder: Path, kind: str = "alone") -> tuple[subprocess.Popen[str], str]:
    """A process that has the folder's lock, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_second_run_on_the_same_folder_ends_in_one_line(tmp_path) -> None:
    """`boresight signoff` on a folder that another process works in: exit code 2, one line with the process's id and
    host, and nothing in the folder is touched."""
    (tmp_path / "config.json").write_text("{}")
    process, _ = holder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "signoff", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    process.kill()
    process.wait()
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("kind", ["alone", "fork"])
def test_a_killed_process_leaves_no_lock(tmp_path, kind) -> None:
    """Held, then SIGKILL, then free, though the file and its words are still there; a child that was forked while the
    lock was held and lives on does not keep it."""
    process, child = holder(tmp_path, kind)
    with pytest.raises(LockError, match="in use by process"):
        hold(tmp_path)
    process.kill()
    process.wait()
    try:
        assert (tmp_path / ".lock").read_text().startswith(f"process {process.pid} ")
        hold(tmp_path)
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        if kind == "fork":
            os.kill(int(child), 9)


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path) -> None:
    """A run directory on a file system without writing: exit code 2 and one line with path and reason."""
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "run", "configs/demo-int4.toml",
         "--set", f"quant.target={INT4}", "--runs", "/proc/runs"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "could not write /proc/runs" in line
