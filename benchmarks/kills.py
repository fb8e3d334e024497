"""SIGKILL at random moments of a whole run, all stages; then the same command again: is anything different?

`python -m benchmarks.kills` makes one run that is left alone, and then 20 whose process is killed, in each of the five
stages in turn, at a moment drawn uniformly from the seconds that the stage took in the first; then it is started again
until it is complete. Compared with the reference: metrics.jsonl without its seconds, rollouts.jsonl, last_sync.json,
the last checkpoint, the trained and the exported folder byte for byte, every sample of the evaluation and the served
discrepancy. After every kill and at every end it counts the processes left behind, by an environment variable that all
descendants inherit.

The model is random and tiny, the engine, the servers and every stage are the real ones; the KV cache is FP8, so that
calibrated scales are part of what must come back. It writes its table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.run_dir import RunDir, read_json, read_jsonl, write_text
from quant.verify import differences, file_digest
from train.checkpoint import latest_checkpoint

CONFIG = Path("configs/demo-int4.toml")
OVERRIDES = (
    "model.make.hidden_size=128", "model.make.intermediate_size=256", "model.make.layers=2", "model.make.heads=2",
    "model.make.kv_heads=1", "model.make.accuracy=0", "quant.kv_cache=fp8", "quant.calibrate_every=3",
    "train.task.size=400", "train.task.heldout_size=48", "train.task.grader=tests.rewards:share_of_digits",
    "eval.grader=exact", "train.rollout.prompts=8", "train.rollout.group_size=4", "train.steps=24", "train.lr=1e-3",
    "train.checkpoint_every=4", "eval.discrepancy_prompts=16", "eval.repeat_baseline=false",
    "signoff.baseline_arm=null",
)  # fmt: skip
PAGE = Path("docs/reliability.md")
SECTION = re.compile(r"(?<=<!-- kills -->\n).*?(?=<!-- /kills -->)", re.DOTALL)
COMMAND = "from pipeline.cli import main; main()"
MARK = "BORESIGHT_KILLS"
GONE_SECONDS = 15.0  # how long the guards have to end what a killed process leaves behind
STAGES = ("prepare", "train", "export", "evaluate", "sign off")
ATTEMPTS = 10  # moments drawn anew, where a run was faster than the reference and complete before its kill
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Kill:
    """One run that was killed and resumed.

    Attributes:
        moment: seconds after the stage began, when the process was killed.
        stage: what it was at.
        steps: rows of metrics.jsonl at that moment.
        orphans: processes that outlived the kill by `GONE_SECONDS`, and those left at the end.
        different: what is not as in the reference; empty when all is.
    """

    moment: float
    stage: str
    steps: int
    orphans: int
    different: tuple[str, ...]


def main() -> None:
    """Make the reference, kill and resume, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="a multiple of five hits all stages equally")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--root", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    shutil.rmtree(options.root, ignore_errors=True)
    kills = measure(options.root, kills=options.kills, seed=options.seed, jobs=options.jobs)
    text = table(kills, options.seed)
    print(text)
    if PAGE.is_file() and SECTION.search(PAGE.read_text()):
        write_text(PAGE, SECTION.sub(lambda _: text, PAGE.read_text()))
    if any(kill.different or kill.orphans for kill in kills):
        raise SystemExit(1)


def measure(root: Path, *, kills: int, seed: int, jobs: int = 1) -> list[Kill]:
    """Every kill, after the run that is left alone."""
    reference = RunDir(root / "reference" / "run")
    began: dict[str, float] = {}
    process = _start(root / "reference")
    while process.poll() is None:
        began.setdefault(_stage(reference), time.monotonic())
        time.sleep(POLL_SECONDS)
    ends = [*(began[stage] for stage in STAGES[1:]), time.monotonic()]
    seconds = {stage: end - began[stage] for stage, end in zip(STAGES, ends, strict=True)}
    _finish(root / "reference")  # does nothing where it is complete
    print(f"reference: {', '.join(f'{stage} {value:.1f} s' for stage, value in seconds.items())}", flush=True)

    def one(number: int) -> Kill:
        stage = STAGES[number % len(STAGES)]
        rng = random.Random(f"{seed}/{number}")
        done = killed(root / f"kill-{number}", reference, rng, stage, seconds[stage])
        print(f"kill {number}: {done}", flush=True)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(kills)))


def killed(root: Path, reference: RunDir, rng: random.Random, stage: str, seconds: float) -> Kill:
    """One run, killed at a random moment of the stage's seconds, resumed until complete, and compared."""
    run = RunDir(root / "run")
    for _ in range(ATTEMPTS):
        shutil.rmtree(root, ignore_errors=True)
        moment = rng.uniform(0, seconds)
        process = _start(root)
        while process.poll() is None and STAGES.index(_stage(run)) < STAGES.index(stage):
            time.sleep(POLL_SECONDS)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
    else:
        raise RuntimeError(f"{root}: {ATTEMPTS} runs in a row were complete before the moment of their kill")
    stage, steps = _stage(run), len(read_jsonl(run.metrics)) if run.metrics.is_file() else 0
    orphans = _left_behind(root)
    _finish(root)
    return Kill(moment, stage, steps, orphans + _left_behind(root), tuple(compare(reference, run)))


def compare(reference: RunDir, run: RunDir) -> Iterator[str]:
    """Names of what differs between two complete runs, timing left out."""
    if _timeless(reference) != _timeless(run):
        yield "metrics.jsonl"
    yield from differences(_digests(reference), _digests(run))
    if read_json(reference.discrepancy) != read_json(run.discrepancy):
        yield "discrepancy.json"


def _timeless(run: RunDir) -> list[dict[str, Any]]:
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == list(range(len(rows))), f"{run.metrics}: a step is missing or there twice"
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


def _digests(run: RunDir) -> dict[str, str]:
    """SHA-256 of every file that must be the same to the last bit, by its name in the run."""
    checkpoint = latest_checkpoint(run.train)
    assert checkpoint is not None
    folders = (run.made_model, run.policy, run.export, checkpoint)
    files = [file for folder in folders for file in folder.iterdir() if file.name != "random.safetensors"]
    samples = sorted(run.evaluate.rglob("samples_*.jsonl"))
    assert len(samples) >= 2, f"{run.evaluate}: the samples of both models, found {samples}"
    files += [run.rollouts, run.last_sync, run.scales, run.summary, run.heldout, *samples]
    return {str(file.relative_to(run.root)): file_digest(file) for file in files}


def _start(root: Path) -> subprocess.Popen[bytes]:
    """The command, with its output beside the run."""
    root.mkdir(parents=True, exist_ok=True)
    overrides = [part for override in ("name=run", *OVERRIDES) for part in ("--set", override)]
    with (root / "output.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", str(CONFIG), *overrides, "--runs", str(root)],
            env=os.environ | {MARK: str(root.resolve())}, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _finish(root: Path) -> None:
    """The same command, until the run is complete."""
    code = _start(root).wait()
    if not RunDir(root / "run").signoff.is_file():
        raise RuntimeError(f"the run ended with exit code {code} and without a sign-off; see {root / 'output.log'}")


def _stage(run: RunDir) -> str:
    """What a run was at when it was killed, by what is complete."""
    complete = {"prepare": run.prepared, "train": run.summary, "export": run.export / "manifest.json"}
    for stage, artifact in (*complete.items(), ("evaluate", run.discrepancy)):
        if not artifact.is_file():
            return stage
    return "sign off"


def _left_behind(root: Path) -> int:
    """Processes of this run that are still there when the guards have had their time."""
    deadline = time.monotonic() + GONE_SECONDS
    while (alive := _alive(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(alive)


def _alive(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == str(root.resolve()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or another user's
            continue
    return found


def table(kills: list[Kill], seed: int) -> str:
    """The section of the page."""
    same = sum(not kill.different for kill in kills)
    stages = Counter(kill.stage for kill in kills)
    lines = [
        f"{len(kills)} kills (seed {seed}): **{same} of {len(kills)} resumed runs equal to the reference, "
        f"{sum(kill.orphans for kill in kills)} processes left behind.** "
        f"Stages hit: {', '.join(f'{stage} {count}' for stage, count in stages.most_common())}.",
        "",
        "| kill | at | seconds into it | steps logged | processes left | different from the reference |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {number} | {kill.stage} | {kill.moment:.2f} | {kill.steps} | {kill.orphans} | "
        f"{', '.join(kill.different) or 'nothing'} |"
        for number, kill in enumerate(kills, 1)
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
