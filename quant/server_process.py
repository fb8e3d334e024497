"""A `vllm serve` as a guarded process group: what training and evaluation both need to start one.

The server runs in a process group of its own, bound to loopback, with an API key handed over by environment, so that
neither the argument list nor the log shows it. Nothing outlives the `with` block, and nothing outlives this process
either: a guard holding one end of a pipe kills the group at its end; trainer ranks are started the same way. What is
served, and what is asked of it, is in eval/serve.py and train/server_pool.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HOST = "127.0.0.1"
LOOPBACK = (HOST, "::1", "localhost")
KEY_VARIABLE = "BORESIGHT_API_KEY"  # holds the key of a server that someone else runs
ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL_LINES = 15
STOP_SECONDS = 10.0  # between asking the group to end and killing it


def server_environment(api_key: str, *, on_cpu: bool) -> dict[str, str]:
    """This process's environment, made fit for a server: with its key, without anyone else's."""
    env = os.environ | {
        "VLLM_API_KEY": api_key,
        "VLLM_LOGGING_LEVEL": "INFO",  # the log is all there is to explain a server that does not start
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_DEEP_GEMM_E8M0": "0",  # it would round the scales of FP8 blocks to powers of two, and requantize
        "HF_HUB_OFFLINE": "1",
        # our classes are found wherever the user stands, and nothing that lies there is taken for them
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # several processes import vLLM one after the other; without cached bytecode each compiles it again, for 10 s
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # of the rollout engine in this process
    env.pop(KEY_VARIABLE, None)  # of another server
    if on_cpu:
        env |= {
            "OMP_WAIT_POLICY": "PASSIVE",  # servers share the cores: idle threads must not spin
            "TORCHDYNAMO_DISABLE": "1",  # else the first request with log-probs compiles for 19 s
            "VLLM_CPU_INT4_W4A8": "0",  # on a CPU with AMX, W4A16 would get 8-bit activations
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server binds itself to the same first cores
            # A lone worker runs inside the engine's process: two imports of vLLM instead of three, and no second
            # process to ask for every token. vLLM parts them only to bind threads, which "nobind" leaves undone.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return env


@contextmanager
def process_group(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, shown: bool = False, patience: float | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as the leader of a new process group; at the end of the block the whole group is gone.

    Args:
        command: to be run.
        env: all of its environment.
        log: gets what it writes.
        shown: its stdout goes where this process's does, and stderr alone into the log.
        patience: seconds between asking the group to end and killing it; default `STOP_SECONDS`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # it waits for a word that is said once it is guarded; if this process ends before, it ends too
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _ && exec "$@"', "server", *command],
            env=env, stdin=subprocess.PIPE, stdout=None if shown else output, stderr=output, start_new_session=True,
        )  # fmt: skip
    # The pipe closes when this process ends, however it ends (SIGKILL too); vLLM's engine would survive the death of
    # its API server, and the API server ignores SIGTERM while the engine starts.
    guard = subprocess.Popen(
        ["/bin/sh", "-c", 'read _; kill -s KILL -- "-$1"', "guard", str(process.pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(b"go\n")
    try:
        yield process
    finally:
        signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS if patience is None else patience)
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
        guard.kill()
        guard.communicate()
        _wait_for(process.pid)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group that still has any."""
    with suppress(ProcessLookupError):  # every member has ended
        os.killpg(group, number)


def _wait_for(group: int) -> None:
    """Until no process of a killed group runs: those that are not our children may still be giving back their memory.
    After `STOP_SECONDS` one hangs in a driver, and nothing can be done about it from here."""
    deadline = time.monotonic() + STOP_SECONDS
    while any(_runs_in(process, group) for process in psutil.process_iter()) and time.monotonic() < deadline:
        time.sleep(0.02)


def _runs_in(process: psutil.Process, group: int) -> bool:
    """Whether it is of this group; a zombie, which its parent alone can clear away, is not."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def free_port() -> int:
    """A port of this machine that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def log_tail(log: Path) -> str:
    """The last words of a server, to be put behind a sentence about it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"; the end of {log}:", *lines[-LOG_TAIL_LINES:]])
