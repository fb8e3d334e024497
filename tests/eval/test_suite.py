"""The shipped suites and their tasks: they load, grade right, and what cannot work is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.answers import EvalError
from eval.lm_tasks import check_tasks, load_tasks
from eval.suite import SUITES, Generation, Suite, SuiteError, SuiteTask, load_suite

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MATH = {
    "aime24": ("aime24", 30), "aime25": ("aime25", 30), "amc23": ("amc23", 40), "math500": ("math500", 500),
    "minerva": ("minerva_math", 272), "olympiadbench": ("olympiadbench", 675),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(file.stem for file in SUITES.glob("*.toml")))
def test_every_shipped_suite_can_be_used(name: str) -> None:
    """It parses, lm-eval knows every task, and every metric, filter and combination is one that can be measured."""
    suite = load_suite(name)
    assert suite.name == name
    check_tasks(suite)


def test_the_math_suite_is_the_papers() -> None:
    """avg@32 on the three small sets, avg@4 on the others; T = 0.7, top_p 1, 32k tokens; one grader (2606.08779)."""
    suite = load_suite("math")
    assert {task.name: task.repeats for task in suite.task} == {
        "aime24": 32, "aime25": 32, "amc23": 32, "math500": 4, "minerva": 4, "olympiadbench": 4,
    }  # fmt: skip
    assert {suite.sampled(task) for task in suite.task} == {suite.generation}
    assert (suite.generation.temperature, suite.generation.top_p, suite.generation.max_tokens) == (0.7, 1.0, 32768)
    assert all(task.lm_eval.endswith("_math_verify") for task in suite.task)


@pytest.mark.parametrize("name", MATH)
def test_a_math_task_grades_local_rows(name: str, tmp_path: Path) -> None:
    """Every row is loaded with its prompt in the question; on each 20th of them, gold against gold is 1 and another
    number is 0, in a boxed sentence after some thinking."""
    file, n = MATH[name]
    if not (DATA / f"{file}.jsonl").is_file():
        pytest.skip(f"{file}.jsonl is not beside this checkout")
    (task,) = (each for each in load_suite("math").task if each.name == name)
    loaded, _ = load_tasks(task.model_copy(update={"data": str(DATA / f"{file}.jsonl")}), tmp_path)
    lm_task: Any = loaded[task.lm_eval]
    rows = [json.loads(line) for line in (DATA / f"{file}.jsonl").read_text().splitlines()]
    docs = list(lm_task.eval_docs)
    assert [(doc["id"], doc["answer"]) for doc in docs] == [(row["id"], row["answer"]) for row in rows]
    assert len(docs) == n
    for doc, row in list(zip(docs, rows, strict=True))[::20]:
        assert lm_task.doc_to_text(doc).startswith(row["prompt"] + "\n\n")
        for value, score in ((doc["answer"], 1.0), ("-987654321.5", 0.0)):
            response = f"<think>\nMaybe 7? No.\n</think>\n\nThe answer is $\\boxed{{{value}}}$."
            assert lm_task.process_results(doc, [response]) == {"math_verify": score}, doc["id"]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 60, "problem": "P", "solution": "\\boxed{204}", "url": "u"},  # math-ai/aime24
        {"id": "0", "problem": "P", "answer": "204"},  # math-ai/aime25
        {"id": 0, "question": "P", "answer": "204", "url": "u"},  # math-ai/amc23, math-ai/minervamath
        {"problem": "P", "solution": "long", "answer": "204", "level": 5},  # HuggingFaceH4/MATH-500
        {"id": 1, "question": "P", "final_answer": ["$204$"], "solution": ["long"], "is_multiple_answer": False},
        {"id": "x", "prompt": "P", "answer": "204", "source": "s"},  # a local file
    ],
)
def test_the_hubs_field_names_become_prompt_and_answer(row: dict[str, Any], tmp_path: Path) -> None:
    """The columns that each hub data set is documented with; the sets themselves were not reachable for this test."""
    from datasets import Dataset

    from eval.tasks.grading import problems

    (doc,) = problems(Dataset.from_list([row]))
    assert (doc["prompt"], doc["answer"]) == ("P", "204")


def test_several_answers_are_one_list() -> None:
    """OlympiadBench's two values are graded as a set: both, in any order, and not one of them."""
    from datasets import Dataset

    from eval.tasks.grading import math, problems

    (doc,) = problems(Dataset.from_list([{"question": "P", "final_answer": ["$-1$", "$\\frac{1}{2}$"]}]))
    scores = [math(doc, [f"$\\boxed{{{given}}}$"]) for given in ("-1, \\frac{1}{2}", "0.5, -1", "-1")]
    assert [score["math_verify"] for score in scores] == [1.0, 1.0, 0.0]


@pytest.mark.timeout(method="thread")  # the other method is the alarm that math-verify uses
def test_a_tower_of_powers_is_wrong_and_does_not_hang() -> None:
    """math-verify would compute 10^(10^10) to compare it; the time limit ends that."""
    from eval.tasks.grading import math

    assert math({"answer": "x^2+3"}, ["$\\boxed{10^{10^{10}}}$"]) == {"math_verify": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_eval": "nosuch"}, "no lm-eval task 'nosuch'"),
        ({"metric": "acc"}, "metric 'acc' is not one of exact_match"),
        ({"filter": "acc"}, "filter 'acc' is not one of none"),
        ({"few_shot": 2}, "fixed at no few-shot examples: take out few_shot = 2"),
        ({"lm_eval": "arc_easy"}, "set chat = false"),
        ({"lm_eval": "arc_easy", "chat": False, "repeats": 2}, "set repeats = 1"),
        ({"lm_eval": "wikitext"}, "its output_type is loglikelihood_rolling; allowed"),
        ({"lm_eval": "humaneval"}, "runs code that the model wrote"),
        ({"lm_eval": "gsm8k", "data": "rows.jsonl"}, "5 few-shot examples come from the data set .* few_shot = 0"),
        ({"lm_eval": "mmlu_stem", "chat": False, "data": "rows.jsonl"}, "a group of 19 tasks"),
        ({"lm_eval": "arc_easy", "chat": False, "data": "rows.jsonl"}, "reads the fields .'answerKey', 'choices'"),
        ({"data": "bad.jsonl"}, "bad.jsonl, line 2: no answer"),
        ({"data": "empty.jsonl"}, "empty.jsonl: no rows"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_served(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """One line that names the task or the file, and what to do."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "P", "answer": "1"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "P", "answer": "1"}\n{"prompt": "P"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    fields: dict[str, Any] = {"name": "mine", "lm_eval": "smoke_reading"} | change
    if "data" in fields:
        fields["data"] = str(tmp_path / fields["data"])
    with pytest.raises(EvalError, match=message) as caught:
        check_tasks(Suite(name="s", generation=Generation(temperature=1.0), task=(SuiteTask(**fields),)))
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_had_names_the_task_and_the_way_out(tmp_path: Path) -> None:
    """Offline, a hub set: the task's name and the `data = ` line."""
    with pytest.raises(EvalError, match=r"task 'mine': lm-eval's 'aime24_math_verify' .* `data = FILE.jsonl`"):
        load_tasks(SuiteTask(name="mine", lm_eval="aime24_math_verify"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 's'\ntask = []", "task: .*at least 1"),
        (
            "name = 's'\n[[task]]\nname = 'a'\nlm_eval = 'b'\nreps = 3",
            "task.0.reps: unknown key, did you mean .repeats.\\?",
        ),
        ("name = 's'\n[[task]]\nname = 'a'\nlm_eval = 'b'\nrepeats = 3", "repeats = 3 at temperature 0"),
        (
            "name = 's'\n[[task]]\nname = 'a'\nlm_eval = 'b'\ndata = 'no.jsonl'",
            "task 'a': data 'no.jsonl' is not there",
        ),
        ("name = ", "cannot be parsed"),
    ],
)
def test_a_bad_suite_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    """It starts with the file and names the field."""
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(str(tmp_path / "mine.toml"))
    assert str(caught.value).startswith(f"{tmp_path}/mine.toml: ")


def test_no_such_suite_says_which_there_are() -> None:
    """The three that ship."""
    with pytest.raises(SuiteError, match="shipped: general, math, smoke"):
        load_suite("mathh")


@pytest.mark.parametrize(
    ("name", "first"),
    [("smoke_arithmetic", ("99 + 74", "173")), ("smoke_reading", ("Henry puts the cup in the attic.", "attic"))],
)
def test_the_smoke_problems_are_the_same_everywhere(tmp_path: Path, name: str, first: tuple[str, str]) -> None:
    """200 different ones, the first known by heart; a right answer counts in the ways that models say it."""
    lm_task: Any = load_tasks(SuiteTask(name="x", lm_eval=name, chat=False), tmp_path)[0][name]
    docs = list(lm_task.eval_docs)
    assert len({doc["prompt"] for doc in docs}) == 200
    assert first[0] in docs[0]["prompt"]
    assert docs[0]["answer"] == first[1]
    for doc in docs:
        for said in (f" {doc['answer']}\nQ:", f" The {doc['answer'].capitalize()}."):
            assert lm_task.process_results(doc, [said]) == {"exact_match": 1.0}
        assert lm_task.process_results(doc, [f" {doc['answer']}0"]) == {"exact_match": 0.0}
