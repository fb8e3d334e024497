"""Trainer throughput of two ranks against one process on the same cores, and what a rank holds.

`python -m benchmarks.ranks` starts one process with all cores and two ranks with half of them each, in turn, and prints
the median tokens per second of forward, backward and update, their ratio, and the bytes of weights, masters and moments
per rank. Ranks on one machine's cores cannot be faster than one process; what is measured is what the shards cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.checkpoints import SHAPES

ROWS, PROMPT, RESPONSE = 64, 16, 48


def main() -> None:
    """Print a row per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rank-of", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank(options.rank_of)
        return
    print("| model | one process, tokens/s | two ranks | ratio | bytes per rank over one process's |")
    print("|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        turns = [{count: measured(shape, count) for count in (1, 2)} for _ in range(options.turns)]
        one, two = (median(turn[count]["tokens_per_second"] for turn in turns) for count in (1, 2))
        ratio = median(turn[2]["tokens_per_second"] / turn[1]["tokens_per_second"] for turn in turns)
        share = turns[0][2]["bytes"] / turns[0][1]["bytes"]
        print(f"| {shape} | {one:.0f} | {two:.0f} | {ratio:.2f} | {share:.2f} |", flush=True)


def measured(shape: str, ranks: int) -> dict[str, float]:
    """One turn with so many ranks, by torchrun."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    env = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*torchrun, "-m", "benchmarks.ranks", "--rank-of", shape], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def rank(shape: str) -> None:
    """Three optimizer steps over the same rows, the first not counted; the first rank prints what came of it."""
    import torch

    from tests.tiny import tiny_model
    from train.config import RolloutConfig, TaskConfig, TrainConfig
    from train.distributed import World
    from train.policy import Policy
    from train.records import Completion, TokenBatch

    world = World.join()
    rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=RESPONSE, max_model_len=256)
    config = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"), rollout=rollout, steps=1, microbatch_tokens=1024, attention="eager"
    )
    policy = Policy(tiny_model(**SHAPES[shape]), config, world=world)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (ROWS, PROMPT + RESPONSE), generator=draw).tolist()
    completions = [Completion(tuple(row[PROMPT:]), (-4.0,) * RESPONSE, "stop") for row in ids]
    batch = TokenBatch.collate([row[:PROMPT] for row in ids], completions)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        policy.run_at(policy.weights())
        for micro in policy.microbatches(batch, range(ROWS)):
            (-policy.logprobs(batch, micro).sum() / batch.response_tokens).backward()
        policy.update()
        seconds.append(time.perf_counter() - start)
    if world.first:
        held: list[Any] = [*policy.module.parameters(), *policy.masters.values()]
        held += [state[name] for state in policy.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        local = [tensor.to_local() if world.size > 1 else tensor for tensor in held]
        speed = sum(batch.lengths) / median(seconds[1:])
        print(json.dumps({"tokens_per_second": speed, "bytes": sum(tensor.nbytes for tensor in local)}))


if __name__ == "__main__":
    main()
