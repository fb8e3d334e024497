"""The study's records: one line per run in SETTING.jsonl, each naming its configuration and what made it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.evidence.settings import Job
from pipeline.run_dir import read_jsonl, write_jsonl
from quant.hardware import detect_device

Record = Mapping[str, Any]


def read_records(records: Path, setting: str) -> list[Record]:
    """A setting's records; none where there is no file."""
    path = _file(records, setting)
    return list(read_jsonl(path)) if path.is_file() else []


def is_recorded(records: Path, job: Job) -> bool:
    """Whether the run's record is there, of the same configuration."""
    return any(_of(row, job) and row["config"] == job.digest() for row in read_records(records, job.setting))


def keep(records: Path, job: Job, record: Record) -> None:
    """Put a record into its setting's file, in order, in the place of an older one."""
    rows = [dict(row) for row in read_records(records, job.setting) if not _of(row, job)]
    rows.append({"arm": job.arm, "seed": job.seed, "config": job.digest(), **record})
    records.mkdir(parents=True, exist_ok=True)
    write_jsonl(_file(records, job.setting), sorted(rows, key=lambda row: (row["arm"], row["seed"])))


def provenance() -> dict[str, str]:
    """What made a record: the code's commit, the processor, the versions that matter."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    device = detect_device()
    wide = [flag for flag in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if flag in device.flags]
    return {
        "commit": commit.strip(),
        "machine": f"{platform.machine()}, {device.name} ({wide[0] if wide else 'no AVX2'})",
        "versions": f"torch {version('torch')}, vllm {version('vllm')}, transformers {version('transformers')}",
    }


def _file(records: Path, setting: str) -> Path:
    return records / f"{setting}.jsonl"


def _of(row: Record, job: Job) -> bool:
    return (row["arm"], row["seed"]) == (job.arm, job.seed)
