"""Start one rollout server: `vllm serve` on the deployed checkpoint, with our worker extension and our guard.

The engine's options are those of train/vllm_engine.py. VLLM_SERVER_DEV_MODE opens /collective_rpc, /pause, /resume and
/reset_prefix_cache, by which weights go in; train/server_guard.py closes them, and everything else, to whoever has not
the key.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from quant.server_process import HOST, free_port, process_group, server_environment, signal_group
from train.config import RolloutConfig
from train.rollout import CPU_BATCH_TOKENS
from train.server_client import ServerClient, ServerError
from train.vllm_experts import MOE_BACKEND

MODEL = "policy"  # the name it is served under
OPENED = ("--worker-extension-cls", "train.vllm_worker.WeightSync", "--middleware", "train.server_guard.RequireKey")


class ServerProcess:
    """One server of ours, from `start` to `close`; it can be started again.

    Attributes:
        log: what it says since the last start; earlier ones keep theirs.
    """

    log: Path

    def __init__(
        self, number: int, checkpoint: Path, config: RolloutConfig, *, seed: int, folder: Path, shared: Path,
        gpus: Sequence[str],
    ) -> None:  # fmt: skip
        """Nothing is started yet.

        Args:
            number: of the server in its pool.
            checkpoint: the exported folder, or the BF16 model's.
            config: of the rollouts.
            seed: of the run.
            folder: gets its logs.
            shared: folder for what its ranks say.
            gpus: what it may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        """
        self._number, self._checkpoint, self._config = number, checkpoint, config
        self._seed, self._folder, self._shared, self._gpus = seed, folder, shared, gpus
        self._stack, self._starts = ExitStack(), 0

    def start(self) -> ServerClient:
        """Launch it, with a port, a key and a log of its own; it is healthy half a minute later, or dead."""
        assert self._config.servers is not None
        port, key = free_port(), secrets.token_hex(16)
        self.log = self._folder / f"server_{self._number}{f'.{self._starts}' if self._starts else ''}.log"
        self._process = self._stack.enter_context(process_group(self._command(port), self._environment(key), self.log))
        self._starts += 1
        servers = self._config.servers
        return ServerClient(
            f"rollout server {self._number}", f"http://{HOST}:{port}/v1", key, MODEL, servers.request_timeout,
            shared=self._shared, ranks=servers.gpus,
        )  # fmt: skip

    def kill(self) -> None:
        """End it without asking."""
        signal_group(self._process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it and everything that it started."""
        self._stack.close()

    @property
    def pid(self) -> int:
        """Of the API server, which leads the process group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def _command(self, port: int) -> list[str]:
        config, servers = self._config, self._config.servers
        assert servers is not None
        device = ["--gpu-memory-utilization", str(config.gpu_memory_utilization), "--moe-backend", MOE_BACKEND]
        if not self._gpus:
            # vLLM's sampler on a CPU cannot take back a seeded draw, as it must for a prompt that is computed in parts
            tokens = str(max(CPU_BATCH_TOKENS, config.max_model_len, servers.in_flight * config.group_size))
            device = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", tokens]
            device += ["--kv-cache-memory-bytes", str(int(config.kv_cache_gib * 2**30))]
        return [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self._checkpoint)),
            *("--host", HOST, "--port", str(port), "--served-model-name", MODEL),
            *("--dtype", "bfloat16", "--enforce-eager", "--seed", str(self._seed)),
            *("--max-model-len", str(config.max_model_len)),
            *("--max-num-seqs", str(servers.in_flight * config.group_size)),
            "--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching",
            *("--logprobs-mode", "processed_logprobs"),  # log-probs of the distribution that is sampled from
            *("--generation-config", "vllm"),  # requests say what they want
            *("--tensor-parallel-size", str(servers.tensor_parallel)),
            *("--data-parallel-size", str(servers.data_parallel)),
            *(["--enable-expert-parallel"] if servers.expert_parallel else []),
            *OPENED,
            "--disable-uvicorn-access-log",
            *device,
        ]

    def _environment(self, key: str) -> dict[str, str]:
        assert self._config.servers is not None
        env = server_environment(key, on_cpu=not self._gpus) | {"VLLM_SERVER_DEV_MODE": "1"}
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override ours
        if self._config.batch_invariant:
            env["VLLM_BATCH_INVARIANT"] = "1"
        if self._gpus:
            return env | {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus)}
        share = len(os.sched_getaffinity(0)) // (self._config.servers.count * self._config.servers.gpus)
        return env | {"OMP_NUM_THREADS": str(max(1, share))}


def gpu_groups(visible: Sequence[str], count: int, size: int) -> list[list[str]]:
    """GPUs for each server, from the end of the list, so that the trainer's, the first ones, are shared last.

    Args:
        visible: GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; none on a CPU machine.
        count: servers.
        size: GPUs of each.

    Raises:
        ServerError: there are not enough.
    """
    if not visible:
        return [[] for _ in range(count)]
    if count * size > len(visible):
        raise ServerError(
            f"train.rollout.servers: count {count} of {size} GPUs each (tensor_parallel * data_parallel) needs "
            f"{count * size} GPUs, this process sees {len(visible)}"
        )
    chosen = visible[len(visible) - count * size :]
    return [list(chosen[start : start + size]) for start in range(0, len(chosen), size)]
