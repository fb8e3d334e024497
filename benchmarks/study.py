"""Does the constraint earn its place, and which form of it wins? Arms x settings x seeds, on the real engine.

    python -m benchmarks.study                  run what is missing of every table, then draw docs/evidence.md
    python -m benchmarks.study run matrix       run what is missing of one table (--setting NAME: of one setting)
    python -m benchmarks.study draw             redraw from the committed records alone, in seconds
    python -m benchmarks.study all --quick      six short runs, away from docs/, in 3 minutes

A run is one training on one core (`benchmarks.evidence.worker`); two go on at a time. Its record is one line of
docs/evidence/SETTING.jsonl, written as soon as it is there; a stopped study goes on, and a run is made again only when
its configuration changed. What is compared is in `benchmarks.evidence.settings`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.evidence.records import is_recorded, keep, provenance
from benchmarks.evidence.settings import SETTINGS, TABLES, Job, jobs
from quant.hardware import detect_device, unsupported_reason

RECORDS = Path("docs/evidence")
STARTS = Path("runs/study/starts")
QUICK = Path("runs/study-quick")
QUICK_SEEDS = 2
QUICK_RUNS = ("train.steps=20", "train.task.heldout_size=250")
PROCESSES = 2


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "run", "draw"), default="all")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--seeds", type=int, help="instead of each table's own number")
    parser.add_argument(
        "--setting", action="append", choices=SETTINGS, help="run this one of the tables' settings alone"
    )
    parser.add_argument("--quick", action="store_true", help=f"two seeds, 20 steps, records in {QUICK}")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="runs at a time, each on one core")
    options = parser.parse_args()
    unknown = sorted(set(options.tables) - set(TABLES))
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    tables = options.tables or (["quick"] if options.quick else [name for name in TABLES if name != "quick"])
    records = QUICK if options.quick else RECORDS
    extra = QUICK_RUNS if options.quick else ()
    if options.what != "draw":
        seeds = options.seeds or (QUICK_SEEDS if options.quick else None)
        wanted = [job for job in jobs(tables, seeds, extra) if job.setting in (options.setting or SETTINGS)]
        failed = run(wanted, records, options.processes)
        if failed:
            sys.exit(f"{failed} runs failed; what is there is kept, run again to go on")
    if options.what != "run":
        from benchmarks.evidence.page import draw

        print(draw(records, tables, extra))


def run(wanted: Sequence[Job], records: Path, processes: int) -> int:
    """Make the records that are missing; returns how many runs failed."""
    missing = [job for job in wanted if not is_recorded(records, job)]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there, {len(missing)} to make", flush=True)
    device = detect_device()
    reasons = {
        job: unsupported_reason(job.config().target, device) if SETTINGS[job.setting].quantized else None
        for job in missing
    }
    for reason in sorted({reason for reason in reasons.values() if reason}):
        settings = dict.fromkeys(job.setting for job in missing if reasons[job] == reason)
        print(f"not on this machine, so left for another: {', '.join(settings)}: {reason}", flush=True)
    missing = [job for job in missing if reasons[job] is None]
    if not missing:
        return 0
    # one core per run: read by libgomp and vLLM when they are loaded
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    origin, failed = provenance(), 0
    # a process of vLLM that had a dense model cannot start a mixture
    dense = [job for job in missing if job.dense]
    ended = chain(_ended(dense, processes), _ended([job for job in missing if not job.dense], processes))
    for made, (job, future) in enumerate(ended, 1):
        where = f"{made}/{len(missing)} {job.setting}, {job.arm}, seed {job.seed}"
        error = future.exception()
        if error is not None:
            failed += 1
            print(f"{where}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        record = future.result()
        keep(records, job, record | origin)
        scores = "  ".join(f"{name} {value:.3f}" for name, value in record["scores"].items())
        print(f"{where}: {scores}  ({record['seconds']['total']:.0f} s)", flush=True)
    return failed


def _ended(wanted: Sequence[Job], processes: int) -> Iterator[tuple[Job, Future[dict[str, Any]]]]:
    """Runs as they end, in processes of their own."""
    if not wanted:
        return
    with ProcessPoolExecutor(min(processes, len(wanted)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job): job for job in wanted}
        for future in as_completed(futures):
            yield futures[future], future


def run_job(job: Job) -> dict[str, Any]:
    """One run, in a process that keeps its engines for the next."""
    global _worker
    from benchmarks.evidence.worker import Worker
    from pipeline.models import quiet_libraries

    if _worker is None:
        quiet_libraries()
        _worker = Worker(STARTS)
    return _worker.run(job.config(), quantized=SETTINGS[job.setting].quantized)


_worker: Any = None


if __name__ == "__main__":
    main()
