"""What lm-eval calls to read the held-out problems and to grade a response; copied beside every run's task.

The rule is the trainer's reward, so that training and evaluation count the same thing. The data is read here and not
by `dataset_path: json`, because that guesses types: an answer such as 2024-01-01 would become a timestamp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def load(data_files: Mapping[str, str], completion_split: str | None = None, **metadata: Any) -> dict[str, Any]:
    """The held-out problems as lm-eval wants them.

    Args:
        data_files: split name to the absolute path of a JSONL file with `id`, `prompt` and `answer`.
        completion_split: grade only what follows the last of these; it travels with every problem.
        metadata: the task's metadata, which lm-eval passes as well.
    """
    from datasets import Dataset

    splits = {}
    for split, path in data_files.items():
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        splits[split] = Dataset.from_list(
            [{key: str(row[key]) for key in ("id", "prompt", "answer")} | {"split": completion_split} for row in rows]
        )
    return splits


def final(doc: Mapping[str, Any], response: str) -> str:
    """The part of a response that is graded."""
    return (response if doc["split"] is None else response.rsplit(doc["split"], 1)[-1]).strip()


def exact(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(final(doc, results[0]) == doc["answer"].strip())}


def math(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    from math_verify import parse, verify

    return {"math_verify": float(verify(parse(f"${doc['answer']}$"), parse(final(doc, results[0]))))}
