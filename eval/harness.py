"""Accuracy of a served model, by lm-eval over HTTP; the only user of lm-eval.

Any lm-eval user can repeat the number: the task is a folder of plain lm-eval files, and every result carries the
command that gives it without this project. Left out: few-shot prompts and chat templates (the held-out prompts are
rendered once, when the data is written, so that training and evaluation see the same text), and lm-eval's own report.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.serve import REQUEST_SECONDS, Server
from quant.errors import BoresightError

TASKS_DIR = Path(__file__).parent / "tasks"
BASES = {"exact": "heldout_exact.yaml", "math-verify": "heldout_math.yaml"}
BATCH_SIZE = 8  # prompts per request: a third of the time of one by one
NO_TRUNCATION = 2**31  # lm-eval cuts long prompts from the left with a warning; the server refuses them instead


class EvalError(BoresightError):
    """lm-eval failed, or what it returned does not belong to the held-out problems."""


@dataclass(frozen=True)
class Sample:
    """One graded problem.

    Attributes:
        id: of the problem.
        prompt: as sent, already rendered.
        answer: the reference answer.
        response: the completion's text, without the end-of-sequence token.
        score: 0 or 1.
    """

    id: str
    prompt: str
    answer: str
    response: str
    score: float


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one served model; `OUT/LABEL.json` holds the same fields.

    Attributes:
        label: which of the compared models, such as "candidate".
        model: the folder that was served.
        task: the lm-eval task's name.
        metric: the lm-eval metric's name.
        n: problems graded.
        accuracy: mean score, in [0, 1].
        stderr: of the accuracy, sample standard deviation / sqrt(n); None for one problem.
        samples: file name of the per-problem samples, beside the result.
        seconds: of the evaluation, the server's start not included.
        generation: lm-eval's generation settings.
        by_hand: a shell command that gives the same samples at temperature 0, without this project.
    """

    label: str
    model: str
    task: str
    metric: str
    n: int
    accuracy: float
    stderr: float | None
    samples: str
    seconds: float
    generation: Mapping[str, Any]
    by_hand: str


def write_task(
    out_dir: Path,
    *,
    name: str,
    data: Path,
    grader: Literal["exact", "math-verify"],
    completion_split: str | None,
    temperature: float,
    max_tokens: int,
) -> Path:
    """Write a folder that `lm_eval --include_path OUT_DIR --tasks NAME` runs from anywhere.

    Args:
        data: the held-out problems, JSONL with `id`, `prompt` (rendered) and `answer`.
        completion_split: grade only what follows the last of these in the response; None grades all of it.

    Returns:
        The task's YAML file.
    """
    import yaml

    out_dir.mkdir(parents=True, exist_ok=True)
    for file in (BASES[grader], "grading.py"):
        shutil.copyfile(TASKS_DIR / file, out_dir / file)
    task = {
        "include": BASES[grader],
        "task": name,
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "completion_split": completion_split},
        "generation_kwargs": {
            "until": [],  # lm-eval would otherwise stop at a blank line
            "do_sample": temperature > 0,
            "temperature": temperature,
            "max_gen_toks": max_tokens,
            "skip_special_tokens": True,  # as the reward sees the text; lm-eval's backends differ in their default
        },
    }
    path = out_dir / f"{name}.yaml"
    _write(path, yaml.safe_dump(task, sort_keys=False, allow_unicode=True))
    return path


def evaluate(
    server: Server,
    *,
    model: Path,
    tokenizer: Path,
    task_dir: Path,
    task: str,
    out: Path,
    label: str,
    limit: int | None,
    concurrency: int,
    max_model_len: int,
) -> EvalResult:
    """Run a task of `write_task` against a server; write `OUT/samples_LABEL.jsonl`, then `OUT/LABEL.json`.

    Args:
        model: the folder that is served; for the record and the by-hand command.
        tokenizer: the folder with its tokenizer.
        limit: grade the first so many problems; None grades all.
        concurrency: requests in flight.
        max_model_len: of the server; for the by-hand command.

    Raises:
        EvalError: a request failed, or a problem came back without its score or with another prompt or answer.
    """
    import aiohttp
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    out.mkdir(parents=True, exist_ok=True)
    log = out / f"lm_eval_{label}.log"
    started = time.monotonic()
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        # `simple_evaluate` is this plus global seeds, a look at the working directory's git and a list of the machine's
        # software, which take seconds; a run's provenance has its own
        client = LocalCompletionsAPI(
            model=server.model,
            base_url=f"{server.base_url}/completions",
            header=server.headers,
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            batch_size=BATCH_SIZE,
            num_concurrent=max(2, concurrency // BATCH_SIZE),  # 1 would be another code path of lm-eval's
            max_length=NO_TRUNCATION,
            max_retries=1,  # the server is local: what it refuses once it refuses again
            timeout=int(REQUEST_SECONDS),
        )
        tasks = TaskManager(include_path=str(task_dir), include_defaults=False).load([task])
        try:
            found = lm_eval.evaluate(lm=client, task_dict=tasks, limit=limit, log_samples=True)
        except aiohttp.ClientError as error:
            raise EvalError(f"{task}: the server failed a request ({error!r}); see {log}") from error
    seconds = time.monotonic() - started

    config = found["configs"][task]
    metric = config["metric_list"][0]["metric"]
    rows = _rows(Path(config["dataset_kwargs"]["data_files"]["test"]), limit)
    samples = _samples(found["samples"][task], rows, metric)
    summary = found["results"][task]
    stderr = summary[f"{metric}_stderr,none"]
    result = EvalResult(
        label=label,
        model=str(model),
        task=task,
        metric=metric,
        n=len(samples),
        accuracy=float(summary[f"{metric},none"]),
        stderr=float(stderr) if len(samples) > 1 else None,
        samples=f"samples_{label}.jsonl",
        seconds=seconds,
        generation=config["generation_kwargs"],
        by_hand=_by_hand(model, task_dir, task, limit, max_model_len),
    )
    _write(out / result.samples, "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    _write(out / f"{label}.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def load_samples(path: Path) -> list[Sample]:
    """The samples of an evaluation, in the order of the held-out problems."""
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _samples(logged: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], metric: str) -> list[Sample]:
    """Join lm-eval's log with the problems it should have asked; they must agree on every prompt and answer."""
    if len(logged) != len(rows):
        raise EvalError(f"{len(rows)} held-out problems, but lm-eval scored {len(logged)}")
    samples = []
    for row, entry in zip(rows, sorted(logged, key=lambda entry: entry["doc_id"]), strict=True):
        asked = {"id": entry["doc"]["id"], "prompt": entry["arguments"][0][0], "answer": entry["doc"]["answer"]}
        held = {key: str(row[key]) for key in asked}
        if asked != held:
            raise EvalError(f"lm-eval asked {asked}, the held-out problem is {held}")
        if metric not in entry:
            raise EvalError(f"problem {asked['id']!r} has no {metric}")
        samples.append(Sample(**asked, response=entry["resps"][0][0], score=float(entry[metric])))
    return samples


def _rows(data: Path, limit: int | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]


def _by_hand(model: Path, task_dir: Path, task: str, limit: int | None, max_model_len: int) -> str:
    """lm-eval's own vLLM backend, in one process."""
    engine = f"pretrained={model.resolve()},dtype=bfloat16,max_model_len={max_model_len},enforce_eager=True"
    command = ["lm_eval", "run", "--model", "vllm", "--model_args", engine, "--batch_size", "auto"]
    command += ["--include_path", str(task_dir.resolve()), "--tasks", task]
    command += [] if limit is None else ["--limit", str(limit)]
    return "VLLM_ENABLE_V1_MULTIPROCESSING=0 " + shlex.join(command)


def _write(path: Path, text: str) -> None:
    """Beside, then rename: a reader sees the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
