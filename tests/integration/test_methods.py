"""Every method that ships as a config runs on the real engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import read_json, read_jsonl
from tests.machine import QUANTIZED

pytestmark = pytest.mark.engine
METHODS = Path(__file__).parent.parent.parent / "configs" / "methods"


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.toml")), ids=lambda path: path.stem)
def test_method_trains_three_steps(tmp_path, path) -> None:
    """Loaded as shipped, but for a reward that a random model earns, and on a CPU without INT4 kernels another target:
    three steps, each with a finite loss and a gradient norm, a discrepancy in [0, 1], and a summary at the end."""
    overrides = (
        f"quant.target={QUANTIZED}",
        "train.task.grader=tests.rewards:share_of_digits",
        "eval.grader=exact",
        "train.rollout.kv_cache_gib=0.05",
    )
    config = load_config(path, overrides)
    assert config.train.steps == 3
    run = open_run(tmp_path / config.name, config)
    prepare(run, config)
    train(run, config)
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert all(0 <= row["discrepancy"] <= 1 for row in rows)
    assert read_json(run.summary)["steps"] == 3
