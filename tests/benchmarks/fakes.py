"""Records that no training made: their numbers are drawn from a seeded generator around a mean per arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.evidence.settings import Job
from benchmarks.evidence.worker import bits
from pipeline.run_dir import write_jsonl

HELDOUT = 1000
STEPS = 40


def fake(setting: str, arm: str, seed: int, accuracy: float, **changed: Any) -> dict[str, Any]:
    """A record of the worker's form whose scores lie near `accuracy`, a share."""
    random = Random(f"{setting} {arm} {seed}")
    answers = {
        name: [int(random.random() < accuracy) for _ in range(HELDOUT * samples)]
        for name, samples in (("served_greedy", 1), ("served_sampled", 2), ("bf16_greedy", 1), ("bf16_sampled", 2))
    }
    steps = range(1, STEPS + 1)
    return {
        "arm": arm,
        "seed": seed,
        "config": Job(setting, arm, seed).digest(),
        "scores": {name: sum(row) / len(row) for name, row in answers.items()},
        "answers": {name: bits(row) for name, row in answers.items()},
        "curves": {
            "step": [float(step) for step in steps],
            "reward": [accuracy * (0.5 + step / (2 * STEPS)) + random.gauss(0, 0.02) for step in steps],
            "discrepancy": [0.1 * 0.95**step * random.uniform(0.9, 1.1) for step in steps],
            "multiplier": [min(1.0, 0.02 * step) for step in steps],
        },
        "summary": {
            "tolerance": 0.02, "first_discrepancy": 0.2, "multiplier": random.uniform(0.7, 0.9),
            "gap_last": random.uniform(0.015, 0.025), "k3_last": 0.01, "grad_norm_max": 1.0,
        },
        "seconds": {
            "total": 61.0, "cpu": 55.0 + random.random(),
            "seconds/rollout": 30.0, "seconds/train": 25.0 + random.random(), "seconds/sync": 2.0,
            "seconds/total": 60.0 + random.random(),
        },
        "stopped": None,
        "commit": "fake000",
        "machine": "a fake machine",
        "versions": "fake 1.0",
        **changed,
    }  # fmt: skip


def write(records: Path, setting: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put them where a setting's records are."""
    records.mkdir(parents=True, exist_ok=True)
    write_jsonl(records / f"{setting}.jsonl", rows)
