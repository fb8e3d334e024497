"""A real `vllm serve` as a context manager; what is asked of it is in eval/client.py.

The server is the command a user would run, in a process group of its own: bound to loopback, with an API key made
here and handed over by environment, so that neither the argument list nor the log shows it. Nothing outlives the
`with` block, and nothing outlives this process either: a guard holding one end of a pipe kills the group at its end.
Its worker is vLLM's own that also writes down what it multiplies with (eval/kernel_report.py).

Left out: serving on several hosts, TLS and autoscaling: the deployment's business.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from eval.client import ServedCompletion, ServeError, Server, answers, sample
from eval.config import ServingConfig
from eval.kernels import REPORT_VARIABLE, read_kernels
from eval.source import KEY_VARIABLE
from quant.errors import BoresightError
from quant.hardware import detect_device

__all__ = ["ServeError", "ServedCompletion", "Server", "sample", "serve", "serve_all"]

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
WORKER = "eval.kernel_report.ReportingWorker"
LOG_TAIL_LINES = 15
STOP_SECONDS = 10.0  # between asking the group to end and killing it


@contextmanager
def serve(model: Path, config: ServingConfig, *, max_model_len: int, log: Path, seed: int = 0) -> Iterator[Server]:
    """Serve one model folder for the duration of the block.

    Raises:
        ServeError: no model there, or the server died or was not healthy in time; with the end of its log.
    """
    with _launch(model, config, max_model_len=max_model_len, log=log, seed=seed) as launch, _explained((launch,)):
        yield _wait({"": launch}, config.startup_timeout)[""]


@contextmanager
def serve_all(
    models: Mapping[str, Path], config: ServingConfig, *, max_model_len: int, log_dir: Path, seed: int = 0
) -> Iterator[dict[str, Server]]:
    """Serve several model folders at once: all are launched before any is waited for. Logs: `server_LABEL.log`."""
    with ExitStack() as stack:
        launches = {
            label: stack.enter_context(
                _launch(model, config, max_model_len=max_model_len, log=log_dir / f"server_{label}.log", seed=seed)
            )
            for label, model in models.items()
        }
        with _explained(launches.values()):
            yield _wait(launches, config.startup_timeout)


@dataclass(frozen=True)
class _Launch:
    """A server process that may not be healthy yet."""

    process: subprocess.Popen[bytes]
    server: Server  # as it will be; its start and its kernels are still to be known
    kernels: Path
    log: Path
    started: float

    def poll(self, timeout: float) -> Server | None:
        """The server once it answers, None before.

        It is asked with the key of this launch: another server that took the port meanwhile would refuse it.

        Raises:
            ServeError: it died, or its time is over.
            KernelReportError: it answers, but its engine did not say what it multiplies with.
        """
        self.require_alive()
        elapsed = time.monotonic() - self.started
        if elapsed > timeout:
            raise ServeError(
                f"the server of {self.server.model} was not healthy after {elapsed:.0f} s{self._log_tail()}"
            )
        if not answers(self.server):
            return None
        return replace(self.server, startup_seconds=elapsed, kernels=read_kernels(self.kernels))

    def require_alive(self) -> None:
        """Raises ServeError: it died."""
        if (code := self.process.poll()) is not None:
            raise ServeError(f"the server of {self.server.model} died with exit code {code}{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"; the end of {self.log}:", *lines[-LOG_TAIL_LINES:]])


@contextmanager
def _explained(launches: Iterable[_Launch]) -> Iterator[None]:
    """An error inside the block is told as the death of a server where one has died: that is its cause."""
    try:
        yield
    except BoresightError as error:
        for launch in launches:
            try:
                launch.require_alive()
            except ServeError as death:
                raise death from error
        raise


def _wait(launches: Mapping[str, _Launch], timeout: float) -> dict[str, Server]:
    """All servers, when all are healthy; the first that fails ends the wait for the others."""
    servers: dict[str, Server] = {}
    while len(servers) < len(launches):
        time.sleep(0.2)
        for label, launch in launches.items():
            if label not in servers and (server := launch.poll(timeout)) is not None:
                servers[label] = server
    return {label: servers[label] for label in launches}


@contextmanager
def _launch(model: Path, config: ServingConfig, *, max_model_len: int, log: Path, seed: int) -> Iterator[_Launch]:
    if not (model / "config.json").is_file():
        raise ServeError(f"{model}: not a model folder (no config.json)")
    on_cpu = detect_device().kind == "cpu"
    port, api_key, name = _free_port(), secrets.token_hex(16), model.resolve().name
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--served-model-name", name),
        *("--dtype", "bfloat16", "--max-model-len", str(max_model_len), "--seed", str(seed), "--enforce-eager"),
        *("--logprobs-mode", "processed_logprobs"),  # log-probs of the distribution that is sampled from
        *("--generation-config", "vllm"),  # requests say what they want; the model's own top_p would truncate silently
        *("--worker-cls", WORKER),
        "--disable-uvicorn-access-log",
        *(() if on_cpu else ("--gpu-memory-utilization", str(config.gpu_memory_utilization))),
    ]
    kernels = log.with_suffix(".kernels")
    shutil.rmtree(kernels, ignore_errors=True)  # of an earlier server
    env = _environment(config, api_key, on_cpu=on_cpu) | {REPORT_VARIABLE: str(kernels.resolve())}
    with _process_group(command, env, log) as process:
        url = f"http://{HOST}:{port}/v1"
        server = Server(
            url, api_key, name, process.pid, 0.0, max_model_len, None, tuple(command), config.request_timeout
        )
        yield _Launch(process, server, kernels, log, time.monotonic())


def _environment(config: ServingConfig, api_key: str, *, on_cpu: bool) -> dict[str, str]:
    env = os.environ | {
        "VLLM_API_KEY": api_key,
        "VLLM_LOGGING_LEVEL": "INFO",  # the log is all there is to explain a server that does not start
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # the worker class is found wherever the user stands, and nothing that lies there is taken for it
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # three processes import vLLM one after the other; without cached bytecode each compiles it again, for 10 s
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # set for the rollout engine in this process, not for a server
    env.pop(KEY_VARIABLE, None)  # of another server
    if on_cpu:
        env |= {
            "OMP_WAIT_POLICY": "PASSIVE",  # servers share the cores: idle threads must not spin
            "TORCHDYNAMO_DISABLE": "1",  # else the first request with log-probs compiles for 19 s
            "VLLM_CPU_INT4_W4A8": "0",  # on a CPU with AMX, W4A16 would get 8-bit activations
            "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server binds itself to the same first cores
        }
    return env


@contextmanager
def _process_group(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as the leader of a new process group; at the end of the block the whole group is gone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # it waits for a word that is said once it is guarded; if this process ends before, it ends too
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _ && exec "$@"', "server", *command],
            env=env, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
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
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        guard.kill()
        guard.communicate()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # every member has ended
        os.killpg(group, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
