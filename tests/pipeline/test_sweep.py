"""A tolerance sweep's table, plot and refusals; no engine."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.lock import LOCK, LockError
from pipeline.plots import tolerance_region
from pipeline.run_dir import RunDir, write_json, write_jsonl
from pipeline.sweep import Arm, markdown, parse_ratios, read_arm, sweep

BLEND = Path(__file__).parent.parent.parent / "configs" / "methods" / "blend.toml"
ARMS = (
    Arm("ratio-0.1", 0.1, 0.015, 0.5, 0.012, 0.8, ()),
    Arm("ratio-1", 1.0, 0.15, 0.4, 0.16, 0.0, ("the multiplier never left its floor",)),
    Arm("unconstrained", None, None, 0.3, 0.07, 0.0, ()),
)


@pytest.mark.parametrize(("text", "expected"), [("0.05,0.1,1", (0.05, 0.1, 1.0)), (" 1, 0.3 ", (0.3, 1.0))])
def test_ratios_rise(text, expected) -> None:
    """In any order, with spaces."""
    assert parse_ratios(text) == expected


@pytest.mark.parametrize("text", ["", "a,b", "0.1,,1", "0,1", "-1", "0.1,0.1", "nan", "inf"])
def test_ratios_that_are_none_are_refused(text) -> None:
    """Words, holes, zero, negative, double, not finite."""
    with pytest.raises(ConfigError, match="--ratios"):
        parse_ratios(text)


@pytest.mark.parametrize("form", ["none", "straight-through"])
def test_without_a_multiplier_there_is_nothing_to_sweep(tmp_path, form) -> None:
    """An error before any work, and no folder."""
    with pytest.raises(ConfigError, match=f"constraint.form is '{form}'"):
        sweep(BLEND, (f"train.constraint.form={form}",), (0.1,), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_multiplier_that_cannot_move_is_not_swept(tmp_path) -> None:
    """Bounds that are one number: every arm would be the same run, so an error that names them, and no folder."""
    held = ("train.constraint.multiplier_min=1", "train.constraint.multiplier_init=1")
    with pytest.raises(ConfigError, match=r"multiplier_min and multiplier_max are both 1: .* none to sweep"):
        sweep(BLEND, held, (0.1,), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_sweeps_do_not_share_a_folder(tmp_path) -> None:
    """While another process holds the sweep's folder, a sweep is refused by one line that names its holder, before it
    makes anything there."""
    name = load_config(BLEND).name
    folder = tmp_path / f"{name}-sweep"
    code = f"from pathlib import Path; from pipeline.lock import hold; hold(Path({str(folder)!r})); print(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(LockError, match=f"{name}-sweep is in use by process {holder.pid} on "):
            sweep(BLEND, (), (0.1,), tmp_path)
        holder.kill()
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_an_arm_is_the_mean_of_its_last_ten_steps(tmp_path) -> None:
    """Twelve steps of which the first two are far off: they do not count; the unconstrained arm has no tolerance."""
    run = RunDir(tmp_path / "ratio-0.1")
    rows = [{"reward": 99.0 if k < 2 else k, "discrepancy": k / 10, "multiplier": 0.5} for k in range(12)]
    run.train.mkdir(parents=True)
    write_jsonl(run.metrics, rows)
    write_json(run.summary, {"tolerance": 0.02, "warnings": ["one"]})
    arm = read_arm(run, 0.1)
    assert (arm.name, arm.tolerance, arm.reward, arm.multiplier) == ("ratio-0.1", 0.02, 6.5, 0.5)
    assert arm.discrepancy == pytest.approx(0.65)
    assert arm.warnings == ("one",)
    assert read_arm(run, None).tolerance is None


def test_the_page_says_which_tolerances_were_held() -> None:
    """0.012 is within 0.015, 0.16 is not within 0.15; warnings are listed by arm."""
    page = markdown("demo", ARMS)
    assert "| ratio-0.1 | 0.1 | 0.015 | 0.5 | 0.012 | yes | 0.8 |" in page
    assert "| ratio-1 | 1 | 0.15 | 0.4 | 0.16 | no | 0 |" in page
    assert "| unconstrained | - | - | 0.3 | 0.07 | - | 0 |" in page
    assert "- ratio-1: the multiplier never left its floor" in page


@pytest.mark.parametrize("count", [1, 4])
def test_the_plot_is_a_file_of_its_own(count) -> None:
    """Well-formed, with its colours, both levels named, and a tick at every tolerance; also with a NaN arm."""
    tolerances = [0.0075, 0.015, 0.045, 0.15][:count]
    svg = tolerance_region(tolerances, [0.5] * count, [0.01] * (count - 1) + [math.nan], (0.3, 0.07))
    ElementTree.fromstring(svg)
    assert "--run: #1667bd" in svg
    for words in ("unconstrained", "tolerance c", "0.0075", "Reward"):
        assert words in svg
