"""An hour of training steps: does memory, the number of file descriptors, threads or processes, or a step's time grow?

`python -m benchmarks.soak --minutes 60` starts a run of the real engine, with calibrated scales, checkpoints and a
grader in processes of its own, and watches it from outside: every few seconds the resident memory of its processes,
what they hold open, and how many steps are in metrics.jsonl. A step always samples the same number of tokens and moves
the weights, so its cost should not change. Time is the processes' CPU time per step besides the wall time, so that
other work on the machine does not count. At the end the run is asked to stop (SIGTERM), as a user would. The first
tenth is start-up and left out of the slopes. It writes its table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from scipy.stats import linregress

from benchmarks.kills import COMMAND, CONFIG, OVERRIDES
from pipeline.run_dir import RunDir, write_text

PAGE = Path("docs/reliability.md")
SECTION = re.compile(r"(?<=<!-- soak -->\n).*?(?=<!-- /soak -->)", re.DOTALL)
LONG = (
    "train.steps=1000000", "train.checkpoint_every=20", "train.rollout.ignore_eos=true",
    "train.task.grader=tests.rewards:chance", "train.lr=1e-4",
)  # fmt: skip
EVERY_SECONDS = 5.0
MIB = 2**20


@dataclass(frozen=True)
class Look:
    """The run's processes at one moment.

    Attributes:
        seconds: wall time since the first look.
        steps: rows of metrics.jsonl.
        memory: resident bytes, shared pages counted once per process.
        descriptors: open files, sockets and pipes.
        threads: of all processes.
        processes: how many.
        cpu: seconds of CPU, user and system, of the training process.
    """

    seconds: float
    steps: int
    memory: int
    descriptors: int
    threads: int
    processes: int
    cpu: float


def main() -> None:
    """Run, watch, stop, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--root", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    looks, code = watch(options.root, 60 * options.minutes)
    text = table(looks, code)
    print(text)
    if PAGE.is_file() and SECTION.search(PAGE.read_text()):
        write_text(PAGE, SECTION.sub(lambda _: text, PAGE.read_text()))


def watch(root: Path, seconds: float) -> tuple[list[Look], int]:
    """Start a run in an empty folder and look at it until the time is over; then SIGTERM.

    Returns:
        The looks, from the first step on, and the run's exit code.
    """
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    overrides = [part for override in ("name=run", *OVERRIDES, *LONG) for part in ("--set", override)]
    looks: list[Look] = []
    with (root / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", str(CONFIG), *overrides, "--runs", str(root)],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    metrics, started = RunDir(root / "run").metrics, time.monotonic()
    while not looks or looks[-1].seconds < seconds:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}; see {root / 'output.log'}")
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if steps:
            started = started if looks else time.monotonic()
            looks.append(_look(psutil.Process(process.pid), time.monotonic() - started, steps))
        time.sleep(EVERY_SECONDS)
    process.send_signal(signal.SIGTERM)
    return looks, process.wait()


def _look(leader: psutil.Process, seconds: float, steps: int) -> Look:
    processes = [leader, *leader.children(recursive=True)]
    spent = leader.cpu_times()
    return Look(
        seconds,
        steps,
        sum(p.memory_info().rss for p in processes),
        sum(p.num_fds() for p in processes),
        sum(p.num_threads() for p in processes),
        len(processes),
        spent.user + spent.system,
    )


def table(looks: Sequence[Look], code: int) -> str:
    """The section of the page."""
    kept = looks[len(looks) // 10 :]
    first, last = kept[0], kept[-1]
    steps = last.steps - first.steps
    pairs = [(a, b) for a, b in itertools.pairwise(kept) if b.steps > a.steps]
    levels: tuple[tuple[str, str, Callable[[Look], float]], ...] = (
        ("resident memory, all processes", "MiB", lambda look: look.memory / MIB),
        ("open file descriptors", "", lambda look: look.descriptors),
        ("threads", "", lambda look: look.threads),
        ("processes", "", lambda look: look.processes),
    )
    rates: tuple[tuple[str, str, Callable[[Look, Look], float]], ...] = (
        ("CPU time of a step", "s", lambda a, b: (b.cpu - a.cpu) / (b.steps - a.steps)),
        ("wall time of a step", "s", lambda a, b: (b.seconds - a.seconds) / (b.steps - a.steps)),
    )
    rows = [_row(name, unit, [k.steps for k in kept], [value(k) for k in kept]) for name, unit, value in levels]
    rows += [
        _row(name, unit, [(a.steps + b.steps) / 2 for a, b in pairs], [value(a, b) for a, b in pairs])
        for name, unit, value in rates
    ]
    return "\n".join(
        [
            f"{last.steps:,} steps in {last.seconds / 60:.0f} minutes, {len(looks)} looks; slopes over the last "
            f"{steps:,} steps. Asked to stop, it ended with exit code {code} (143 is right).",
            "",
            "| | at first | at the end | slope per 1,000 steps, 95% interval |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(name: str, unit: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """First and last tenth's mean, and the least-squares slope."""
    part = max(1, len(values) // 10)
    first, last = (sum(some) / len(some) for some in (values[:part], values[-part:]))
    fit = linregress(steps, values)
    slope, error = 1000 * fit.slope, 0.0 if len(set(values)) == 1 else 1000 * 1.96 * fit.stderr
    unit = f" {unit}" if unit else ""
    return f"| {name} | {first:.4g}{unit} | {last:.4g}{unit} | {slope:+.3g}{unit} ± {error:.2g} |"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
