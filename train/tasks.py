"""Prompts with a verifiable reward: from reasoning-gym, a JSONL file, or a hub dataset; graded by rule.

A rule other than string comparison runs in processes of its own, where it cannot hurt the run (grading_pool.py). Left
out: reward models, multi-turn environments.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.tables import ParseError, parse_json, shown
from train.config import TaskConfig
from train.grading import Grading, Rule, TaskError, in_process
from train.grading_pool import Pool
from train.records import Problem

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one alone; no tokenizer and no file can hold it
CHARACTERS_PER_TOKEN = 1000  # more than any tokenizer's longest token, on average


@dataclass(frozen=True)
class Task:
    """Problems to train on, disjoint held-out problems, and how completions are graded.

    Attributes:
        train: problems for rollouts.
        heldout: problems for evaluation, never trained on.
        grade: (problem, completion text) pairs, and how many of them may fail, to their grades.
    """

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    grade: Grading

    def step_problems(self, step: int, count: int, seed: int) -> list[Problem]:
        """The `count` problems of a step: a walk through seeded permutations, a function of its arguments alone."""
        chosen: list[Problem] = []
        position = step * count
        while len(chosen) < count:
            epoch, offset = divmod(position + len(chosen), len(self.train))
            order = _permutation(f"{seed}/{epoch}", len(self.train))
            chosen += [self.train[i] for i in order[offset : offset + count - len(chosen)]]
        return chosen


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _permutation(seed: str, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return tuple(order)


def load_task(config: TaskConfig, seed: int) -> Task:
    """Read the problems, split off the held-out ones where they have no source of their own, and start the grader.

    Raises:
        TaskError: nothing to read, a missing field, no problems left, or a grader that cannot be imported.
    """
    problems = _distinct(_problems(config, config.name, config.options))
    if config.heldout_name is None and config.heldout_options is None:
        random.Random(seed).shuffle(problems)
        heldout, problems = problems[: config.heldout_size], problems[config.heldout_size :]
    else:
        options = config.options if config.heldout_options is None else config.heldout_options
        heldout = _distinct(_problems(config, config.heldout_name or config.name, options))[: config.heldout_size]
        unseen = {problem.prompt for problem in heldout}
        problems = [problem for problem in problems if problem.prompt not in unseen]
    if not problems:
        raise TaskError(
            f"train.task: no training problems left in {config.name!r} after {len(heldout)} held-out ones; "
            f"lower train.task.heldout_size or give more rows"
        )
    if not heldout:
        raise TaskError(f"train.task: no held-out problems in {config.heldout_name or config.name!r}")
    twice = [name for name, count in Counter(problem.id for problem in heldout).items() if count > 1]
    if twice:
        source = config.heldout_name or config.name
        raise TaskError(
            f"train.task: {len(twice)} ids stand for several held-out problems of {source!r}, such as "
            f"{shown(twice[0])}; answers are told apart by `id`: make it unique, or leave it out"
        )
    grade = in_process(grading_rule(config)) if config.grader == "exact" else Pool(config)
    return Task(tuple(problems), tuple(heldout), grade)


def _problems(config: TaskConfig, name: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    rows = {"reasoning-gym": _generated, "jsonl": _jsonl, "hub": _hub}[config.source](name, options, config.size)
    for index, row in enumerate(rows):
        if config.size is not None and index >= config.size:
            return
        try:
            prompt = config.prompt.format_map(row)
            answer = _answer(row[config.answer_field], f"row {index} of {name!r}", config)
        except TaskError:
            raise
        except (KeyError, IndexError) as error:
            raise TaskError(
                f"train.task: row {index} of {name!r} has no field {error}; it has {', '.join(map(str, row))}"
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise TaskError(
                f"train.task.prompt: {config.prompt!r} is no template for row {index} of {name!r}: {error}"
            ) from error
        problem = Problem(str(row.get("id", f"{Path(name).stem}-{index}")), prompt, answer, row)
        for field, text in (("id", problem.id), ("prompt", prompt), ("answer", answer)):
            if SURROGATE.search(text):
                raise TaskError(
                    f"train.task: the {field} of row {index} of {name!r} is no text: half of a surrogate pair"
                )
        yield problem


def _answer(given: Any, where: str, config: TaskConfig) -> str:
    """The reference answer as text; only reasoning-gym's own grader knows what to do without one."""
    if isinstance(given, list | dict) or (given is None and config.grader != "reasoning-gym"):
        raise TaskError(
            f"train.task.answer_field: {config.answer_field!r} of {where} is {shown(given)}, not a text or a number"
        )
    answer = str(given)
    if config.answer_split is not None:
        answer = answer.rsplit(config.answer_split, 1)[-1]
    return answer.strip()


def _generated(name: str, options: Mapping[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=size, **{"seed": 0} | dict(options))
        yield from (entry["metadata"] | entry for entry in dataset)
    except Exception as error:
        raise TaskError(f"train.task: reasoning-gym cannot make {name!r} with {dict(options)}: {error}") from error


def _jsonl(name: str, options: Mapping[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    path = Path(name)
    if not os.path.isfile(path):  # unlike Path's, False for a name that is too long too
        raise TaskError(f"train.task.name: no such JSONL file: {name}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ParseError as error:
                    raise TaskError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise TaskError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                yield row


def _hub(name: str, options: Mapping[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        arguments: dict[str, Any] = {"split": "train"} | dict(options)
        yield from datasets.load_dataset(name, **arguments)
    except Exception as error:
        raise TaskError(f"train.task: cannot load hub dataset {name!r} with {dict(options)}: {error}") from error


def _distinct(problems: Iterator[Problem]) -> list[Problem]:
    """First occurrence of every prompt, in order."""
    return list({problem.prompt: problem for problem in reversed(list(problems))}.values())[::-1]


def grading_rule(config: TaskConfig) -> Rule:
    """The config's grader as a plain function, which may hang, raise, or return anything.

    Raises:
        TaskError: it cannot be imported.
    """

    def tail(completion: str) -> str:
        split = config.completion_split
        return (completion if split is None else completion.rsplit(split, 1)[-1]).strip()

    if config.grader == "exact":
        return lambda problem, completion: float(tail(completion) == problem.answer)
    if config.grader == "reasoning-gym":
        get_score: Any = load_function("reasoning_gym:get_score_answer_fn", "train.task.grader")
        score = get_score(config.name)
        # partial credit below 1.0 is for near misses of format, not for right answers
        return lambda problem, completion: float(score(tail(completion), dict(problem.fields)) >= 1.0)
    if config.grader == "math-verify":
        parse, verify = (load_function(f"math_verify:{name}", "train.task.grader") for name in ("parse", "verify"))

        def grade(problem: Problem, completion: str) -> float:
            # its own timeouts end in "wrong", a silent 0; the worker's count as what they are
            gold, answer = (parse(text, parsing_timeout=None) for text in (f"${problem.answer}$", tail(completion)))
            if not gold:  # nothing would equal it: a silent 0 for every completion
                raise ValueError(f"the reference answer {shown(problem.answer)} is no mathematics")
            return float(verify(gold, answer, timeout_seconds=None))

        return grade
    return load_function(config.grader, "train.task.grader")


def fingerprint(task: Task) -> str:
    """SHA-256 (hex) of the prompts and answers, training and held-out apart: what a run was prepared with."""
    sets = [[(problem.prompt, problem.answer) for problem in part] for part in (task.train, task.heldout)]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()


def check_lengths(problems: Sequence[Problem], prompts: Sequence[str], tokenizer: Any, *, room: int) -> None:
    """Refuse a prompt that leaves less room for the response than asked for.

    Raises:
        TaskError: names the longest such problem, its length and the limit, in tokens; or one that is empty.
    """
    endless = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[endless]) > CHARACTERS_PER_TOKEN * room:  # not worth a tokenizer's minutes and gigabytes
        raise TaskError(
            f"the prompt of {problems[endless].id!r} has {len(prompts[endless]):,} characters, too many for "
            f"max_model_len - max_tokens = {room} tokens"
        )
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    if min(lengths) == 0:
        raise TaskError(f"the prompt of {problems[lengths.index(0)].id!r} is empty: no engine goes on from nothing")
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    over = sum(length > room for length in lengths)
    if over:
        raise TaskError(
            f"{over} of {len(lengths)} prompts are longer than max_model_len - max_tokens = {room} tokens, the longest "
            f"{problems[longest].id!r} with {lengths[longest]}; raise train.rollout.max_model_len or drop them"
        )


def load_function(reference: str, field: str) -> Callable[..., Any]:
    """Import `module:function`.

    Raises:
        TaskError: no such module or function, or whatever the module raises; the message names the config field.
    """
    module, _, function = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise TaskError(f"{field}: cannot import {reference!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise TaskError(f"{field}: {reference!r} is not a function")
    return found


def render(problems: Sequence[Problem], tokenizer: Any, *, chat: bool) -> list[str]:
    """Prompts as the engine gets them, to be tokenized *without* adding special tokens.

    In the tokenizer's chat template, as one user message; or verbatim, after the beginning-of-sequence token where
    the tokenizer would add one.

    Raises:
        TaskError: there is no chat template, or it refuses.
    """
    import jinja2

    if not chat:
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
        return [f"{bos}{problem.prompt}" for problem in problems]
    if not tokenizer.chat_template:
        raise TaskError("train.task.chat: the model's tokenizer has no chat template; set train.task.chat = false")
    try:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True
            )
            for problem in problems
        ]
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # the model's own program
        raise TaskError(f"train.task.chat: the model's chat template refuses a user's message: {error}") from error
