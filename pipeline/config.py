"""One run is one TOML file; this composes the folders' tables, applies `--set`, and checks what can be checked early.

Left out on purpose: anything that needs torch. `boresight check` must answer in under half a second.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from eval.config import EvalConfig
from eval.suite import Limits
from quant.config import FolderName, Frozen, QuantConfig, TargetSpec
from quant.errors import BoresightError
from quant.tables import OverrideError, ParseError, apply_override, describe, parse_toml, read_json_object
from train.config import ModelConfig, TrainConfig


class ConfigError(BoresightError, ValueError):
    """The configuration cannot be used."""


class SignoffConfig(Limits):
    """The `[signoff]` table: the limits a deployment must meet, and what concerns a model trained here."""

    discrepancy_slack: float = Field(
        1.5,
        ge=1,
        le=100,
        description="limit on the held-out discrepancy, as a multiple of the tolerance: the multiplier holds the mean "
        "at the tolerance, so half of all measurements lie above it",
    )
    baseline_arm: str | None = Field(
        None, description="metrics.jsonl of an unconstrained run, drawn beside this run's curves in the report"
    )


class RunConfig(Frozen):
    """A whole run."""

    name: FolderName
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
    if not os.path.isfile(path):  # unlike Path's, False for a name that is too long too
        raise ConfigError(f"{path}: {'a folder, not a config file' if os.path.isdir(path) else 'no such config file'}")
    try:
        table = read_json_object(path) if path.suffix == ".json" else parse_toml(path.read_bytes())
    except ParseError as error:
        raise ConfigError(f"{path}: cannot be parsed: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        for override in overrides:
            apply_override(table, override)
        return RunConfig.model_validate(table)
    except OverrideError as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, RunConfig)}") from error
