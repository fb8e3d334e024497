"""One run is one TOML file; this composes the folders' tables, applies `--set`, and checks what can be checked early.

Left out on purpose: anything that needs torch. `boresight check` must answer in under half a second.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from eval.config import EvalConfig
from quant.config import Frozen, QuantConfig, TargetSpec
from quant.errors import BoresightError
from train.config import ModelConfig, TrainConfig


class ConfigError(BoresightError, ValueError):
    """The configuration cannot be used."""


class SignoffConfig(Frozen):
    """The `[signoff]` table: the limits a deployment must meet."""

    margin: float = Field(0.02, gt=0, lt=1, description="non-inferiority margin on served accuracy, absolute")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")
    discrepancy_slack: float = Field(
        1.5,
        ge=1,
        description="limit on the held-out discrepancy, as a multiple of the tolerance: the multiplier holds the mean "
        "at the tolerance, so half of all measurements lie above it",
    )
    baseline_arm: str | None = Field(
        None, description="metrics.jsonl of an unconstrained run, drawn beside this run's curves in the report"
    )


class RunConfig(Frozen):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=1 << 15, description="per-completion seeds are derived from it and must fit 63 bits")
    model: ModelConfig
    quant: QuantConfig = QuantConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    signoff: SignoffConfig = SignoffConfig()

    @model_validator(mode="after")
    def _graded_outside(self) -> RunConfig:
        if ":" in self.train.task.grader and self.eval.grader is None:
            raise ValueError(
                f"eval.grader: say how the served model is graded, 'exact' or 'math-verify'; it runs outside of this "
                f"process and cannot call {self.train.task.grader!r}"
            )
        return self

    @model_validator(mode="after")
    def _room_to_answer(self) -> RunConfig:
        length = self.eval.max_model_len or self.train.rollout.max_model_len
        limit = self.eval.max_tokens or self.train.rollout.max_tokens
        if limit >= length:
            raise ValueError(f"eval.max_tokens ({limit}) must be below eval.max_model_len ({length})")
        return self

    @property
    def eval_grader(self) -> Literal["exact", "math-verify"]:
        """How lm-eval grades: as asked, else as in training; reasoning-gym's full credit is an exact answer."""
        return self.eval.grader or ("math-verify" if self.train.task.grader == "math-verify" else "exact")

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @property
    def target(self) -> TargetSpec:
        return self.quant.spec()


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a TOML config, or a run's resolved config.json, and apply `a.b=value` overrides.

    Raises:
        ConfigError: missing file, bad syntax, unknown key, wrong value, or choices that cannot work together.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'a folder, not a config file' if path.is_dir() else 'no such config file'}")
    try:
        text = path.read_text()
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be parsed: {error}") from error
    for override in overrides:
        _apply(table, override)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from error


def _apply(table: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; the value is TOML (`5`, `true`, `"x"`, `[1, 2]`), `null`, or else a bare string."""
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, such as train.steps=5")
    try:
        value = None if raw == "null" else tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is not a table")
    table[leaf] = value


def _describe(error: ValidationError) -> str:
    """One clause per mistake: field, what is allowed, what was given."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "config"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            parts.append(f"{field}: unknown key")
        elif item["type"] in ("value_error", "missing"):
            parts.append(f"{field}: {message}")
        else:
            parts.append(f"{field}: {message}, got {item['input']!r}")
    return "; ".join(parts)
