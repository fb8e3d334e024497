"""A run in two trainer processes: the engine in the first, the same curves as in one; how it ends when it fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import launch
from pipeline.launch import RanksError
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import RunDir, read_json, read_jsonl
from quant.server_process import free_port
from tests.integration.test_run import gsm8k
from train.checkpoint import latest_checkpoint

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "train.steps=3", "train.lr=1e-4", "train.minibatches=2", "train.microbatch_tokens=1", "train.attention=eager",
    "train.task.grader=tests.rewards:share_of_digits", "eval.grader=math-verify",
)  # fmt: skip


def trained(folder: Path, name: str, *overrides: str) -> RunDir:
    """A prepared and trained run."""
    config = gsm8k(folder, *SMALL, *overrides, name=name)
    run = open_run(folder / "runs" / name, config)
    prepare(run, config)
    train(run, config)
    return run


def trained_on_two_nodes(folder: Path, name: str) -> RunDir:
    """One rank on each of two nodes, both on this machine, started by the command that the run itself asks for."""
    config = gsm8k(folder, *SMALL, "train.distributed.nodes=2", name=name)
    run = open_run(folder / "runs" / name, config)
    prepare(run, config)
    with pytest.raises(RanksError) as asked:
        train(run, config)
    words = shlex.split(str(asked.value).split("name: ")[1].split("; then")[0])
    command = [word.replace("FIRST_NODE:29400", f"127.0.0.1:{free_port()}") for word in words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [node.communicate(timeout=500)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert read_json(run.summary)["steps"] == 3  # by which the same command, given again, sees that this stage is done
    return run


def test_two_nodes_train_as_one_process_does(tmp_path) -> None:
    """Three steps with the blend against INT4: rollouts come from the real engine beside the first rank. In the first
    step reward and discrepancy are the same numbers, later ones the same to 1 %; the run ends with one verified sync,
    a policy in BF16 and checkpoints."""
    two = trained_on_two_nodes(tmp_path, "two")
    one = trained(tmp_path, "one")
    ours, theirs = read_jsonl(two.metrics), read_jsonl(one.metrics)
    assert [row["step"] for row in ours] == [0, 1, 2]
    for name in ("reward", "reward_std", "discrepancy", "tolerance", "tokens", "response_length"):
        assert ours[0][name] == theirs[0][name], name
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert mine["discrepancy"] == pytest.approx(other["discrepancy"], rel=0.01)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.01)
    assert ours[2]["codes_changed"] > 0
    assert read_json(two.last_sync)["tensors"].keys() == read_json(one.last_sync)["tensors"].keys()
    for name in ("config.json", "generation_config.json"):
        assert (two.policy / name).read_text() == (one.policy / name).read_text(), name
    latest = latest_checkpoint(two.train)
    assert latest is not None
    assert latest.name == "checkpoint-000003"
    assert not two.ranks_error.exists()


WAITS = """
import sys, time
from pathlib import Path
from pipeline.rank import end_with_the_parent
import os
end_with_the_parent()
Path(sys.argv[1], f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(600)
"""


def test_no_rank_outlives_the_run(tmp_path) -> None:
    """SIGKILL of the process that started torchrun, while two ranks wait for each other: within seconds both are gone,
    and torchrun with them."""
    (tmp_path / "waits.py").write_text(WAITS)
    starter = f"""
import sys, time
from pathlib import Path
from quant.server_process import process_group
import os
folder = Path({str(tmp_path)!r})
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
           str(folder / "waits.py"), str(folder)]
with process_group(command, dict(os.environ, PYTHONPATH={str(ROOT)!r}), folder / "log") as process:
    (folder / "torchrun").write_text(str(process.pid))
    process.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", starter], cwd=ROOT)
    names = ("torchrun", "rank-0", "rank-1")
    wait_until(lambda: all((tmp_path / name).is_file() and (tmp_path / name).read_text() for name in names), 120)
    pids = [int((tmp_path / name).read_text()) for name in names]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), 20)


def wait_until(done, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


STOPS = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():  # a step follows the other
    time.sleep(0.05)
"""
ASKED = """
import os, signal, sys
from pathlib import Path
from pipeline import launch, stop
from pipeline.config import load_config
from pipeline.run_dir import RunDir
root = Path(sys.argv[1])
run, script = RunDir(root), root / "stops.py"
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
launch.torchrun = lambda *_: [*torchrun, str(run.stop)]
stop.install()
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
signal.alarm(3)
try:
    launch.train_in_ranks(run, load_config(root / "run.json"))
except stop.Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def test_a_signal_lets_the_ranks_finish_their_step(tmp_path) -> None:
    """SIGTERM to the process that waits reaches the ranks as a wish, which they follow between two steps; it ends with
    143, and says what it waits for."""
    (tmp_path / "stops.py").write_text(STOPS)
    (tmp_path / "run.json").write_text(gsm8k(tmp_path, *SMALL, "train.distributed.processes=2").to_json())
    done = subprocess.run(
        [sys.executable, "-c", ASKED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.strip() == "stopping after this step, with a checkpoint; once more to stop at once"


FAILS = """
import os, sys, time
from pathlib import Path
from pipeline.rank import leave_word
rank = os.environ["RANK"]
if rank == "1":
    leave_word(Path(sys.argv[1]), "the disk is full", 2)
    os._exit(2)
time.sleep(600)
"""


def test_the_first_failure_is_the_one_that_is_told(tmp_path, monkeypatch) -> None:
    """The second rank fails while the first waits for it: one line, its own, and nobody waits. One that dies without a
    word is told of with the log. With several nodes the command for each is told, and nothing is started."""
    config = gsm8k(tmp_path, *SMALL, "train.distributed.processes=2")
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    script = tmp_path / "fails.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    monkeypatch.setattr(launch, "torchrun", lambda *_: [*torchrun, str(run.ranks_error)])
    script.write_text(FAILS)
    with pytest.raises(RanksError, match=r"^the disk is full$"):
        launch.train_in_ranks(run, config)
    script.write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RanksError, match=r"a trainer rank ended without a word .*ranks/log.txt"):
        launch.train_in_ranks(run, config)
    monkeypatch.undo()
    several = gsm8k(tmp_path, *SMALL, "train.distributed.processes=2", "train.distributed.nodes=3")
    with pytest.raises(
        RanksError, match=r"nodes = 3: .*--rdzv_endpoint FIRST_NODE:29400 --nnodes 3 --nproc_per_node 2"
    ):
        launch.train_in_ranks(run, several)
