"""A real `vllm serve` as a context manager; what is asked of it is in eval/client.py.

The server is the command a user would run, bound to loopback, with an API key made here, in a process group that ends
with the `with` block and with this process (quant/server_process.py). Its worker is vLLM's own that also writes down
what it multiplies with (eval/kernel_report.py).

Left out: serving on several hosts, TLS and autoscaling: the deployment's business.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from eval.client import ServedCompletion, ServeError, Server, answers, sample
from eval.config import ServingConfig
from eval.kernels import REPORT_VARIABLE, read_kernels
from quant.errors import BoresightError
from quant.hardware import detect_device
from quant.server_process import HOST, free_port, log_tail, process_group, server_environment

__all__ = ["ServeError", "ServedCompletion", "Server", "sample", "serve", "serve_all"]

WORKER = "eval.kernel_report.ReportingWorker"


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
                f"the server of {self.server.model} was not healthy after {elapsed:.0f} s{log_tail(self.log)}"
            )
        if not answers(self.server):
            return None
        return replace(self.server, startup_seconds=elapsed, kernels=read_kernels(self.kernels))

    def require_alive(self) -> None:
        """Raises ServeError: it died."""
        if (code := self.process.poll()) is not None:
            raise ServeError(f"the server of {self.server.model} died with exit code {code}{log_tail(self.log)}")


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
    port, api_key, name = free_port(), secrets.token_hex(16), model.resolve().name
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
    env = server_environment(api_key, on_cpu=on_cpu) | {REPORT_VARIABLE: str(kernels.resolve())}
    if on_cpu:
        env |= {"VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
    with process_group(command, env, log) as process:
        url = f"http://{HOST}:{port}/v1"
        server = Server(
            url, api_key, name, process.pid, 0.0, max_model_len, None, tuple(command), config.request_timeout
        )
        yield _Launch(process, server, kernels, log, time.monotonic())
