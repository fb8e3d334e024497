"""The pool's servers without vLLM: their command and environment, what is refused, and that none outlives the run."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError

import train.server_pool as server_pool
from train.config import RolloutConfig, ServersConfig
from train.rank_answers import RankAnswersError, say
from train.records import Completion
from train.rollout import EngineWeights
from train.server_client import LostServerError, ServerClient, ServerError
from train.server_guard import RequireKey
from train.server_member import members
from train.server_pool import ServerPool
from train.server_process import ServerProcess, gpu_groups
from train.weight_files import WeightFilesError, read_weights, write_weights


def config(**servers: Any) -> RolloutConfig:
    return RolloutConfig(
        engine="servers", servers=ServersConfig(**servers), prompts=2, group_size=3, max_tokens=4, max_model_len=16
    )


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the interpreter that runs vLLM: it writes down what it got and waits."""
    program = tmp_path / "stand-in"
    program.write_text('#!/bin/sh\necho "$@"; env; sleep 100 & wait\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return program


def test_a_server_gets_its_share_and_its_own_key(program: Path, tmp_path: Path, monkeypatch) -> None:
    """On a CPU: half of the cores for each of two servers, our extension and guard, dev mode, the config's lengths,
    and nobody else's key; on GPUs: those of its group and the parallel sizes. A restart has its own log and key."""
    monkeypatch.setenv("BORESIGHT_API_KEY", "of-another-server")
    on_cpu = ServerProcess(0, tmp_path, config(count=2, in_flight=5), seed=7, folder=tmp_path, shared=tmp_path, gpus=[])
    parallel = config(count=2, tensor_parallel=2)
    on_gpu = ServerProcess(1, tmp_path, parallel, seed=7, folder=tmp_path, shared=tmp_path, gpus=["2", "3"])
    try:
        first, _ = on_cpu.start(), on_gpu.start()
        time.sleep(0.5)
        said, other = on_cpu.log.read_text(), on_gpu.log.read_text()
        on_cpu.kill()
        again = on_cpu.start()
    finally:
        on_cpu.close()
        on_gpu.close()
    assert f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)}\n" in said
    assert f"VLLM_API_KEY={first.key}\n" in said
    for part in (
        "VLLM_SERVER_DEV_MODE=1\n", "--worker-extension-cls train.vllm_worker.WeightSync", "--max-num-seqs 15",
        "--middleware train.server_guard.RequireKey", "--max-model-len 16", "--kv-cache-memory-bytes 1073741824",
        "--logprobs-mode processed_logprobs", "--seed 7", "--tensor-parallel-size 1", "--host 127.0.0.1",
    ):  # fmt: skip
        assert part in said
    assert "of-another-server" not in said
    assert "CUDA_VISIBLE_DEVICES=2,3\n" in other
    assert "--tensor-parallel-size 2" in other
    assert "--gpu-memory-utilization" in other
    assert (again.key, again.url) != (first.key, first.url)
    assert on_cpu.log.name == "server_0.1.log"


def test_gpus_are_shared_out_from_the_end() -> None:
    """Two servers of two GPUs each on five: the last four; too few is refused with the numbers; a CPU has none."""
    assert gpu_groups(["0", "1", "2", "3", "4"], 2, 2) == [["1", "2"], ["3", "4"]]
    assert gpu_groups([], 3, 1) == [[], [], []]
    with pytest.raises(ServerError, match="needs 4 GPUs, this process sees 3"):
        gpu_groups(["0", "1", "2"], 2, 2)


def test_a_server_that_dies_at_the_start_ends_the_pool(tmp_path: Path, program: Path) -> None:
    """The error has the end of its log, comes at once, and the other server does not stay."""
    program.write_text(
        f"#!/bin/sh\necho $$ >> {tmp_path}/pids\n"
        f"test $(wc -l < {tmp_path}/pids) = 2 && echo no kernel for this && exit 3\nsleep 100 & wait\n"
    )
    with pytest.raises(ServerError, match=r"rollout server \d died; the end of .*server_\d\.log: no kernel for this"):
        ServerPool(tmp_path, config(count=2), seed=0, folder=tmp_path, warn=print)
    assert not any(psutil.pid_exists(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_the_servers_die_with_a_run_that_is_killed(tmp_path: Path, program: Path) -> None:
    """SIGKILL of the trainer, while its servers start: none of their processes is left."""
    program.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\ntrap '' TERM; sleep 100 & wait\n")
    code = (
        "import sys; from pathlib import Path; from train.config import *; from train.server_pool import ServerPool\n"
        f"sys.executable = {str(program)!r}\n"
        "config = RolloutConfig(engine='servers', servers=ServersConfig(count=2), max_tokens=4, max_model_len=16)\n"
        f"ServerPool(Path({str(tmp_path)!r}), config, seed=0, folder=Path({str(tmp_path)!r}), warn=print)"
    )
    root, python = Path(__file__).parent.parent.parent, Path(sys.prefix) / "bin/python"
    parent = subprocess.Popen([str(python), "-c", code], cwd=root)
    pids = tmp_path / "pids"
    deadline = time.monotonic() + 120
    while (not pids.is_file() or len(pids.read_text().split()) < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    groups = [int(pid) for pid in pids.read_text().split()]
    assert [os.getpgid(pid) for pid in groups] == groups
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(_group_runs, groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [_group_runs(group) for group in groups] == [False, False]


def _group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(
        os.getpgid(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE
        for p in psutil.process_iter()
        if p.is_running()
    )


def test_half_of_an_update_is_refused(tmp_path: Path) -> None:
    """What was written comes back bit for bit; without the marker, with a file cut short, or one missing: an error."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4, 6).bfloat16().t()}
    write_weights(tmp_path / "whole", tensors)
    assert all(torch.equal(tensors[name], value) for name, value in read_weights(tmp_path / "whole"))
    write_weights(tmp_path / "short", tensors)
    os.truncate(tmp_path / "short/model.safetensors", 50)
    write_weights(tmp_path / "none", tensors)
    (tmp_path / "none/model.safetensors").unlink()
    write_weights(tmp_path / "bare", tensors)
    (tmp_path / "bare/complete.json").unlink()
    for name in ("short", "none", "bare"):
        with pytest.raises(WeightFilesError, match=name):
            read_weights(tmp_path / name)


def test_the_guard_lets_only_the_key_and_health_through(monkeypatch) -> None:
    """Over HTTP and websockets; without a key to ask for there is no server."""
    monkeypatch.setenv("VLLM_API_KEY", "key")
    reached: list[str] = []

    async def app(scope, receive, send) -> None:
        reached.append(scope["path"])

    def ask(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
        sent: list[Any] = []

        async def send(message) -> None:
            sent.append(message.get("status") or message.get("code"))

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        asyncio.run(RequireKey(app)({"type": kind, "path": path, "headers": list(headers)}, receive, send))
        return sent

    right, wrong = (b"authorization", b"Bearer key"), (b"authorization", b"Bearer no")
    assert ask("/pause") == ask("/pause", wrong) == ask("/pause", right, wrong) == ask("/health/x") == [401, None]
    assert ask("/v1/realtime", kind="websocket") == [1008]
    assert reached == []
    ask("/pause", right)
    ask("/health")
    ask("/v1/realtime", right, kind="websocket")
    assert reached == ["/pause", "/health", "/v1/realtime"]
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="set VLLM_API_KEY"):
        RequireKey(app)


def test_a_server_that_hangs_is_lost_after_its_timeout(tmp_path: Path) -> None:
    """It takes the connection and says nothing: LostServerError, which names the field, not a wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = ServerClient(
            "server", f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "k", "m", 0.3, shared=tmp_path
        )
        with pytest.raises(LostServerError, match=r"request_timeout"):
            client.about()
    assert not client.answers()


def test_a_server_that_dies_while_it_is_asked_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    """It took the request, then stopped listening, and keeps the connection open, as vLLM's does when its engine dies
    in a call: lost after a look or two, not after the timeout."""
    monkeypatch.setattr("train.server_client.WATCH_SECONDS", 0.1)
    listener = socket.create_server(("127.0.0.1", 0))
    client = ServerClient("s", f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "k", "m", 300.0, shared=tmp_path)
    held: list[socket.socket] = []

    def take_one() -> None:
        held.append(listener.accept()[0])
        listener.close()

    Thread(target=take_one, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(LostServerError, match="its engine died while it was asked"):
        client.count_ranks()
    assert time.monotonic() - started < 60
    held[0].close()


@pytest.fixture
def fake_vllm() -> Iterator[tuple[str, dict[str, Any]]]:
    """A URL, and what answers there to each path: a FakeVllm, which refuses nobody unless told to."""
    parallel = {"world_size": 1, "data_parallel_size": 1, "data_parallel_size_local": 1}
    parallel |= {"data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
    answers: dict[str, Any] = {
        "/health": {}, "/v1/models": {"data": [{"id": "m"}]},
        "/server_info?config_format=json": {"vllm_config": {"parallel_config": parallel}},
    }  # fmt: skip

    class FakeVllm(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
            keyless = "Authorization" not in self.headers and answers.get("guarded", False)
            code = 401 if keyless and self.path != "/health" else 200 if self.path in answers else 404
            if asked.get("method") == "boresight_say":
                for rank, said in enumerate(answers.get("ranks", [])):
                    say(Path(asked["args"][0]), f"0000-{rank:04d}", said)
            body = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 (the base class calls them so)

        def log_message(self, *args: Any, **named: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeVllm)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", answers
    server.shutdown()
    server.server_close()


def test_a_given_server_that_does_not_fit_is_refused_with_the_command(tmp_path: Path, fake_vllm, monkeypatch) -> None:
    """Nobody there; weights for anyone; no extension; another shape, log-probs or length: one line each, which says
    how to start one."""
    monkeypatch.setenv("BORESIGHT_API_KEY", "key")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128, "vocab_size": 32}))
    url, answers = fake_vllm

    def refusal(address: str = url) -> str:
        with pytest.raises(ServerError) as error:
            ServerPool(tmp_path, config(urls=(address,)), seed=0, folder=tmp_path, warn=print)
        assert "VLLM_SERVER_DEV_MODE=1 VLLM_API_KEY=$KEY vllm serve RUN/train/engine --worker-ext" in str(error.value)
        assert "key\n" not in str(error.value)
        return str(error.value)

    assert "does not answer" in refusal("http://127.0.0.1:9/v1")
    answers["/collective_rpc"] = {}
    assert "takes new weights from anyone" in refusal()
    answers["guarded"] = True
    del answers["/collective_rpc"]
    assert "HTTP 404 from /collective_rpc" in refusal()
    about = {"label": None, "logprobs_mode": "raw_logprobs", "max_model_len": 8, "shape": {"hidden_size": 256}}
    answers["/collective_rpc"], answers["ranks"] = {}, [about]
    assert (
        "hidden_size is 256, not 128; logprobs_mode is raw_logprobs; max_model_len is 8, below the rollouts' 16"
        in refusal()
    )
    about |= {"logprobs_mode": "processed_logprobs", "max_model_len": 16, "shape": {"hidden_size": 128}}
    with ServerPool(tmp_path, config(urls=(url,)), seed=0, folder=tmp_path, warn=print) as pool:
        assert pool.up[0].client.model == "m"
        answers["ranks"].append(about)  # two answer where one was announced
        with pytest.raises(ServerError, match=r"2 ranks of 1 answered: \['0000-0000', '0000-0001'\]"):
            pool.up[0].client.about()
    replicas = answers["/server_info?config_format=json"]["vllm_config"]["parallel_config"]
    replicas["data_parallel_size"] = 3
    monkeypatch.setattr("train.rank_answers.PATIENCE_SECONDS", 0.1)
    assert "2 ranks of 3 answered" in refusal()


def test_a_folder_that_a_server_does_not_share_is_named(tmp_path: Path) -> None:
    """A rank cannot put its answer there: the error has the folder and the field."""
    with pytest.raises(RankAnswersError, match=r"/elsewhere cannot be written .*train\.rollout\.servers\.sync_dir"):
        say(tmp_path / "elsewhere", "0000-0000", {})


def test_experts_are_not_spread_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel would read past its rank's experts and crash: refused before a server starts; with GPUs the servers
    get the flags. One rank has nobody to share experts with."""
    spread = config(tensor_parallel=2, expert_parallel=True)
    monkeypatch.setattr("train.server_member.visible_gpus", list)
    with pytest.raises(ServerError, match=r"expert_parallel: vLLM's experts on a CPU .* leave it off"):
        members(tmp_path, spread, seed=0, folder=tmp_path, shared=tmp_path)
    monkeypatch.setattr("train.server_member.visible_gpus", lambda: ["0", "1", "2", "3"])
    spread = config(tensor_parallel=2, data_parallel=2, expert_parallel=True)
    (member,) = members(tmp_path, spread, seed=0, folder=tmp_path, shared=tmp_path)
    assert member._process is not None
    command = " ".join(member._process._command(8000))
    assert "--tensor-parallel-size 2 --data-parallel-size 2 --enable-expert-parallel" in command
    with pytest.raises(ValidationError, match=r"expert_parallel needs tensor_parallel \* data_parallel above 1"):
        ServersConfig(expert_parallel=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("host:8000/v1", "must look like http://host:port/v1"),
        ("http://host:8000", "must look like http://host:port/v1"),
        ("http://user:s3cret@host/v1", "the key goes into BORESIGHT_API_KEY"),
    ],
)
def test_a_url_that_is_none_is_refused_at_once(url: str, message: str) -> None:
    """And a password in one is not shown by our message."""
    with pytest.raises(ValidationError, match=message):
        ServersConfig(urls=(url,))


class FakeMember:
    """A server that is lost by whatever it is asked, and back at once."""

    ours, ended, again = True, False, "it is started again"

    def __init__(self) -> None:
        self.client, self.restarts = self, 0
        self.name = "fake server"

    def where(self) -> str:
        return "fake.log"

    def restart(self) -> None:
        self.restarts += 1

    def close(self) -> None:
        pass

    def start(self) -> None:
        pass

    def ready(self, checkpoint: Path, config: RolloutConfig) -> bool:
        return True

    def answers(self) -> bool:
        return True

    def read_back(self) -> EngineWeights:
        return EngineWeights({}, {})

    def connect(self, connections: int) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def complete(self, *request: object) -> list[Completion]:
        raise LostServerError("no answer")


def test_a_prompt_that_kills_every_server_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    """Two servers die of every request and come back each time: after four rounds there is one error that names their
    logs, not a loop."""
    fakes = [FakeMember(), FakeMember()]
    monkeypatch.setattr(server_pool, "members", lambda *_, **__: list(fakes))
    warnings: list[str] = []
    with (
        ServerPool(tmp_path, config(count=2), seed=0, folder=tmp_path, warn=warnings.append) as pool,
        pytest.raises(ServerError, match=r"lost all rollout servers 4 times; what they say: fake\.log, fake\.log"),
    ):
        pool.generate([[1], [2], [3]], [1, 2, 3])
    assert [fake.restarts for fake in fakes] == [4, 4]
    assert len(warnings) == 8
