"""A tolerance sweep on the real engine."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.run_dir import read_json, read_jsonl
from pipeline.sweep import sweep
from tests.machine import QUANTIZED

pytestmark = pytest.mark.engine
BLEND = Path(__file__).parent.parent.parent / "configs" / "methods" / "blend.toml"
SMALL = (
    f"quant.target={QUANTIZED}", "train.constraint.multiplier_init=0",
    "train.steps=2", "train.minibatches=1", "model.make.hidden_size=128", "model.make.intermediate_size=128",
    "model.make.layers=1", "model.make.heads=2", "model.make.kv_heads=1", "train.rollout.max_tokens=8",
)  # fmt: skip


@pytest.mark.timeout(600)  # three engines, one after another
def test_arms_differ_in_their_tolerance_alone_and_are_not_run_twice(tmp_path) -> None:
    """Two ratios and the unconstrained arm, two steps each, from one model and lambda 0: the first step is the same in
    all, the tolerances are the ratios of its gap, lambda moves by eta (gap - c), table and plot are there; a second
    call runs nothing."""
    arms = sweep(BLEND, SMALL, (0.1, 0.5), tmp_path)
    root = tmp_path / "blend-sweep"
    assert [arm.name for arm in arms] == ["ratio-0.1", "ratio-0.5", "unconstrained"]
    rows = [read_jsonl(root / arm.name / "train" / "metrics.jsonl") for arm in arms]
    assert len({(first["discrepancy"], first["reward"], first["tokens"]) for first, _ in rows}) == 1
    gap = rows[0][0]["discrepancy"]
    assert gap > 0
    assert [arm.tolerance for arm in arms] == [0.1 * gap, 0.5 * gap, None]
    assert [second["multiplier"] for _, second in rows] == pytest.approx([5 * 0.9 * gap, 5 * 0.5 * gap, 0])
    ElementTree.fromstring((root / "sweep.svg").read_text())
    assert "| unconstrained |" in (root / "sweep.md").read_text()
    assert [arm["tolerance"] for arm in read_json(root / "sweep.json")["arms"]] == [arm.tolerance for arm in arms]
    times = {path: path.stat().st_mtime_ns for path in root.glob("*/train/**/*")}
    assert sweep(BLEND, SMALL, (0.1, 0.5), tmp_path) == arms
    assert times == {path: path.stat().st_mtime_ns for path in root.glob("*/train/**/*")}
