"""Tokens/s of one rollout server and of two, over an engine in this process, and what a sync to them costs over its;
and what a server gains by its worker being inside its engine (quant/server_process.py), not as vLLM has it on a CPU.

`python -m benchmarks.servers`: the demo's model (random weights), the demo's prompts, completions of a fixed length,
one warm-up that is not counted. The four take turns on the same work in the same run, so that a loaded machine slows
all of them; ratios of medians are printed with the load. On few cores two servers share what one has: only a machine
with a GPU, or with cores, for each shows what a pool is for.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from quant.server_process import server_environment
from train.config import ServersConfig
from train.server_pool import ServerPool

ROUNDS = 3
TOKENS = 64
PARTED = "1 server, its worker apart"


def apart(api_key: str, *, on_cpu: bool) -> dict[str, str]:
    """A server's environment in which vLLM gives the lone worker a process of its own."""
    return server_environment(api_key, on_cpu=on_cpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def main() -> None:
    """Measure and print."""
    from benchmarks.speed import build
    from train.sync import sync
    from train.timing import Stopwatch

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        bench = build(folder, tokens=TOKENS)
        rollout = bench.config.train.rollout
        engines: dict[str, Any] = {"in process": bench.engine}
        starts: dict[str, float] = {}
        for label, count, environment in (
            (PARTED, 1, apart), ("1 server", 1, server_environment), ("2 servers", 2, server_environment),
        ):  # fmt: skip
            # 16 prompts under way at each: the two together have as many as the one in process is given at once
            servers = ServersConfig(count=count, in_flight=rollout.prompts // count)
            config = rollout.model_copy(update={"engine": "servers", "servers": servers, "kv_cache_gib": 0.1})
            start = time.perf_counter()
            with mock.patch("train.server_process.server_environment", environment):
                pool = ServerPool(folder / "export", config, seed=0, folder=folder / label, warn=print)
                engines[label] = stack.enter_context(pool)
            starts[label] = time.perf_counter() - start
        prompts = [list(range(5, 5 + 8 + i % 4)) for i in range(rollout.prompts)]
        total = rollout.prompts * rollout.group_size * TOKENS
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        syncs: dict[str, list[float]] = {name: [] for name in engines}
        same = None
        for counted in range(-1, ROUNDS):
            for label, engine in engines.items():
                clock = Stopwatch()
                sync(
                    bench.policy.weights(), bench.trainer.target, engine, step=0, previous=None, clock=clock,
                )  # fmt: skip
                start = time.perf_counter()
                groups = engine.generate(prompts, range(len(prompts)))
                elapsed = time.perf_counter() - start
                same = same or groups
                assert groups == same, f"{label} samples other tokens"
                if counted >= 0:
                    seconds[label].append(elapsed)
                    syncs[label].append(clock.seconds["sync"] + clock.seconds["verify"])
        base = median(seconds["in process"])
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {total} tokens a round, median of {ROUNDS}")
        print(f"start of 1 server: {starts['1 server'] / starts[PARTED]:.2f} of one whose worker is apart")
        for label in engines:
            taken = median(seconds[label])
            print(
                f"{label:<26} {total / taken:8.0f} tokens/s, {base / taken:5.2f} of in process; "
                f"load and read back {1000 * median(syncs[label]):6.0f} ms"
            )


if __name__ == "__main__":
    main()
