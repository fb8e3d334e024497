"""Two models, served and measured: everything a verdict is made of, left in one folder.

Per model: its files, its kernels, how it reads text (`models/LABEL.json`); per task: every answer
(`tasks/TASK/LABEL.json` and the samples beside it); between them the gap (`gap.json`). The candidate is looked at
before anything is served: one whose files are damaged, that takes a shorter text than asked, or that is not quantized
where a target is asked for, is not served. A measurement that was stopped goes on where it was, as long as it is the
same one. Left out: any judgement.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.client import ServedCompletion, Server, attach, sample, score, tokenize
from eval.config import ServingConfig
from eval.facts import model_facts
from eval.harness import evaluate_task, load_samples
from eval.lm_tasks import check_tasks
from eval.records import Gap, Label, ModelFacts
from eval.serve import serve_all
from eval.source import ModelSource
from eval.suite import Request, SuiteError
from quant.config import TargetSpec
from quant.errors import BoresightError
from quant.hardware import detect_device
from quant.storage import writing


class MeasureError(BoresightError):
    """The folder holds another measurement."""


@dataclass(frozen=True)
class Probe:
    """Prompts that the candidate continues, for its gap to be measured on; from the whole distribution.

    Attributes:
        prompts: token ids.
        max_tokens: limit of a continuation.
        temperature: of the sampling.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float


Say = Callable[[str], None]


def measure(
    request: Request, config: ServingConfig, out: Path, *, say: Say, probe: Probe | None = None
) -> list[ServedCompletion]:
    """Serve and measure what is asked for; `out/request.json` is written first, a task's result as soon as it is there.

    Args:
        request: the two models and the suite.
        config: how they are served.
        out: the folder.
        say: prints a line of progress.
        probe: what the candidate is sampled on for a gap that the caller measures; None measures the gap to the
            baseline here, on the suite's own prompts, and writes `gap.json`.

    Returns:
        The candidate's continuations of the probe; empty where it was not served.

    Raises:
        MeasureError: the folder holds another measurement.
        SourceError, SuiteError, EvalError: a model, or a task, cannot be used; before anything is served.
        ServeError: a server did not start, or failed a request.
    """
    sources, folders = claim(request, out)
    found: dict[str, ModelFacts] = {}
    for label in ("baseline", "candidate"):
        say(f"  {label}: {sources[label].given}, reading its files")
        found[label] = model_facts(label, sources[label], None, folders[label])
    _forget_others(out, found)
    length = _length(request, found["baseline"])
    reason = _unservable(found["candidate"], length, request.target)
    if reason is not None:
        for label, facts in found.items():
            _write(out / "models" / f"{label}.json", facts)
        say(f"  the candidate is not served: {reason}")
        return []

    continuations: list[ServedCompletion] = []
    given = probe
    # the candidate first: the baseline gives log-probs to what it said
    labels: tuple[Label, ...] = ("candidate", "baseline", "repeat")
    for together in _turns(labels if request.suite.repeat_baseline else labels[:2], config, sources):
        with _served(together, sources, folders, config, length, out, request.seed) as servers:
            for label, server in servers.items():
                if label != "repeat":
                    facts = model_facts(label, sources[label], server, folders[label], known=found[label].weights)
                    _write(out / "models" / f"{label}.json", facts)
                if server.pid is not None:  # the first request of an engine is slower than all others
                    sample(server, [tokenize(server, "1 2 3")], max_tokens=2, temperature=1.0, seed=0, concurrency=1)
                _answer_tasks(request, config, server, label, folders, out, length, say)
                if label == "candidate":
                    given = probe or _own_prompts(request, server, out, length)
                    continuations = sample(
                        server, given.prompts, max_tokens=given.max_tokens, temperature=given.temperature,
                        seed=request.seed, concurrency=config.concurrency,
                    )  # fmt: skip
                if label == "baseline" and probe is None and continuations:
                    _write(out / "gap.json", _gap(continuations, server, config.concurrency))
    return continuations


def claim(request: Request, out: Path) -> tuple[dict[str, ModelSource], dict[str, Path | None]]:
    """Refuse what can be refused before anything is served, then take an empty folder, or one that holds the same
    measurement, finished or not.

    Returns:
        The two models' sources and folders, by label; an endpoint has no folder.

    Raises:
        MeasureError, SourceError, SuiteError, EvalError, StorageError: see `measure`; nothing was written.
    """
    sources = {"baseline": ModelSource.parse(request.baseline), "candidate": ModelSource.parse(request.candidate)}
    check_tasks(request.suite)
    folders = {label: None if s.kind == "endpoint" else s.folder() for label, s in sources.items()}
    path, text = out / "request.json", request.model_dump_json(indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise MeasureError(f"{out} holds a measurement of other models or tasks; choose another folder or remove it")
    with writing(path):
        _write_text(path, text)
    return sources, folders


def _forget_others(out: Path, found: Mapping[str, ModelFacts]) -> None:
    """Remove what was measured on files that are no longer the same."""
    for label, facts in found.items():
        path = out / "models" / f"{label}.json"
        if not path.is_file() or facts.weights is None:
            continue
        held = json.loads(path.read_text(encoding="utf-8"))["weights"]
        if held is None or dict(held["files"]) != dict(facts.weights.files):
            for stale in (out / "tasks", out / "models"):
                shutil.rmtree(stale, ignore_errors=True)
            (out / "gap.json").unlink(missing_ok=True)
            return


def _length(request: Request, baseline: ModelFacts) -> int:
    """Tokens of prompt and answer that both servers are to take: as the suite says, else what the baseline can.

    Raises:
        SuiteError: the baseline cannot take that much, or nobody says how much.
    """
    asked, can = request.suite.max_model_len, baseline.context
    if asked is None and can is None:
        raise SuiteError(
            f"suite {request.suite.name!r}: give max_model_len; {request.baseline} does not say its context"
        )
    if asked is not None and can is not None and asked > can:
        raise SuiteError(f"suite {request.suite.name!r}: max_model_len is {asked}, but {request.baseline} takes {can}")
    length = asked if asked is not None else can
    assert length is not None, "one of the two is a number"
    return length


def _unservable(candidate: ModelFacts, length: int, target: TargetSpec | None) -> str | None:
    """Why there is no point in serving it: what is wrong is known, and answers would be of another model than meant."""
    if candidate.weights is not None and candidate.weights.problems:
        return candidate.weights.problems[0]
    if candidate.context is not None and candidate.context < length:
        return f"it takes {candidate.context} tokens, {length} are asked for"
    if target is not None and candidate.config is not None and not candidate.config["quantization"]:
        return f"it declares no quantization, so it is not {target.name}"
    return None


def _turns(
    labels: Sequence[Label], config: ServingConfig, sources: Mapping[str, ModelSource]
) -> Iterator[tuple[Label, ...]]:
    """Which servers run together: all on a CPU, where starting takes longest; else each alone with the card."""
    at_once = config.servers_at_once
    if at_once is None:
        at_once = detect_device().kind == "cpu"
    if at_once:
        yield tuple(labels)
    else:
        yield from ((label,) for label in labels)


@contextmanager
def _served(
    labels: Sequence[Label],
    sources: Mapping[str, ModelSource],
    folders: Mapping[str, Path | None],
    config: ServingConfig,
    length: int,
    out: Path,
    seed: int,
) -> Iterator[dict[Label, Server]]:
    """The labels' servers: ours for a folder, someone else's for an endpoint."""
    models = {label: folders[_model(label)] for label in labels}
    ours: dict[str, Path] = {label: folder for label, folder in models.items() if folder is not None}
    with serve_all(ours, config, max_model_len=length, log_dir=out, seed=seed) as started:
        yield {
            label: started[label]
            if label in started
            else replace(attach(sources[_model(label)]), request_seconds=config.request_timeout)
            for label in labels
        }


def _model(label: Label) -> str:
    """Which of the two models a label means."""
    return "baseline" if label == "repeat" else label


def _answer_tasks(
    request: Request,
    config: ServingConfig,
    server: Server,
    label: Label,
    folders: Mapping[str, Path | None],
    out: Path,
    length: int,
    say: Say,
) -> None:
    """Every task that has no result of this label yet."""
    for task in request.suite.task:
        folder = out / "tasks" / task.name
        if (folder / f"{label}.json").is_file():
            say(f"  {label}, {task.name}: measured before")
            continue
        result = evaluate_task(
            server, task, request.suite.sampled(task), label=label,
            model=request.baseline if label == "repeat" else getattr(request, label),
            tokenizer=folders["baseline"] or folders["candidate"], out=folder, concurrency=config.concurrency,
            max_model_len=length, seed=request.seed,
        )  # fmt: skip
        times = f" x {result.repeats}" if result.repeats > 1 else ""
        say(f"  {label}, {task.name}: {result.accuracy:.4f} on {result.n:,}{times} problems, {result.seconds:.0f} s")


def _own_prompts(request: Request, server: Server, out: Path, length: int) -> Probe:
    """The generating tasks' prompts in turn, as the server tokenizes them; at most `limits.gap_prompts`."""
    columns, longest = [], 0
    for task in request.suite.task:
        path = out / "tasks" / task.name
        result = json.loads((path / "candidate.json").read_text(encoding="utf-8"))
        if not result["generation"]:
            continue
        longest = max(longest, request.suite.sampled(task).max_tokens)
        prompts = [row.prompt for row in load_samples(path / result["samples"])]
        columns.append([json.loads(prompt) if result["chat"] else prompt for prompt in prompts])
    mixed = [column[i] for i in range(max(map(len, columns), default=0)) for column in columns if i < len(column)]
    limits = request.suite.limits
    ids = [tokenize(server, prompt) for prompt in mixed[: limits.gap_prompts]]
    room = length - max(map(len, ids), default=0) - 1  # a server that scores a text samples one token more
    return Probe(prompts=ids, max_tokens=min(limits.gap_tokens, longest, room), temperature=1.0)


def _gap(continuations: Sequence[ServedCompletion], baseline: Server, concurrency: int) -> Gap:
    """The baseline's log-probs of what the candidate said, against the candidate's own."""
    sequences = [one.prompt_ids + one.token_ids for one in continuations]
    starts = [len(one.prompt_ids) for one in continuations]
    theirs = [value for row in score(baseline, sequences, starts, concurrency=concurrency) for value in row]
    ours = [value for one in continuations for value in one.logprobs]
    differences = [abs(math.exp(p) - math.exp(q)) for p, q in zip(theirs, ours, strict=True)]
    k3 = [math.exp(p - q) - (p - q) - 1 for p, q in zip(theirs, ours, strict=True)]
    n = len(ours)
    return Gap(len(continuations), n, math.fsum(differences) / n, math.fsum(k3) / n)


def _write(path: Path, record: Any) -> None:
    _write_text(path, json.dumps(asdict(record), indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Beside, then rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
