"""A suite: which tasks, how they are sampled, and the limits a candidate must meet. One TOML file; torch-free.

`boresight signoff --suite NAME` takes one that ships (configs/suites/NAME.toml) or the path of the user's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from eval.config import ServingConfig
from quant.config import FOLDER_NAME, FolderName, Frozen, TargetSpec
from quant.errors import BoresightError
from quant.tables import ParseError, apply_override, describe, parse_toml, shown

# what may be left unmeasured when the user says so beforehand, as for an endpoint whose files cannot be seen
Waivable = Literal[
    "discrepancy", "quantized kernels", "artifact integrity", "tokenizer and template", "answer length",
    "truncated answers", "empty answers", "repetition", "throughput",
]  # fmt: skip
SUITES = Path(__file__).parent.parent / "configs" / "suites"


class SuiteError(BoresightError, ValueError):
    """The suite cannot be used."""


class Generation(Frozen):
    """The `[generation]` table: how answers are sampled; a task may have its own."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1, description="limit of an answer")


class SuiteTask(Frozen):
    """One `[[task]]`: an lm-eval task, stock, shipped in eval/tasks/, or the user's own."""

    name: FolderName = Field(description="in the report; unique in the suite")
    lm_eval: str = Field(description="lm-eval's name of it")
    include: str | None = Field(None, description="folder with the user's own lm-eval task files")
    metric: str | None = Field(None, description="of the task's metrics, one in [0, 1]; default: its first")
    filter: str | None = Field(None, description="of the task's filters; default: its first")
    data: str | None = Field(None, description="a local JSONL file with `prompt` and `answer`, in the hub's place")
    repeats: int = Field(1, ge=1, description="answers per problem (avg@k)")
    limit: int | None = Field(None, ge=1, description="the first N problems; default: all")
    few_shot: int | None = Field(None, ge=0, description="default: the task's own")
    chat: bool = Field(True, description="send the prompt as a chat message; false: as plain text")
    generation: Generation | None = Field(None, description="default: the suite's")
    margin: float | None = Field(None, gt=0, lt=1, description="default: the suite's")

    @model_validator(mode="after")
    def _data_in_its_place(self) -> SuiteTask:
        if self.data is not None and not FOLDER_NAME.fullmatch(self.lm_eval):
            raise ValueError(f"lm_eval {shown(self.lm_eval)} with data names a file: letters, digits, '.', '_' and '-'")
        return self


class HealthLimits(Frozen):
    """The `[health]` table: how much worse than the baseline's the candidate's answers may look.

    Shares are of all answers of all generating tasks; an increase is candidate minus baseline.
    """

    length_ratio: tuple[float, float] = Field((0.8, 1.25), description="mean answer length, candidate / baseline")
    truncated: float = Field(0.02, ge=0, le=1, description="increase of the share cut at the limit")
    empty: float = Field(0.01, ge=0, le=1, description="increase of the share without any text")
    repetition: float = Field(0.02, ge=0, le=1, description="increase of the mean share of repeated 4-grams")

    @model_validator(mode="after")
    def _length_bounds(self) -> HealthLimits:
        low, high = self.length_ratio
        if not 0 <= low < high:  # NaN fails too
            raise ValueError(f"length_ratio must be [low, high] with 0 <= low < high, got {[low, high]}")
        return self


class Limits(Frozen):
    """What a candidate must meet, whether it was trained here or not."""

    margin: float = Field(0.02, gt=0, lt=1, description="non-inferiority margin on accuracy, absolute")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")
    rule: Literal["all", "mean"] = Field(
        "all", description="all: every task is non-inferior; mean: the average of the tasks' differences is"
    )
    throughput: float | None = Field(
        None, gt=0, description="least tokens/s, candidate / baseline, measured beside each other; default: shown only"
    )
    health: HealthLimits = HealthLimits()
    waive: tuple[Waivable, ...] = Field((), description="checks that may stay unmeasured, named on the first page")


class SuiteLimits(Limits):
    """The `[limits]` table of a suite."""

    gap: float = Field(
        0.05, gt=0, le=1, description="mean |probability difference| to the baseline, on its own answers"
    )
    gap_prompts: int = Field(256, ge=2, description="prompts on which the gap is measured")
    gap_tokens: int = Field(512, ge=1, description="limit of an answer on which the gap is measured")


class Suite(Frozen):
    """A whole suite."""

    name: FolderName
    description: str = ""
    repeat_baseline: bool = Field(True, description="serve the baseline twice, for the engine's own noise")
    max_model_len: int | None = Field(None, ge=2, description="prompt plus answer; default: what the models can take")
    generation: Generation = Generation()
    serving: ServingConfig = ServingConfig()
    limits: SuiteLimits = SuiteLimits()
    task: tuple[SuiteTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names = [task.name for task in self.task]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {sorted({name for name in names if names.count(name) > 1})}")
        for task in self.task:
            settings = self.sampled(task)
            if task.repeats > 1 and settings.temperature == 0:
                raise ValueError(
                    f"task {task.name!r}: repeats = {task.repeats} at temperature 0 gives one answer each time"
                )
            if self.max_model_len is not None and settings.max_tokens >= self.max_model_len:
                raise ValueError(
                    f"task {task.name!r}: max_tokens ({settings.max_tokens}) must be below max_model_len "
                    f"({self.max_model_len})"
                )
        return self

    def sampled(self, task: SuiteTask) -> Generation:
        """How a task is sampled."""
        return task.generation or self.generation

    def margin(self, task: SuiteTask) -> float:
        """A task's margin."""
        return self.limits.margin if task.margin is None else task.margin


class Request(Frozen):
    """What a measurement was asked to compare: `request.json` of its folder.

    Attributes:
        baseline: hub id, folder or URL of the model that sets the standard, in BF16 as a rule.
        candidate: the same of the model that is to be deployed.
        suite: the tasks and limits.
        target: what the candidate must be; None takes what it says of itself.
        seed: of the sampling.
    """

    baseline: str
    candidate: str
    suite: Suite
    target: TargetSpec | None = None
    seed: int = 0


def load_suite(name: str, overrides: tuple[str, ...] = ()) -> Suite:
    """A shipped suite by its name, or the user's own by its path; `data` and `include` are relative to the file.

    Args:
        overrides: `key=value`, such as `limits.margin=0.01`, laid over the file.

    Raises:
        SuiteError: no such suite, bad syntax, an unknown key or a wrong value; a `data` or `include` that is not there.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    shipped = sorted(file.stem for file in SUITES.glob("*.toml"))
    if not (os.path.isfile(path) if name.endswith(".toml") else name in shipped):
        raise SuiteError(
            f"suite {shown(name)}: no such file {path}; shipped: {', '.join(shipped)}; or give the path of a .toml file"
        )
    try:
        table = parse_toml(path.read_bytes())
        for override in overrides:
            apply_override(table, override)
        suite = Suite.model_validate(table)
    except ParseError as error:
        raise SuiteError(f"{path}: cannot be parsed: {error}") from error
    except ValidationError as error:
        raise SuiteError(f"{path}: {describe(error, Suite)}") from error
    tasks = tuple(_located(task, path) for task in suite.task)
    return suite.model_copy(update={"task": tasks})


def _located(task: SuiteTask, path: Path) -> SuiteTask:
    """The task with its paths made absolute."""
    found = {}
    for key in ("data", "include"):
        given = getattr(task, key)
        if given is None:
            continue
        place = path.parent.resolve() / given
        try:
            found[key] = str(place.resolve(strict=True))
        except (OSError, RuntimeError, ValueError) as error:  # not there; a loop of links; a NUL in the name
            raise SuiteError(f"{path}: task {task.name!r}: {key} {shown(given)} is not there ({place})") from error
        if not (os.path.isdir if key == "include" else os.path.isfile)(found[key]):
            raise SuiteError(f"{path}: task {task.name!r}: {key} must be a {'folder' if key == 'include' else 'file'}")
    return task.model_copy(update=found)
