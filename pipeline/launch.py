"""Training in several processes: torchrun starts the ranks; this process waits, and tells how they ended."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from pipeline import stop
from pipeline.config import RunConfig
from pipeline.rank import LOCKED
from pipeline.run_dir import RunDir
from quant.errors import BoresightError
from quant.server_process import process_group
from quant.storage import writing

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 40.0  # torchrun gives its ranks 30 to end


class RanksError(BoresightError):
    """A trainer rank failed; its own words, if it had any."""


def torchrun(config: RunConfig, root: Path) -> list[str]:
    """The command that trains a run directory in this node's ranks; with several nodes, on each of them the same."""
    distributed = config.train.distributed
    one = distributed.nodes == 1
    meet = ["--standalone"] if one else ["--rdzv_backend", "c10d", "--rdzv_endpoint", "FIRST_NODE:29400"]
    size = ["--nnodes", str(distributed.nodes), "--nproc_per_node", str(distributed.processes)]
    return [sys.executable, "-m", "torch.distributed.run", *meet, *size, "-m", "pipeline.rank", str(root)]


def train_in_ranks(run: RunDir, config: RunConfig) -> None:
    """Run the train stage in `train.distributed.processes` processes of this machine.

    The first SIGINT or SIGTERM ends them after a step, with a checkpoint; the second ends this process, and they die
    with it.

    Raises:
        RanksError: a rank failed, with its one line; or the run is for several nodes, with the command for each.
        Stopped: it was stopped before its last step.
    """
    distributed = config.train.distributed
    with writing(run.ranks):
        run.ranks.mkdir(exist_ok=True)
        for path in (run.ranks_error, run.stop):
            path.unlink(missing_ok=True)
    command = torchrun(config, run.root.resolve())
    if distributed.nodes > 1:
        raise RanksError(
            f"train.distributed.nodes = {distributed.nodes}: start the ranks on every node, with the run directory "
            f"shared and FIRST_NODE's name: {shlex.join(command)}; then give this command again"
        )
    threads = max(1, len(os.sched_getaffinity(0)) // distributed.processes)
    env = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"} | os.environ | {
        LOCKED: "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    with (
        stop.deferred("after this step, with a checkpoint") as stopping,
        process_group(command, env, run.ranks_log, shown=True, patience=STOP_SECONDS) as process,
    ):
        while process.poll() is None:
            if stopping():
                run.stop.touch()
            time.sleep(0.1)
    if run.ranks_error.is_file():
        failure = json.loads(run.ranks_error.read_text())
        if failure["code"] == 2:
            raise RanksError(failure["message"])
        raise RuntimeError(f"a trainer rank crashed:\n{failure['message']}")
    if process.returncode:
        raise RanksError(
            f"a trainer rank ended without a word (out of memory?), torchrun with exit status {process.returncode}; "
            f"see {run.ranks_log}"
        )
    if run.stop.exists() and not run.summary.is_file():
        raise stop.Stopped(signal.SIGTERM)
