"""`boresight sweep-tolerance`: where the tolerance region of a task lies. One model, one training run per tolerance.

Every arm starts from the same prepared model with the same seed and budget and differs in its tolerance alone; one has
no constraint. The first step's gap at W is the same in all of them, so a ratio is a tolerance in the gap's own unit.
Arms run one after another, each in a process of its own, because a vLLM engine does not leave a process cleanly.
Nothing is exported: this is about choosing a tolerance, on training problems, before the run that is signed off.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from pipeline import console
from pipeline.config import ConfigError, load_config
from pipeline.lock import hold
from pipeline.run_dir import RunDir, model_dir_of, read_json, read_jsonl, write_json, write_text
from quant.errors import BoresightError

LAST_STEPS = 10  # what "final" is the mean of
UNCONSTRAINED = "unconstrained"
COMMAND = "from pipeline.cli import main; main()"


class SweepError(BoresightError):
    """An arm of the sweep did not finish."""


@dataclass(frozen=True)
class Arm:
    """A finished training run of the sweep.

    Attributes:
        name: its folder.
        ratio: the tolerance as a share of the first step's gap; None for the arm without a constraint.
        tolerance: c, a mean |probability difference|; None likewise.
        reward: mean over the last steps.
        discrepancy: mean |probability difference| over the last steps.
        multiplier: mean lambda over the last steps.
        warnings: what the run's summary warns about.
    """

    name: str
    ratio: float | None
    tolerance: float | None
    reward: float
    discrepancy: float
    multiplier: float
    warnings: tuple[str, ...]


def parse_ratios(text: str) -> tuple[float, ...]:
    """ "0.05,0.1,1" as rising numbers.

    Raises:
        ConfigError: not numbers above 0, or one of them twice.
    """
    try:
        ratios = sorted(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--ratios {text!r}: expected numbers, such as 0.05,0.1,1") from error
    if not all(ratio > 0 and math.isfinite(ratio) for ratio in ratios) or len(set(ratios)) < len(ratios):
        raise ConfigError(f"--ratios {text!r}: expected different finite numbers above 0")
    return tuple(ratios)


def sweep(path: Path, overrides: Sequence[str], ratios: Sequence[float], runs: Path) -> tuple[Arm, ...]:
    """Run what is missing of the sweep, then write `<runs>/<name>-sweep/{sweep.json, sweep.md, sweep.svg}` and print.

    Args:
        path: the TOML config, whose tolerance is replaced.
        overrides: `--set` overrides, for every arm.
        ratios: tolerances as shares of the first step's gap, rising.
        runs: folder of run directories.

    Returns:
        The arms, by rising tolerance, the one without a constraint last.

    Raises:
        ConfigError: the config has no tolerance to sweep, or a folder holds another configuration.
        LockError: another process sweeps there.
        SweepError: an arm's process ended in an error.
    """
    from pipeline.plots import tolerance_region

    config = load_config(path, tuple(overrides))
    constraint = config.train.constraint
    if not constraint.acts:
        raise ConfigError(
            f"constraint.form is {constraint.form!r}: without a multiplier there is no tolerance to sweep"
        )
    if not constraint.moves:
        raise ConfigError(
            f"constraint.multiplier_min and multiplier_max are both {constraint.multiplier_max:g}: a multiplier that "
            f"cannot move follows no tolerance, so there is none to sweep"
        )
    root = runs / f"{config.name}-sweep"
    hold(root)
    start = _prepared(path, overrides, root)
    settings: dict[str, tuple[float | None, tuple[str, ...]]] = {
        f"ratio-{ratio:g}": (ratio, ("train.constraint.tolerance=null", f"train.constraint.tolerance_ratio={ratio!r}"))
        for ratio in ratios
    }
    plain = ("form=none", "groups=model", "stage=advantage", "tolerance=null")
    settings[UNCONSTRAINED] = (None, tuple(f"train.constraint.{setting}" for setting in plain))
    arms = tuple(
        _arm(path, (*overrides, *changes, f"name={name}"), root / name, start, ratio)
        for name, (ratio, changes) in settings.items()
    )
    held = [(arm.tolerance, arm.reward, arm.discrepancy) for arm in arms if arm.tolerance is not None]
    tolerances, rewards, gaps = zip(*held, strict=True)
    write_text(root / "sweep.svg", tolerance_region(tolerances, rewards, gaps, (arms[-1].reward, arms[-1].discrepancy)))
    write_text(root / "sweep.md", markdown(config.name, arms))
    write_json(
        root / "sweep.json", {"config": str(path), "last_steps": LAST_STEPS, "arms": [asdict(arm) for arm in arms]}
    )
    header, rows = table(arms)
    console.section(f"Tolerances of {config.name}, mean of the last {LAST_STEPS} steps", header, rows, notes(arms))
    console.table({"table": root / "sweep.md", "plot": root / "sweep.svg"})
    return arms


def _prepared(path: Path, overrides: Sequence[str], root: Path) -> RunDir:
    """The run directory whose model every arm starts from."""
    from pipeline.run import open_run, prepare

    config = load_config(path, (*overrides, "name=start"))
    start = open_run(root / "start", config)
    if start.prepared.is_file():
        console.skipped("prepare", start.prepared)
    else:
        prepare(start, config)
    return start


def _arm(path: Path, overrides: tuple[str, ...], folder: Path, start: RunDir, ratio: float | None) -> Arm:
    """Train one arm in a process of its own, unless it is complete, and read what came of it."""
    from pipeline.run import open_run

    run = open_run(folder, load_config(path, overrides))
    if run.summary.is_file():
        console.skipped(folder.name, run.summary)
    else:
        if not run.prepared.is_file():
            record = read_json(start.prepared)
            run.heldout.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(start.heldout, run.heldout)
            write_json(run.prepared, record | {"model_dir": str(model_dir_of(start, record).resolve())})
        console.say(f"{folder.name}:")
        done = subprocess.run([sys.executable, "-c", COMMAND, "train", str(folder)], check=False)
        if done.returncode != 0:
            raise SweepError(f"{folder} ended with exit code {done.returncode}; the same command goes on from there")
    return read_arm(run, ratio)


def read_arm(run: RunDir, ratio: float | None) -> Arm:
    """What a finished run came to."""
    summary, last = read_json(run.summary), read_jsonl(run.metrics)[-LAST_STEPS:]
    return Arm(
        name=run.root.name,
        ratio=ratio,
        tolerance=None if ratio is None else summary["tolerance"],
        reward=fmean(row["reward"] for row in last),
        discrepancy=fmean(row["discrepancy"] for row in last),
        multiplier=fmean(row["multiplier"] for row in last),
        warnings=tuple(summary["warnings"]),
    )


def table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["arm", "ratio", "tolerance c", "reward", "discrepancy", "held", "lambda"]
    rows = []
    for arm in arms:
        bound = ["-", "-"] if arm.tolerance is None else [f"{arm.ratio:g}", f"{arm.tolerance:.4g}"]
        held = "-" if arm.tolerance is None else ("yes" if arm.discrepancy <= arm.tolerance else "no")
        numbers = [f"{arm.reward:.4g}", f"{arm.discrepancy:.4g}", held, f"{arm.multiplier:.3g}"]
        rows.append([arm.name, *bound, *numbers])
    return header, rows


def notes(arms: Sequence[Arm]) -> list[str]:
    """The arms' warnings, by name."""
    return [f"{arm.name}: {text}" for arm in arms for text in arm.warnings]


def markdown(name: str, arms: Sequence[Arm]) -> str:
    """The table as a page beside the plot."""
    header, rows = table(arms)
    lines = [
        f"# Tolerances of {name}",
        "",
        f"Mean of the last {LAST_STEPS} steps, on training problems. `held`: the mean gap is not above c.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)),
        "",
        *(f"- {note}" for note in notes(arms)),
        "",
        "![reward and discrepancy against the tolerance](sweep.svg)",
    ]
    return "\n".join(lines) + "\n"
