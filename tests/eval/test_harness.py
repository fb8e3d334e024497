"""The shipped task: its grading is the trainer's rule, and its result is refused unless it fits the data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from eval.harness import EvalError, Sample, _samples, load_samples, write_task


def task(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], ModuleType]:
    """Write a task; return its own YAML, the one it includes, and the grading code beside it."""
    data = folder / "heldout.jsonl"
    settings: dict[str, Any] = {"grader": "exact", "completion_split": None, "temperature": 0.0, "max_tokens": 16}
    path = write_task(folder / "task", name="heldout", data=data, **(settings | changes))
    own = yaml.safe_load(path.read_text())
    base = yaml.load((path.parent / own["include"]).read_text(), _FunctionNames)
    spec = importlib.util.spec_from_file_location("grading", path.parent / "grading.py")
    assert spec is not None
    assert spec.loader is not None
    grading = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grading)
    return own, base, grading


class _FunctionNames(yaml.SafeLoader):
    """Reads `!function module.name` as its name."""


_FunctionNames.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))

SPLITS = (None, "####", "\n\n", "aa", "(.*)", " ")
RESPONSES = (
    "42", " 42\n", "", "####", "#### 42", "x #### 41 #### 42 ", "#### 42 ####", "a\nb", "xaaa42", "aaa", "4 2",
    "line\n\nline\n\n42", "(.*)42", "４２", "42\u2028", "\t42\x1f", "[invalid]",
)  # fmt: skip
ANSWERS = ("42", " 42 ", "", "a", "4 2", "a\nb", "2024-01-01", "[invalid]")


@pytest.mark.parametrize("split", SPLITS)
def test_exact_grading_is_the_rule_of_the_reward(tmp_path: Path, split: str | None) -> None:
    """For every response and answer: what follows the last split, stripped, equals the stripped answer."""
    own, base, grading = task(tmp_path, completion_split=split)
    assert base["process_results"] == "grading.exact"
    assert own["dataset_kwargs"]["completion_split"] == split
    for response in RESPONSES:
        for answer in ANSWERS:
            graded = response if split is None else response.rsplit(split, 1)[-1]
            doc = {"id": "0", "prompt": "p", "answer": answer, "split": split}
            assert grading.exact(doc, [response]) == {"exact_match": float(graded.strip() == answer.strip())}


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("1/2", "so it is 0.5", 1.0),
        ("\\frac{1}{2}", "$\\frac{2}{4}$", 1.0),
        ("42", "The answer is \\boxed{42}.", 1.0),
        ("42", "\\boxed{43}", 0.0),
        ("42", "", 0.0),
    ],
)
def test_math_grading_compares_values_not_strings(tmp_path: Path, answer: str, response: str, score: float) -> None:
    """Equal numbers in different notations count; wrong and empty responses do not."""
    _, base, grading = task(tmp_path, grader="math-verify")
    assert base["process_results"] == "grading.math"
    assert grading.math({"answer": answer, "split": None}, [response]) == {"math_verify": score}


def test_the_task_says_everything_that_lm_eval_would_otherwise_guess(tmp_path: Path) -> None:
    """No stop strings, greedy only at temperature 0, absolute data path, the prompt field itself (no template)."""
    own, base, _ = task(tmp_path)
    assert own["generation_kwargs"] == {
        "until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 16, "skip_special_tokens": True,
    }  # fmt: skip
    assert Path(own["dataset_kwargs"]["data_files"]["test"]).is_absolute()
    assert (base["doc_to_text"], base["doc_to_target"], base["num_fewshot"]) == ("prompt", "answer", 0)
    own, _, _ = task(tmp_path, temperature=0.7, completion_split='"\n: {{x}}\x7f')
    assert (own["generation_kwargs"]["do_sample"], own["generation_kwargs"]["temperature"]) == (True, 0.7)
    assert own["dataset_kwargs"]["completion_split"] == '"\n: {{x}}\x7f'


def test_the_data_is_read_as_text(tmp_path: Path) -> None:
    """An answer that looks like a date or a number stays what was written; so does white space of a prompt."""
    rows = [
        {"id": "a", "prompt": " 1+1=\n", "answer": "2024-01-01"},
        {"id": "b", "prompt": "{{x}}\u2028", "answer": "007"},
    ]
    _, _, grading = task(tmp_path)
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    docs = grading.load({"test": str(tmp_path / "heldout.jsonl")}, "##", version=1.0)["test"]
    assert list(docs) == [row | {"split": "##"} for row in rows]


def entry(index: int, **changes: Any) -> dict[str, Any]:
    doc = {"id": f"q{index}", "prompt": f"{index}+1=", "answer": f"{index + 1}"}
    logged = {"doc_id": index, "doc": doc, "arguments": [(doc["prompt"], {})], "resps": [["r"]], "exact_match": 1.0}
    return logged | changes


def test_samples_come_in_document_order_and_fit_the_data(tmp_path: Path) -> None:
    """lm-eval's order is not ours; a missing, re-worded or ungraded problem is an error with its id or count."""
    rows = [entry(i)["doc"] for i in range(3)]
    samples = _samples([entry(2), entry(0), entry(1, exact_match=0)], rows, "exact_match")
    assert [(sample.id, sample.score) for sample in samples] == [("q0", 1.0), ("q1", 0.0), ("q2", 1.0)]
    with pytest.raises(EvalError, match="3 held-out problems, but lm-eval scored 2"):
        _samples([entry(0), entry(1)], rows, "exact_match")
    with pytest.raises(EvalError, match="q1"):
        _samples([entry(0), entry(1, arguments=[("1+1=\n", {})]), entry(2)], rows, "exact_match")
    with pytest.raises(EvalError, match=r"q0.* no math_verify"):
        _samples([entry(0)], rows[:1], "math_verify")


def test_samples_round_trip(tmp_path: Path) -> None:
    """Line separators inside a response do not split a sample."""
    sample = Sample("q0", "1+1=", "2", "a\u2028b\nc\x85", 0.0)
    (tmp_path / "samples.jsonl").write_text(json.dumps(vars(sample), ensure_ascii=False) + "\n")
    assert load_samples(tmp_path / "samples.jsonl") == [sample]
