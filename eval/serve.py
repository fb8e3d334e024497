"""A real `vllm serve` as a context manager, and sampling from it over HTTP.

The server is the command a user would run, in a process group of its own: bound to loopback, with an API key made
here and handed over by environment, so that neither the argument list nor the log shows it. Nothing outlives the
`with` block, and nothing outlives this process either: a guard holding one end of a pipe kills the group at its end.

Left out: serving on several hosts, TLS and autoscaling (the deployment's business), and streaming (nothing here
reads a completion before it is whole).
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from eval.config import EvalConfig
from quant.errors import BoresightError
from quant.hardware import detect_device

HOST = "127.0.0.1"
LOG_TAIL_LINES = 15
STOP_SECONDS = 10.0  # between asking the group to end and killing it
REQUEST_SECONDS = 3600.0  # a long completion behind a full queue is slow, not dead


class ServeError(BoresightError):
    """The server did not start, died, refused a request, or answered something that does not add up."""


@dataclass(frozen=True)
class Server:
    """A healthy server.

    Attributes:
        base_url: http://127.0.0.1:PORT/v1
        api_key: bearer token; never printed.
        model: the name it serves the model under.
        pid: of the API server, which leads the process group.
        startup_seconds: from its launch until it answered.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str
    pid: int
    startup_seconds: float

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True)
class ServedCompletion:
    """One sampled completion; T tokens, the end-of-sequence token included when it was sampled.

    Attributes:
        prompt_ids: the prompt's token ids.
        token_ids: T sampled token ids.
        logprobs: T log-probs, in nats, under the distribution each token was sampled from (after temperature).
        finish_reason: "stop" (end of sequence) or "length".
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@contextmanager
def serve(model: Path, config: EvalConfig, *, max_model_len: int, log: Path, seed: int = 0) -> Iterator[Server]:
    """Serve one model folder for the duration of the block.

    Raises:
        ServeError: no model there, or the server died or was not healthy in time; with the end of its log.
    """
    with _launch(model, config, max_model_len=max_model_len, log=log, seed=seed) as launch:
        yield _wait({"": launch}, config.startup_timeout)[""]


@contextmanager
def serve_all(
    models: Mapping[str, Path], config: EvalConfig, *, max_model_len: int, log_dir: Path, seed: int = 0
) -> Iterator[dict[str, Server]]:
    """Serve several model folders at once: all are launched before any is waited for. Logs: `server_LABEL.log`."""
    with ExitStack() as stack:
        launches = {
            label: stack.enter_context(
                _launch(model, config, max_model_len=max_model_len, log=log_dir / f"server_{label}.log", seed=seed)
            )
            for label, model in models.items()
        }
        yield _wait(launches, config.startup_timeout)


def sample(
    server: Server,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    concurrency: int,
) -> list[ServedCompletion]:
    """One completion per prompt, from the whole distribution (top_p 1, no top_k), in the prompts' order.

    Args:
        prompts: token ids per prompt.
        seed: prompt i is sampled with seed + i, whatever runs beside it. One request per prompt, because the server
            gives every prompt of a request the same seed.

    Raises:
        ServeError: a request was refused, or ids and log-probs do not belong together.
    """
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)

    with (
        httpx.Client(headers=server.headers, timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):

        def request(index: int) -> ServedCompletion:
            body = {
                "model": server.model,
                "prompt": list(prompts[index]),
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": 1.0,
                "seed": seed + index,
                "logprobs": 0,  # the sampled token's own, no alternatives
                "return_token_ids": True,
            }
            try:
                response = client.post(f"{server.base_url}/completions", json=body)
            except httpx.TransportError as error:
                raise ServeError(f"prompt {index}: no answer from {server.base_url}: {error!r}") from error
            if response.status_code != httpx.codes.OK:
                raise ServeError(f"prompt {index}: HTTP {response.status_code} from the server: {response.text[:500]}")
            return _completion(index, tuple(prompts[index]), response.json()["choices"][0])

        return list(pool.map(request, range(len(prompts))))


def _completion(index: int, prompt_ids: tuple[int, ...], choice: Mapping[str, Any]) -> ServedCompletion:
    token_ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
    if tuple(choice["prompt_token_ids"]) != prompt_ids:
        raise ServeError(f"prompt {index}: the server answered another prompt than the one sent")
    if len(token_ids) != len(logprobs):
        raise ServeError(f"prompt {index}: {len(token_ids)} token ids but {len(logprobs)} log-probs")
    if not all(value is not None and math.isfinite(value) and value <= 0 for value in logprobs):
        raise ServeError(f"prompt {index}: not log-probs: {logprobs}")
    return ServedCompletion(prompt_ids, token_ids, logprobs, choice["finish_reason"])


@dataclass(frozen=True)
class _Launch:
    """A server process that may not be healthy yet."""

    process: subprocess.Popen[bytes]
    base_url: str
    api_key: str = field(repr=False)
    model: str
    log: Path
    started: float

    def poll(self, timeout: float) -> Server | None:
        """The server once it answers, None before.

        It is asked with the key of this launch: another server that took the port meanwhile would refuse it.

        Raises:
            ServeError: it died, or its time is over.
        """
        if (code := self.process.poll()) is not None:
            raise ServeError(f"the server of {self.model} died with exit code {code}{self._log_tail()}")
        elapsed = time.monotonic() - self.started
        if elapsed > timeout:
            raise ServeError(f"the server of {self.model} was not healthy after {elapsed:.0f} s{self._log_tail()}")
        server = Server(self.base_url, self.api_key, self.model, self.process.pid, elapsed)
        try:
            response = httpx.get(f"{self.base_url}/models", headers=server.headers, timeout=5.0, trust_env=False)
        except httpx.TransportError:
            return None  # not listening yet
        return server if response.status_code == httpx.codes.OK else None

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"; the end of {self.log}:", *lines[-LOG_TAIL_LINES:]])


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
def _launch(model: Path, config: EvalConfig, *, max_model_len: int, log: Path, seed: int) -> Iterator[_Launch]:
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
        "--disable-uvicorn-access-log",
        *(() if on_cpu else ("--gpu-memory-utilization", str(config.gpu_memory_utilization))),
    ]
    with _process_group(command, _environment(config, api_key, on_cpu=on_cpu), log) as process:
        yield _Launch(process, f"http://{HOST}:{port}/v1", api_key, name, log, time.monotonic())


def _environment(config: EvalConfig, api_key: str, *, on_cpu: bool) -> dict[str, str]:
    env = os.environ | {
        "VLLM_API_KEY": api_key,
        "VLLM_LOGGING_LEVEL": "INFO",  # the log is all there is to explain a server that does not start
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # three processes import vLLM one after the other; without cached bytecode each compiles it again, for 10 s
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # set for the rollout engine in this process, not for a server
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
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # The pipe closes when this process ends, however it ends (SIGKILL too); vLLM's engine would survive the death of
    # its API server, and the API server ignores SIGTERM while the engine starts.
    guard = subprocess.Popen(
        ["/bin/sh", "-c", 'read _; kill -s KILL -- "-$1"', "guard", str(process.pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
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
