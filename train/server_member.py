"""One server of a pool: one of ours, started again when it is lost, or one that someone else runs and starts again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from quant.hardware import visible_gpus
from quant.server_process import KEY_VARIABLE, log_tail
from train.config import RolloutConfig
from train.server_client import ServerClient, ServerError
from train.server_process import OPENED, ServerProcess, gpu_groups
from train.vllm_experts import MOE_BACKEND

HOW_TO_START = (
    "start it, with boresight's folder on PYTHONPATH, as: VLLM_SERVER_DEV_MODE=1 VLLM_API_KEY=$KEY vllm serve "
    f"RUN/train/engine {' '.join(OPENED)} --logprobs-mode processed_logprobs --generation-config vllm "
    f"--dtype bfloat16 --enforce-eager --max-model-len N, on a GPU also --moe-backend {MOE_BACKEND}; and put $KEY into "
    f"{KEY_VARIABLE} here"
)


class Member:
    """A server of the pool.

    Attributes:
        client: its address; another one after a restart.
        again: what is done when it is lost, in words.
    """

    def __init__(self, client: ServerClient | None, process: ServerProcess | None) -> None:
        """Either the address of someone else's server, or a process of ours that is not started yet."""
        assert (client is None) != (process is None)
        if client is not None:
            self.client = client
        self._process = process
        self.again = "it is started again" if process else "it is asked again at every sync"

    def start(self) -> None:
        """Launch it, if it is ours."""
        if self._process is not None:
            self.client = self._process.start()

    def restart(self) -> None:
        """Kill it and launch it again, if it is ours."""
        if self._process is not None:
            self._process.kill()
            self.start()

    def close(self) -> None:
        """End it, if it is ours."""
        if self._process is not None:
            self._process.close()

    @property
    def ours(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Of the API server, which leads a process group; None for someone else's."""
        return self._process.pid if self._process else None

    @property
    def ended(self) -> bool:
        """Whether it is ours and will not answer any more."""
        return self._process is not None and not self._process.running

    def where(self) -> str:
        """Where to read what happened to it."""
        return str(self._process.log) if self._process else self.client.url

    def ready(self, checkpoint: Path, config: RolloutConfig) -> bool:
        """Whether it is healthy for the first time; someone else's must be, and is checked.

        Raises:
            ServerError: ours died, with the end of its log; someone else's is not what it must be, with how to start
                one.
        """
        if self.ended:
            assert self._process is not None
            raise ServerError(f"{self.client.name} died{log_tail(self._process.log)}")
        if self._process is not None:
            return self.client.answers()
        self.client = _checked(self.client, checkpoint, config)
        return True


def members(checkpoint: Path, config: RolloutConfig, *, seed: int, folder: Path, shared: Path) -> list[Member]:
    """The servers that the config names, none of them started.

    Args:
        checkpoint: the exported folder, or the BF16 model's.
        config: of the rollouts.
        seed: of the run.
        folder: gets the logs.
        shared: folder for what is exchanged with the servers.

    Raises:
        ServerError: more GPUs are asked for than there are, or experts are to be spread without any.
    """
    servers = config.servers
    assert servers is not None
    if servers.urls:
        key = os.environ.get(KEY_VARIABLE, "")
        clients = (ServerClient(url, url, key, "", servers.request_timeout, shared=shared) for url in servers.urls)
        return [Member(client, None) for client in clients]
    gpus = gpu_groups(visible_gpus(), servers.count, servers.gpus)
    if servers.expert_parallel and not visible_gpus():
        raise ServerError(
            "train.rollout.servers.expert_parallel: vLLM's experts on a CPU read past those of their rank and crash; "
            "leave it off here"
        )
    return [
        Member(None, ServerProcess(number, checkpoint, config, seed=seed, folder=folder, shared=shared, gpus=own))
        for number, own in enumerate(gpus)
    ]


def _checked(client: ServerClient, checkpoint: Path, config: RolloutConfig) -> ServerClient:
    """Someone else's server with the name of its model, once it is what it must be.

    Raises:
        ServerError: it is not; the message says how to start one.
    """
    if not client.answers():
        raise ServerError(f"{client.name} does not answer, or does not take the key in {KEY_VARIABLE}; {HOW_TO_START}")
    if not client.guarded():
        raise ServerError(f"{client.name} takes new weights from anyone, without a key; {HOW_TO_START}")
    try:
        client = replace(client, ranks=client.count_ranks())
        about, names = client.about(), client.models()
    except ServerError as error:
        raise ServerError(f"{error}; {HOW_TO_START}") from error
    wanted = json.loads((checkpoint / "config.json").read_text())
    wrong = [
        f"{key} is {value}, not {wanted[key]}"
        for key, value in about["shape"].items()
        if key in wanted and wanted[key] != value
    ]
    if about["logprobs_mode"] != "processed_logprobs":
        wrong.append(f"logprobs_mode is {about['logprobs_mode']}")
    if about["max_model_len"] < config.max_model_len:
        wrong.append(f"max_model_len is {about['max_model_len']}, below the rollouts' {config.max_model_len}")
    if len(names) != 1:
        wrong.append(f"it serves {names}, not one model")
    if wrong:
        raise ServerError(f"{client.name} does not fit this run: {'; '.join(wrong)}; {HOW_TO_START}")
    return replace(client, model=names[0])
