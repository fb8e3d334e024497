"""PPO with a critic that learns its discounts, on the real engine."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import RunDir, read_json, read_jsonl
from tests.machine import QUANTIZED

pytestmark = pytest.mark.engine
METHOD = Path(__file__).parent.parent.parent / "configs" / "methods" / "adagamma.toml"
LOGGED = (
    "value_loss", "explained_variance", "return_consistency", "gamma_mean", "gamma_min", "gamma_max", "gamma_reference",
    "gamma_deviation", "gamma_variance", "gamma_boundary",
)  # fmt: skip


def test_a_critic_logs_what_it_learns_and_resumes_to_the_same_numbers(tmp_path) -> None:
    """Four steps: every step logs the critic's metrics, its loss falls, its discounts leave the middle and stay in
    their range. Resumed after the second step from a copy of the run, the last two rows and the final weights are the
    same bits: heads, moments and reference discount come back."""
    config = load_config(
        METHOD,
        (
            f"quant.target={QUANTIZED}", "train.steps=4", "train.checkpoint_every=2", "train.critic.reference_rate=0.5",
            "train.task.grader=tests.rewards:share_of_digits", "eval.grader=exact", "train.rollout.kv_cache_gib=0.05",
        ),
    )  # fmt: skip
    whole = open_run(tmp_path / "whole", config)
    prepare(whole, config)
    train(whole, config)
    rows = read_jsonl(whole.metrics)
    assert all(math.isfinite(row[name]) for row in rows for name in LOGGED)
    assert rows[-1]["value_loss"] < rows[0]["value_loss"] / 2
    assert rows[0]["gamma_min"] == rows[0]["gamma_max"]
    assert 0.99 <= rows[-1]["gamma_min"] < rows[-1]["gamma_max"] <= 1.0
    assert rows[-1]["gamma_reference"] != rows[0]["gamma_reference"]

    half = RunDir(tmp_path / "half")
    shutil.copytree(whole.root, half.root)
    half.summary.unlink()
    shutil.rmtree(half.train / "checkpoint-000004")
    train(half, config)
    again = read_jsonl(half.metrics)
    # seconds, and what a fresh engine's first sync cannot know
    unknown = {name for name in rows[0] if name.startswith("seconds/")} | {"codes_changed", "sync_sent"}
    assert [{k: v for k, v in row.items() if k not in unknown} for row in again] == [
        {k: v for k, v in row.items() if k not in unknown} for row in rows
    ]
    assert read_json(half.last_sync) == read_json(whole.last_sync)
