"""Every path of a run directory, and atomic writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.storage import remove, sync_to_disk, writing


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps its artifacts. A stage's output is complete when its last-written artifact exists."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def target(self) -> Path:
        """The target file's content, as it was when the run began."""
        return self.root / "target.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def prepared(self) -> Path:
        return self.root / "prepare.json"

    @property
    def made_model(self) -> Path:
        return self.root / "model"

    @property
    def heldout(self) -> Path:
        return self.root / "data" / "heldout.jsonl"

    @property
    def diagnose(self) -> Path:
        return self.root / "diagnose"

    @property
    def engine(self) -> Path:
        """The export that the rollout engine starts from."""
        return self.root / "train" / "engine"

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def metrics(self) -> Path:
        return self.train / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.train / "rollouts.jsonl"

    @property
    def last_sync(self) -> Path:
        return self.train / "last_sync.json"

    @property
    def scales(self) -> Path:
        """The target's calibrated scales at the end of training."""
        return self.train / "scales.safetensors"

    @property
    def summary(self) -> Path:
        return self.train / "summary.json"

    @property
    def adapter(self) -> Path:
        """What LoRA learned, in peft's format; only where `train.lora` is set."""
        return self.train / "adapter"

    @property
    def ranks(self) -> Path:
        """What trainer processes leave when there are several: their log, what they failed with, the wish to stop."""
        return self.root / "ranks"

    @property
    def ranks_log(self) -> Path:
        return self.ranks / "log.txt"

    @property
    def ranks_error(self) -> Path:
        """What the first rank that failed had to say."""
        return self.ranks / "error.json"

    @property
    def stop(self) -> Path:
        """Where it exists, several ranks end after the step they are in, with a checkpoint."""
        return self.ranks / "stop"

    @property
    def policy(self) -> Path:
        """The trained BF16 model."""
        return self.root / "policy"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def evaluate(self) -> Path:
        return self.root / "evaluate"

    @property
    def heldout_task(self) -> Path:
        """The held-out problems as a folder of lm-eval's."""
        return self.evaluate / "task"

    @property
    def request(self) -> Path:
        """What an evaluation was asked to compare."""
        return self.evaluate / "request.json"

    @property
    def discrepancy(self) -> Path:
        return self.evaluate / "discrepancy.json"

    @property
    def signoff(self) -> Path:
        return self.root / "signoff.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def digest(self) -> Path:
        """The verdict as Markdown, for a pull request."""
        return self.root / "summary.md"


def model_dir_of(run: RunDir, record: Mapping[str, Any]) -> Path:
    """The BF16 model that training starts from: made in the run directory, or found outside."""
    return run.made_model if record["model_dir"] is None else Path(record["model_dir"])


def discard(*outputs: Path) -> None:
    """Remove what later stages made from what is about to be made again: none of it would belong together."""
    for path in outputs:
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_to_disk(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows at the end and flush them to disk: a checkpoint must not be there without the steps before it.

    One cut off by a crash has no end of line, and `read_jsonl` does not count it.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows whose line is complete; a last line without its end was cut off while it was written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
