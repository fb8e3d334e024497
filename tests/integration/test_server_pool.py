"""Rollouts from a pool of real servers: the same tokens as in process, every server proven, and none that is missed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from torch import Tensor

from pipeline.config import load_config
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import read_json, read_jsonl
from quant.config import QuantConfig
from quant.export import export
from quant.server_process import free_port, process_group, server_environment
from quant.target import Target
from quant.verify import VerificationError
from tests.faulty_worker import FLIP
from tests.machine import CODES, INT4, QUANTIZED, first_that_runs
from tests.tiny import WORDS, tiny_folder, tiny_model
from train import server_process
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import ConstraintConfig, RolloutConfig, ServersConfig, TaskConfig, TrainConfig
from train.grading import in_process
from train.policy import Policy
from train.records import Problem
from train.server_client import ServerClient
from train.server_pool import ServerPool
from train.server_process import OPENED, ServerProcess
from train.sync import Synced, sync
from train.tasks import Task
from train.timing import Stopwatch
from train.trainer import StepReport, Trainer, initial_state
from train.vllm_engine import VllmEngine
from train.warmstart import character_tokenizer
from train.weight_files import write_weights

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SHAPE: dict[str, Any] = {
    "prompts": 24, "group_size": 4, "max_tokens": 48, "max_model_len": 64, "kv_cache_gib": 0.05, "ignore_eos": True,
}  # fmt: skip
PROMPTS = [[5 + i % 50, 9, 30 + i % 7][: 1 + i % 3] for i in range(24)]
SEEDS = list(range(100, 124))


class Shared:
    """One pool of two servers and one engine in this process, on the same checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.warnings: list[str] = []
        model = tiny_folder(folder / "model")
        self.checkpoint = folder / "export"
        self.target = Target.for_model(QuantConfig(target=QUANTIZED).spec(), tiny_model())
        export(weights(0).items(), self.target, model_dir=model, out=self.checkpoint, source_step=0)
        self.engine = VllmEngine(self.checkpoint, RolloutConfig(**SHAPE), seed=0)
        config = RolloutConfig(engine="servers", servers=ServersConfig(count=2, in_flight=4), **SHAPE)
        self.folder = folder / "train"
        self.pool = ServerPool(self.checkpoint, config, seed=0, folder=self.folder, warn=self.warnings.append)
        self.held: dict[Any, Synced] = {}

    def sync_to(self, seed: int, *engines: VllmEngine | ServerPool) -> None:
        """The weights of a seed, verified, into these engines; both, if none is named."""
        for engine in engines or (self.engine, self.pool):
            self.held[engine] = sync(
                weights(seed), self.target, engine, step=seed, previous=self.held.get(engine), clock=Stopwatch()
            )


def weights(seed: int, **options: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in tiny_model(seed=seed, **options).named_parameters()}


def group_of(pid: int | None) -> list[psutil.Process]:
    """The running processes of a server's group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def commands() -> list[str]:
    """The command lines of all processes that have one; a zombie has none."""
    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Started once; when the tests are over, no process of any server is left, and no weights on their way."""
    shared = Shared(tmp_path_factory.mktemp("pool"))
    with shared.pool:
        yield shared
        groups = [member.pid for member in (*shared.pool.up, *shared.pool.down)]
        assert all(len(group_of(pid)) >= 2 for pid in groups)  # an API server and its engine
    assert [process for pid in groups for process in group_of(pid)] == []
    assert list((shared.folder / "sync").glob("*")) == []


def test_the_pool_samples_what_an_engine_in_process_samples(shared: Shared) -> None:
    """Token for token and log-prob for log-prob, on the checkpoint's weights and after a verified sync; both servers
    took part, and a sync of what changed alone is enough."""
    assert shared.pool.generate(PROMPTS, SEEDS) == shared.engine.generate(PROMPTS, SEEDS)
    shared.sync_to(1)
    first = shared.pool.generate(PROMPTS, SEEDS)
    assert first == shared.engine.generate(PROMPTS, SEEDS)
    assert {completion.version for group in first for completion in group} == {shared.pool.version} == {1}
    assert shared.pool.metrics() == {"servers_alive": 2, "rollout_redone": 0}
    for member in shared.pool.up:
        served = httpx.get(
            member.client.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {member.client.key}"}
        ).text
        total = next(line for line in served.splitlines() if line.startswith("vllm:generation_tokens_total"))
        assert float(total.split()[-1]) > 0.1 * 2 * 24 * 4 * 48


def test_a_server_that_was_not_synced_is_caught_and_named(shared: Shared, tmp_path: Path) -> None:
    """New weights reach one server of two: the next read-back stops, and names a server and the number of tensors."""
    shared.sync_to(1)
    write_weights(tmp_path / "stale", dict(shared.target.compress(weights(2).items())))
    shared.pool.up[0].client.load(str(tmp_path / "stale"), shared.pool._label())
    with pytest.raises(VerificationError, match=r"of rollout server 1 against rollout server 0's: \d+ of \d+ tensors"):
        shared.pool.read_back()
    shared.held.clear()  # what they hold is not known: everything is sent
    shared.sync_to(1)


def test_half_a_folder_of_weights_is_refused_and_changes_nothing(shared: Shared, tmp_path: Path) -> None:
    """Without its marker, or cut short: the server says so, and computes with what it had."""
    shared.sync_to(1)
    before = shared.pool.read_back()
    folder = tmp_path / "half"
    write_weights(folder, weights(2))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(Exception, match=r"promises"):
        shared.pool.up[0].client._rpc("boresight_load_from", str(folder), "x")
    (folder / "complete.json").unlink()
    with pytest.raises(Exception, match=r"no readable complete.json"):
        shared.pool.up[0].client._rpc("boresight_load_from", str(folder), "x")
    assert shared.pool.read_back() == before


@pytest.mark.parametrize("path", ["/collective_rpc", "/pause", "/metrics", "/v1/models", "/openapi.json", "/health/"])
def test_nothing_answers_without_the_key(shared: Shared, path: str) -> None:
    """401 without a key and with another, by GET, POST and OPTIONS; /health alone is open."""
    root = shared.pool.up[0].client.url.removesuffix("/v1")
    for method in ("GET", "POST", "OPTIONS"):
        for headers in ({}, {"Authorization": "Bearer no"}):
            assert httpx.request(method, root + path, headers=headers).status_code == 401
    assert httpx.get(root + "/health").status_code == 200


def test_the_keys_are_in_no_log_and_on_no_command_line(shared: Shared) -> None:
    """Nor in what prints a server's record."""
    for member in shared.pool.up:
        key = member.client.key
        assert len(key) == 32
        assert key not in repr(member.client)
        assert all(key not in path.read_text(errors="replace") for path in shared.folder.glob("*.log"))
        assert all(key not in " ".join(process.cmdline()) for process in group_of(member.pid))


def test_a_killed_server_costs_nothing_and_comes_back(shared: Shared) -> None:
    """SIGKILL in the middle of `generate`: the same completions, one warning that names the log, and some prompts
    redone. Then the other is killed too: `generate` waits for the one that is started again, which has the weights of
    the last sync. At the next sync both are back, with the new weights, read back."""
    shared.sync_to(2)
    many, seeds = PROMPTS * 4, list(range(1000, 1096))
    expected = shared.engine.generate(many, seeds)
    victim, survivor = shared.pool.up
    shared.warnings.clear()
    started = time.monotonic()
    killer = threading.Timer(0.5, lambda: os.killpg(victim.pid or 0, signal.SIGKILL))
    killer.start()
    assert shared.pool.generate(many, seeds) == expected
    assert time.monotonic() - started > 0.5
    assert shared.pool.metrics()["servers_alive"] == 1
    assert 0 < shared.pool.metrics()["rollout_redone"] <= 4
    assert len(shared.warnings) == 1
    assert "is lost: no answer" in shared.warnings[0]
    assert "1 left, it is started again" in shared.warnings[0]
    assert shared.pool.up == [survivor]

    os.killpg(survivor.pid or 0, signal.SIGKILL)
    assert shared.pool.generate(many, seeds) == expected
    assert len(shared.warnings) == 2

    deadline = time.monotonic() + 120
    while not all(member.client.answers() for member in shared.pool.down) and time.monotonic() < deadline:
        time.sleep(0.2)
    shared.sync_to(3)
    assert len(shared.pool.up) == 2
    assert len(shared.warnings) == 2
    assert shared.pool.generate(many, seeds) == shared.engine.generate(many, seeds)
    assert shared.pool.metrics() == {"servers_alive": 2, "rollout_redone": 0}
    for member in shared.pool.up:  # each of them, by itself
        assert member.client.read_back().fingerprints == shared.engine.read_back().fingerprints


def trainer(shared: Shared, engine: VllmEngine | ServerPool, *, ahead: bool = False) -> Trainer:
    """A real trainer of the tiny model; completions earn by their length in characters, which random weights vary."""
    config = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"),
        rollout=engine.config.model_copy(update={"ahead": ahead}),
        constraint=ConstraintConfig(form="blend", tolerance_ratio=0.1),
        steps=4,
        lr=1e-3,
    )
    problems = tuple(Problem(f"p{i}", f"{i}+{i}=", str(2 * i), {}) for i in range(48))
    task = Task(problems, problems[:1], in_process(lambda problem, text: float(len(text) % 3)))
    return Trainer(
        config, policy=Policy(tiny_model(), config), engine=engine, target=shared.target, task=task,
        tokenizer=character_tokenizer([WORDS]), seed=0, state=initial_state(config),
    )  # fmt: skip


def row(report: StepReport) -> dict[str, float | None]:
    """A step's metrics without its seconds and what only a pool says."""
    pool = ("servers_alive", "rollout_redone")
    return {k: v for k, v in report.metrics.items() if not k.startswith("seconds/") and k not in pool}


def test_training_on_the_pool_is_training_in_process(shared: Shared) -> None:
    """Three steps: every metric and every weight is the same to the last bit, and no rollout is stale."""
    one, other = trainer(shared, shared.engine), trainer(shared, shared.pool)
    for _ in range(3):
        report = other.step()
        assert row(report) == row(one.step())
        assert report.metrics["rollout_version_lag"] == 0
        assert report.metrics["servers_alive"] == 2
    assert all(torch.equal(value, other.policy.weights()[name]) for name, value in one.policy.weights().items())
    shared.held.clear()


def test_sampling_ahead_is_one_version_stale_measured_and_resumes(shared: Shared, tmp_path: Path) -> None:
    """Sampled while the step before trains: the lag is 1 from the second step on, and the staleness is measured there;
    its first step is that of a run that does not sample ahead. Stopped after two steps, with the third's rollouts under
    way, and resumed from its checkpoint: the same metrics, but for the staleness of the first step, and the same
    weights to the last bit."""
    run = trainer(shared, shared.pool, ahead=True)
    rows = [row(run.step()), row(run.step())]
    checkpoint = save_checkpoint(tmp_path, run.policy, run.state)
    rows += [row(run.step()), row(run.step())]
    assert [r["rollout_version_lag"] for r in rows] == [0, 1, 1, 1]
    assert rows[0].pop("staleness_prob_diff") is None
    assert all(0 < (r["staleness_prob_diff"] or 0) < 0.1 for r in rows[1:])
    assert rows[0] == row(trainer(shared, shared.pool).step())

    stopped = trainer(shared, shared.pool, ahead=True)
    assert stopped.sampler is not None
    again = Trainer(
        stopped.config, policy=stopped.policy, engine=shared.pool, target=shared.target, task=stopped.sampler.task,
        tokenizer=stopped.sampler.tokenizer, seed=0, state=load_checkpoint(checkpoint, stopped.policy),
    )  # fmt: skip
    for expected in rows[2:]:
        found = row(again.step())
        if found["step"] == 2:
            assert (found.pop("staleness_prob_diff"), expected.pop("staleness_prob_diff", 0) is None) == (None, False)
        assert found == expected
    assert all(torch.equal(value, again.policy.weights()[name]) for name, value in run.policy.weights().items())
    shared.held.clear()


@contextmanager
def replica_over_two_nodes(checkpoint: Path, logs: Path) -> Iterator[str]:
    """One replica that shards its model over two nodes, as docs/servers.md starts it, both on this machine; its URL."""
    key, ports = "of-two-nodes", (free_port(), free_port())
    env = server_environment(key, on_cpu=True) | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    both = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *OPENED),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--dtype", "bfloat16"),
        *("--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "128", "--kv-cache-memory-bytes", "50000000"),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--tensor-parallel-size", "2"),
        *("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(ports[0])),
    ]
    first = [*both, "--node-rank", "0", "--host", "127.0.0.1", "--port", str(ports[1])]
    second = [*both, "--node-rank", "1", "--headless"]
    url = f"http://127.0.0.1:{ports[1]}/v1"
    client = ServerClient("replica", url, key, "", 5.0, shared=logs)
    with process_group(first, env, logs / "node0.log") as one, process_group(second, env, logs / "node1.log") as two:
        deadline = time.monotonic() + 300
        while not client.answers():
            assert one.poll() is two.poll() is None, (logs / "node0.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield url


def test_a_replica_over_two_nodes_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else's, without Ray: tensor parallel over a rank on each of two nodes, more ranks than key heads. Synced
    to other weights, every matrix joined from its shards is Q(W), and it samples; one flipped bit in the second node's
    shard is found and its matrix named."""
    wide: dict[str, Any] = {"head_dim": 128}  # a rank's half of o_proj's columns is a whole group of W4A8
    model = tiny_folder(tmp_path / "model", **wide)
    target = Target.for_model(QuantConfig(target=first_that_runs("int4-g32", INT4)).spec(), tiny_model(**wide))
    export(weights(0, **wide).items(), target, model_dir=model, out=tmp_path / "export", source_step=0)
    monkeypatch.setenv("BORESIGHT_API_KEY", "of-two-nodes")
    with replica_over_two_nodes(tmp_path / "export", tmp_path) as url:
        config = RolloutConfig(engine="servers", servers=ServersConfig(urls=(url,)), **SHAPE)
        with ServerPool(tmp_path / "export", config, seed=0, folder=tmp_path, warn=print) as pool:
            assert pool.up[0].client.ranks == 2
            sync(weights(1, **wide), target, pool, step=0, previous=None, clock=Stopwatch())
            groups = pool.generate(PROMPTS[:2], SEEDS[:2])
            assert [len(completion.token_ids) for group in groups for completion in group] == [48] * 8
            load, name = pool.load, f"model.layers.1.mlp.down_proj.{CODES}"

            def corrupting(tensors: dict[str, Tensor]) -> None:
                flipped = tensors[name].clone()
                flipped[3, -1] ^= 2
                load({**tensors, name: flipped})

            monkeypatch.setattr(pool, "load", corrupting)
            with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ: model\.layers\.1\.mlp\.down_proj"):
                sync(weights(2, **wide), target, pool, step=1, previous=None, clock=Stopwatch())


@pytest.mark.parametrize("spread", ["tensor_parallel", "expert_parallel"])
def test_experts_of_two_ranks_are_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: str) -> None:
    """A BF16 mixture, every expert's width shared by two ranks, or each expert whole on one of them: synced to other
    weights, what both ranks say together is what was sent; one flipped bit of the second rank's is found and named.
    (With whole experts vLLM computes on GPUs alone: nothing is sampled here.)"""
    old, new = (tiny_model(family="qwen3-moe", seed=seed) for seed in (0, 1))
    old.save_pretrained(tmp_path / "model")
    character_tokenizer([WORDS]).save_pretrained(tmp_path / "model")
    servers = ServersConfig(tensor_parallel=2)
    if spread == "expert_parallel":  # which a pool refuses on a CPU
        command = ServerProcess._command
        monkeypatch.setattr(ServerProcess, "_command", lambda *of: [*command(*of), "--enable-expert-parallel"])
    config = RolloutConfig(engine="servers", servers=servers, **SHAPE)
    sent = {name: parameter.detach() for name, parameter in new.named_parameters()}
    with ServerPool(tmp_path / "model", config, seed=0, folder=tmp_path, warn=print) as pool:
        sync(sent, None, pool, step=0, previous=None, clock=Stopwatch())
        ranks = pool.up[0].client._rpc("boresight_held")
        of_both = [{name for name in rank["fingerprints"] if ".experts." in name} for rank in ranks]
        assert len(of_both[0] & of_both[1]) == (0 if spread == "expert_parallel" else 48)
        assert len(of_both[0] | of_both[1]) == 48
        load, name = pool.load, "model.layers.1.mlp.experts.6.down_proj.weight"

        def corrupting(tensors: dict[str, Tensor]) -> None:
            flipped = tensors[name].clone()
            flipped.view(torch.int16)[3, -1] ^= 1
            load({**tensors, name: flipped})

        monkeypatch.setattr(pool, "load", corrupting)
        with pytest.raises(VerificationError, match=r"1 of \d+ .* differ: model\.layers\.1\.mlp\.experts\.6\.down"):
            sync(sent, None, pool, step=1, previous=None, clock=Stopwatch())


def test_every_replica_behind_one_server_is_proven(shared: Shared, tmp_path: Path, monkeypatch) -> None:
    """Two replicas behind one address (data parallel): the tokens of an engine in this process, from both; one flipped
    bit in the second replica alone, of which vLLM passes on no answer, is found, and its matrix named."""
    faulty = tuple(
        part.replace("train.vllm_worker.WeightSync", "tests.faulty_worker.FlipsInReplica1") for part in OPENED
    )
    monkeypatch.setattr(server_process, "OPENED", faulty)
    monkeypatch.setenv(FLIP, str(tmp_path / "flip"))
    config = RolloutConfig(engine="servers", servers=ServersConfig(data_parallel=2, in_flight=4), **SHAPE)
    shared.sync_to(1, shared.engine)
    with ServerPool(shared.checkpoint, config, seed=0, folder=tmp_path, warn=print) as pool:
        assert pool.up[0].client.count_ranks() == pool.up[0].client.ranks == 2
        held = sync(weights(1), shared.target, pool, step=1, previous=None, clock=Stopwatch())
        assert pool.generate(PROMPTS, SEEDS) == shared.engine.generate(PROMPTS, SEEDS)
        assert list((tmp_path / "sync").glob("*")) == []
        (tmp_path / "flip").touch()
        with pytest.raises(VerificationError, match=r"ranks of rollout server 0.*1 of \d+ .*layers\.0\.mlp\.down_proj"):
            sync(weights(2), shared.target, pool, step=2, previous=held, clock=Stopwatch())


def test_a_run_trains_on_its_own_server_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    """`boresight train` with engine "servers": two steps ahead of each other, a verified last sync, a log beside the
    metrics; afterwards no process of a server, no weights on their way, and no key in any file of the run. Servers may
    be others when the run goes on."""
    config = load_config(
        Path(__file__).parent.parent.parent / "configs" / "gsm8k-int4.toml",
        (
            f"quant.target={QUANTIZED}",
            "name=tiny", f"model.path={tiny_folder(tmp_path / 'model')}", "train.task.source=jsonl",
            f"train.task.name={Path(__file__).parent.parent / 'data' / 'gsm8k_sample.jsonl'}",
            "train.task.heldout_options=null", "train.task.heldout_size=16", "train.steps=2", "train.lr=1e-3",
            "train.rollout.prompts=4", "train.rollout.group_size=2", "train.rollout.max_tokens=12",
            "train.rollout.max_model_len=256", "train.rollout.kv_cache_gib=0.05", "train.gradient_checkpointing=false",
            "train.rollout.engine=servers", "train.rollout.ahead=true", "eval.grader=exact",
            "train.task.grader=tests.rewards:share_of_digits",
        ),
    )  # fmt: skip
    run = open_run(tmp_path / "run", config)
    prepare(run, config)
    train(run, config)
    rows = read_jsonl(run.metrics)
    assert [(r["step"], r["rollout_version_lag"], r["servers_alive"]) for r in rows] == [(0, 0, 1), (1, 1, 1)]
    assert read_json(run.last_sync)["step"] == 2
    assert "Application startup complete" in (run.train / "server_0.log").read_text()
    assert list((run.train / "sync").glob("*")) == []
    assert [command for command in commands() if str(run.engine) in command] == []
    written = [path.read_bytes() for path in run.root.rglob("*") if path.is_file()]
    assert not any(b"VLLM_API_KEY" in content or b"Bearer" in content for content in written)
    servers = ServersConfig(urls=("http://node1:8000/v1",))
    rollout = config.train.rollout.model_copy(update={"servers": servers})
    elsewhere = config.model_copy(update={"train": config.train.model_copy(update={"rollout": rollout})})
    assert open_run(run.root, elsewhere).root == run.root
