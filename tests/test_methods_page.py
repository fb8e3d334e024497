"""docs/methods.md is what the examples say: `make methods` wrote it, and nothing has changed since."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.methods import FIELDS, GROUPS, METHODS, PAGE, Method, MethodError, header, methods, page, row
from pipeline.config import load_config

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / METHODS).glob("*.toml"))
# what an example of three steps has for itself
SIZE = {"task", "rollout", "steps", "lr", "minibatches", "microbatch_tokens", "attention", "constraint"}
NUMBERS = re.compile(r"\| (\d+\.\d\d|–) \| (\d+\.\d\d|–) \|")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_lines_turn_a_method_on(path) -> None:
    """The lines on the page, added to plain GRPO, give the example's own settings; without a `[train.constraint]`
    table, no lever. And there is at least one line."""
    method = Method.read(path)
    assert method.lines
    measured, own = method.config().train, load_config(path).train
    assert measured.model_dump(exclude=SIZE) == own.model_dump(exclude=SIZE)
    assert (measured.rollout.engine, measured.rollout.target) == (own.rollout.engine, own.rollout.target)
    if "constraint" in tomllib.loads(path.read_text())["train"]:
        assert measured.constraint == own.constraint
    else:
        assert measured.constraint.form == "none"


def test_the_page_has_every_method_as_it_is() -> None:
    """One row for every example, in order, whose words, config lines and source are the example's of now, and whose
    two costs are numbers or dashes. If this fails: `make methods`, or for words alone
    `python -m benchmarks.methods --rewrite`.
    """
    zero = {"step": [0.0], "rest": [0.0]}
    expected = [NUMBERS.sub("| N | N |", row(method, zero)) for method in methods()]
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    assert [NUMBERS.sub("| N | N |", line) for line in found] == expected


def test_header_fields_go_on_below() -> None:
    """A field ends where the next begins, its lines are joined, and a comment behind the first key is none of it."""
    text = "# group: engines\n# what: One\n#   two: three.\n# when: Now\n# source: ours\nname = 1\n# what: other\n"
    assert header(text, Path("x.toml")) == {
        "group": "engines", "what": "One two: three.", "when": "Now", "source": "ours"
    }  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field) -> None:
    """The error names the file and the field that is not there."""
    text = "".join(f"# {name}: text\n" for name in FIELDS if name != field)
    with pytest.raises(MethodError, match=rf"x\.toml: .* has no {field};"):
        header(text, Path("x.toml"))


def test_a_group_must_have_a_table(tmp_path) -> None:
    """A group that the page has no table for would leave the method out: refused, with those there are."""
    path = tmp_path / "x.toml"
    path.write_text("# group: others\n# what: a\n# when: b\n# source: c\n")
    with pytest.raises(MethodError, match=f"'others' is not one of {GROUPS[0]}"):
        Method.read(path)


def test_costs_are_medians_of_rounds() -> None:
    """1.0, 3.0, 1.2 is 1.20 and the control's rounds are shown as 0.97 to 1.04; a method without a cost has dashes."""
    method = Method("x", "engines", "a | b", "c", "ours", ('train.loss.name = "dapo"',))
    costs = {
        "device": "some CPU", "rounds": 3, "sequences": 4, "tokens": 2, "parameters": 1_800_000, "target": "int4-g128",
        "plain": {"step": [1.0, 0.97, 1.04], "rest": [1.0, 1.0, 1.0]},
        "methods": {"x": {"step": [1.0, 3.0, 1.2], "rest": [2.0, 2.5, 4.0]}},
    }  # fmt: skip
    text = page([method], costs)
    assert (
        '| [x](../configs/methods/x.toml) | a \\| b | c | 1.20 | 2.50 | `train.loss.name = "dapo"` | ours |'
        in text.splitlines()
    )
    assert "0.97 to 1.04" in text
    assert "| a \\| b | c | – | – |" in page([method], costs | {"methods": {}})
