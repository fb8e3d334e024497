"""Zero mismatch through the train stage: exactly 0 with the exact engine, not with vLLM's BF16; and its resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.run import open_run, prepare, train
from pipeline.run_dir import RunDir, read_json, read_jsonl
from tests.machine import QUANTIZED
from tests.tiny import Family, tiny_folder
from train.config import RolloutConfig
from train.discrepancy import MismatchError
from train.exact_engine import ExactEngine
from train.records import Completion
from train.vllm_engine import UnsupportedModeError, VllmEngine

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parent.parent.parent
ZERO = (
    "discrepancy", "prob_diff_max", "k1", "k2", "k3", "k3_reverse", "logp_abs_diff_max", "chi2_token", "chi2_seq",
    "out_of_bounds", "mismatch_cost_positive", "mismatch_cost_negative", "mismatch_cost_skew",
)  # fmt: skip


def trained(folder: Path, *overrides: str, family: Family = "qwen3") -> tuple[RunDir, RunConfig]:
    """configs/methods/exact.toml on a tiny random model, with a reward that it can earn and updates that move it."""
    if not (folder / "model").exists():
        tiny_folder(folder / "model", family=family)
    config = load_config(
        ROOT / "configs" / "methods" / "exact.toml",
        (
            f"quant.target={QUANTIZED}",
            "model.make=null", f"model.path={folder / 'model'}", "train.task.grader=tests.rewards:share_of_digits",
            "eval.grader=exact", "train.lr=1e-3", "train.checkpoint_every=1", *overrides,
        ),
    )  # fmt: skip
    run = open_run(folder / "runs" / config.name, config)
    prepare(run, config)
    train(run, config)
    return run, config


@pytest.mark.parametrize(
    ("family", "attention", "checkpointing"),
    [("qwen3", "eager", "false"), ("qwen3", "sdpa", "true"), ("qwen3-moe", "sdpa", "false")],
)
def test_every_mismatch_is_exactly_zero_in_training(tmp_path, family, attention, checkpointing) -> None:
    """Three steps of two mini-batches whose updates change the weights: every mismatch metric and the sign-skew probe
    are 0.0, not nearly, in every step; dense and a mixture of experts, with gradient checkpointing too."""
    run, _ = trained(
        tmp_path, f"train.attention={attention}", f"train.gradient_checkpointing={checkpointing}",
        *(['quant.ignore=["re:.*experts.*"]'] if family == "qwen3-moe" else []), family=family,
    )  # fmt: skip
    rows = read_jsonl(run.metrics)
    assert len(rows) == 3
    for row in rows:
        assert {name: row[name] for name in ZERO} == dict.fromkeys(ZERO, 0.0)
        assert row["correlation"] == row["ess"] == row["ppl_ratio"] == 1.0
        assert row["grad_norm"] > 0
        assert row["sync_sent"] > 0.5


def test_vllm_in_bf16_has_a_mismatch(tmp_path) -> None:
    """The same run with vLLM's BF16 kernels is near 0 and never at it: that difference is what the exact engine
    removes. vLLM's batch-invariant mode is refused on a CPU in one line."""
    run, _ = trained(tmp_path, "train.rollout.engine=vllm", "train.rollout.kv_cache_gib=0.1")
    for row in read_jsonl(run.metrics):
        assert 0 < row["discrepancy"] < 0.01
        assert 0 < row["k3"] < 0.01
        assert row["mismatch_cost_skew"] != 0
    rollout = RolloutConfig(max_tokens=4, max_model_len=8, batch_invariant=True)
    with pytest.raises(UnsupportedModeError, match=r"train\.rollout\.batch_invariant needs a GPU"):
        VllmEngine(tmp_path / "model", rollout, seed=0)


def test_a_resumed_run_gives_the_same_numbers(tmp_path) -> None:
    """Stopped after two steps and resumed for a third: weights and every metric but the seconds are those of a run
    that was not stopped."""
    whole, _ = trained(tmp_path, "name=whole")
    stopped, config = trained(tmp_path, "name=stopped", "train.steps=2")
    stopped.summary.unlink()
    train(stopped, config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}))
    assert timeless(stopped) == timeless(whole)
    assert read_json(stopped.last_sync) == read_json(whole.last_sync)


def timeless(run: RunDir) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in read_jsonl(run.metrics)]


def test_a_wrong_log_prob_stops_the_run(tmp_path, monkeypatch) -> None:
    """One token of one completion reported one bit in a million away: the step fails with the count and the size."""
    honest = ExactEngine.generate

    def lying(self: ExactEngine, *args: Any) -> list[list[Completion]]:
        groups = honest(self, *args)
        first = groups[0][0]
        logprobs = (first.logprobs[0] * (1 + 1e-6), *first.logprobs[1:])
        groups[0][0] = dataclasses.replace(first, logprobs=logprobs)
        return groups

    monkeypatch.setattr(ExactEngine, "generate", lying)
    with pytest.raises(MismatchError, match=r"differ from the trainer's on 1 of \d+ tokens, at most by \d.*e-06"):
        trained(tmp_path)
