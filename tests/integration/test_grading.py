"""A user's grader that hangs, raises and returns NaN, in training on the real engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import read_json, read_jsonl
from tests.machine import QUANTIZED
from train.grading import TaskError

pytestmark = pytest.mark.engine
METHODS = Path(__file__).parent.parent.parent / "configs" / "methods"
FAULTY = """
import math, time, zlib

def grade(problem, text):
    fault = zlib.crc32(text.encode()) % 8  # as good as random, and the same for the same text
    if fault == 0:
        time.sleep(1000)
    if fault == 1:
        raise ValueError("no number in it")
    return math.nan if fault == 2 else sum(map(str.isdigit, text)) / max(1, len(text))

def broken(problem, text):
    return problem.no_such_field
"""


def configured(folder: Path, method: str, grader: str) -> RunConfig:
    (folder / "faulty_rewards.py").write_text(FAULTY)
    return load_config(
        METHODS / f"{method}.toml",
        (
            f"quant.target={QUANTIZED}",
            f"train.task.grader=faulty_rewards:{grader}", "train.task.grader_timeout=1", "train.task.max_failed=0.9",
            "eval.grader=exact", "train.rollout.prompts=8", "train.rollout.kv_cache_gib=0.05",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["dapo", "ppo"])
def test_training_goes_on_without_the_failed_samples(tmp_path, monkeypatch, method) -> None:
    """Three steps of 32 samples of which about three in eight fail: finite losses and rewards from what could be
    graded, the gap measured over all; the failures are counted by kind and marked in rollouts.jsonl."""
    monkeypatch.syspath_prepend(tmp_path)
    config = configured(tmp_path, method, "grade")
    run = open_run(tmp_path / "run", config)
    prepare(run, config)
    train(run, config)
    rows = read_jsonl(run.metrics)
    assert read_json(run.summary)["steps"] == len(rows) == 3
    kinds = ("timeout", "raised", "returned")
    for row in rows:
        assert 0 < row["reward_failed"] < 1
        assert row["reward_failed"] == pytest.approx(sum(row.get(f"reward_failed/{kind}", 0) for kind in kinds))
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert 0 <= row["reward"] <= 1
        assert 0 <= row["discrepancy"] <= 1
        assert row["tokens"] == pytest.approx(row["response_length"] * 32)
    assert all(any(f"reward_failed/{kind}" in row for row in rows) for kind in kinds)
    samples = read_jsonl(run.rollouts)
    failed = {sample["failed"] for sample in samples if "failed" in sample}
    assert failed == {"timeout", "raised ValueError: no number in it", "returned nan"}
    assert all((sample["reward"] is None) == ("failed" in sample) for sample in samples)


def test_a_broken_grader_ends_the_run_in_its_first_step(tmp_path, monkeypatch) -> None:
    """All samples fail: one error with the reason and an example, and no step is logged."""
    monkeypatch.syspath_prepend(tmp_path)
    config = configured(tmp_path, "rloo", "broken")
    run = open_run(tmp_path / "run", config)
    prepare(run, config)
    with pytest.raises(TaskError, match=r"it raised AttributeError: .*no_such_field.* as for problem"):
        train(run, config)
    assert not run.metrics.is_file() or read_jsonl(run.metrics) == []
