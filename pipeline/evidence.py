"""A run directory as evidence: every artifact the sign-off and the report read, each present or explicitly missing.

An artifact that is absent, unparsable or incomplete becomes a `Missing` with its reason, which travels to the verdict
and to the page as "not measured". Nothing here judges, and nothing here is repaired: half a file is no file.
Left out: schemas of the artifacts. Each reader asks for the numbers it needs, and one that is not there is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.run_dir import RunDir

# Names inside a run directory, as a reader is shown them.
_INSIDE = RunDir(Path())
CONFIG = _INSIDE.config.as_posix()
PROVENANCE = _INSIDE.provenance.as_posix()
PREPARE = _INSIDE.prepared.as_posix()
METRICS = _INSIDE.metrics.as_posix()
SUMMARY = _INSIDE.summary.as_posix()
LAST_SYNC = _INSIDE.last_sync.as_posix()
MANIFEST = (_INSIDE.export / "manifest.json").as_posix()
CANDIDATE = (_INSIDE.evaluate / "candidate.json").as_posix()
BASELINE = (_INSIDE.evaluate / "baseline.json").as_posix()
DISCREPANCY = _INSIDE.discrepancy.as_posix()


@dataclass(frozen=True)
class Missing:
    """What could not be measured: the file it should have come from, and why it did not."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"

    def number(self, *_keys: str) -> Missing:
        return self

    def digests(self, _key: str) -> Missing:
        return self


@dataclass(frozen=True)
class Artifact:
    """One JSON artifact: its name inside the run directory, and its content."""

    source: str
    table: Mapping[str, Any]

    def number(self, *keys: str) -> float | Missing:
        """The finite number at a nested key; a NaN or an infinity is not a measurement."""
        name, value = ".".join(keys), self.table
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return Missing(self.source, f"has no {name}")
            value = value[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Missing(self.source, f"{name} is {value!r}, which is not a number")
        if not math.isfinite(value):
            return Missing(self.source, f"{name} is {value}, which is not a measurement")
        return float(value)

    def digests(self, key: str) -> Mapping[str, str] | Missing:
        """The non-empty table {name: sha256} at `key`; an empty one proves nothing and is missing."""
        value = self.table.get(key)
        if not isinstance(value, Mapping) or not value:
            return Missing(self.source, f"has no digests under {key!r}")
        return value


@dataclass(frozen=True)
class Sample:
    """One evaluated problem, as asked of one served model."""

    id: str
    prompt: str
    answer: str
    response: str
    score: float  # of the task's metric; 0 or 1 for an exact match


Rows = tuple[Mapping[str, Any], ...]  # of a metrics.jsonl: one per step, in step order


@dataclass(frozen=True)
class Evidence:
    """All that a run left behind. `unconstrained` is None when the config names no such arm."""

    config: RunConfig | Missing
    provenance: Artifact | Missing
    prepare: Artifact | Missing
    metrics: Rows | Missing
    unconstrained: Rows | Missing | None
    summary: Artifact | Missing
    last_sync: Artifact | Missing
    manifest: Artifact | Missing
    exported: Mapping[str, str]  # {file name: sha256} of what lies in export/ now, the manifest excepted
    candidate: Artifact | Missing
    baseline: Artifact | Missing
    candidate_samples: tuple[Sample, ...] | Missing
    baseline_samples: tuple[Sample, ...] | Missing
    discrepancy: Artifact | Missing


def read_evidence(run: Path) -> Evidence:
    """Read a run directory, complete or not; hashes every exported file, so it takes as long as reading them."""
    config = _config(run)
    arm = None if isinstance(config, Missing) else config.signoff.baseline_arm
    candidate, baseline = _artifact(run, CANDIDATE), _artifact(run, BASELINE)
    return Evidence(
        config=config,
        provenance=_artifact(run, PROVENANCE),
        prepare=_artifact(run, PREPARE),
        metrics=_metrics(run / METRICS, METRICS),
        unconstrained=None if arm is None else _metrics(Path(arm), arm),
        summary=_artifact(run, SUMMARY),
        last_sync=_artifact(run, LAST_SYNC),
        manifest=_artifact(run, MANIFEST),
        exported=_digests(run / MANIFEST),
        candidate=candidate,
        baseline=baseline,
        candidate_samples=_samples(run, candidate),
        baseline_samples=_samples(run, baseline),
        discrepancy=_artifact(run, DISCREPANCY),
    )


def _config(run: Path) -> RunConfig | Missing:
    if not (run / CONFIG).is_file():
        return Missing(CONFIG, "no such file")
    try:
        return load_config(run / CONFIG)
    except ConfigError as error:
        return Missing(CONFIG, str(error).removeprefix(f"{run / CONFIG}: "))


def _text(path: Path, source: str) -> str | Missing:
    """A file's text; the reason names no absolute path, because a report travels."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Missing(source, "no such file")
    except OSError as error:
        return Missing(source, f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return Missing(source, f"is not text: {error.reason}")


def _artifact(run: Path, source: str) -> Artifact | Missing:
    text = _text(run / source, source)
    if isinstance(text, Missing):
        return text
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        return Missing(source, f"is not JSON: {error}")
    return Artifact(source, table) if isinstance(table, dict) else Missing(source, "is not a JSON object")


def _rows(path: Path, source: str) -> list[dict[str, Any]] | Missing:
    text = _text(path, source)
    if isinstance(text, Missing):
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return Missing(source, f"line {number} is not JSON: {error}")
        if not isinstance(row, dict):
            return Missing(source, f"line {number} is not a JSON object")
        rows.append(row)
    return rows or Missing(source, "is empty")


def _metrics(path: Path, source: str) -> Rows | Missing:
    """Rows by step; a step that a resumed run repeated counts once, as last written."""
    rows = _rows(path, source)
    if isinstance(rows, Missing):
        return rows
    by_step = {row.get("step"): row for row in rows}
    if not all(isinstance(step, int) for step in by_step):
        return Missing(source, "has a row without a whole-number step")
    return tuple(sorted(by_step.values(), key=lambda row: row["step"]))


def _samples(run: Path, result: Artifact | Missing) -> tuple[Sample, ...] | Missing:
    if isinstance(result, Missing):
        return result
    name = result.table.get("samples")
    if not isinstance(name, str):
        return Missing(result.source, "names no samples file")
    source = f"evaluate/{name}"
    rows = _rows(run / source, source)
    if isinstance(rows, Missing):
        return rows
    samples = []
    for number, row in enumerate(rows, start=1):
        absent = [key for key in ("id", "prompt", "answer", "response", "score") if key not in row]
        if absent:
            return Missing(source, f"row {number} has no {absent[0]}")
        score = Artifact(f"{source} row {number}", row).number("score")
        if isinstance(score, Missing):
            return score
        texts = {key: str(row[key]) for key in ("id", "prompt", "answer", "response")}
        samples.append(Sample(**texts, score=score))
    return tuple(samples)


def _digests(manifest: Path) -> dict[str, str]:
    """Every file beside the manifest, hashed as it is on disk now; empty when nothing was exported."""
    folder, digests = manifest.parent, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != manifest:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
