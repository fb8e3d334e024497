"""The study's page: regions are written from records, prose stays, and nothing that is missing is silent."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.figures import tolerance
from benchmarks.evidence.page import NOT_RUN, REGION, PageError, draw
from benchmarks.evidence.results import Results, pooled_difference, score
from benchmarks.evidence.settings import ARMS, TABLES, Table, jobs
from benchmarks.evidence.statistics import mean_of_seeds
from benchmarks.evidence.tables import shown_difference
from benchmarks.evidence.worker import SAMPLES
from pipeline.run_dir import read_jsonl
from tests.benchmarks.fakes import fake, write

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "evidence.md"
QUOTED = re.compile(r"\d+\.\d ± \d+\.\d")  # points
PROSE = "# Title\n\nBy hand.\n\n<!-- table: small -->\n<!-- end -->\n\nMore by hand: 12.3 ± 4.5.\n"
MEANS = {"uncorrected": 0.4, "straight-through": 0.5, "blend": 0.6}


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """A folder for records beside a page with one region, of a table with three arms and three seeds."""
    monkeypatch.setitem(
        TABLES,
        "small",
        Table("Which?", ("severe",), tuple(MEANS), ("uncorrected", "straight-through"), "blend", seeds=3),
    )
    (tmp_path / "evidence.md").write_text(PROSE)
    return tmp_path / "evidence"


def rows(seeds: int = 3) -> list[dict]:
    """Fake records of all the arms."""
    return [fake("severe", arm, seed, mean) for arm, mean in MEANS.items() for seed in range(seeds)]


def drawn(records: Path) -> str:
    """The page after a draw."""
    draw(records, ["small"])
    return records.with_suffix(".md").read_text()


def row_of(page: str, arm: str) -> list[str]:
    """An arm's cells in the table of scores."""
    return next(line for line in page.splitlines() if line.startswith(f"| {ARMS[arm].title} |")).split(" | ")


def test_numbers_are_the_records_and_prose_stays(records) -> None:
    """The cell is the mean of the three records' scores in percent; what is outside of the marks is the same text."""
    made = rows()
    write(records, "severe", made)
    page = drawn(records)
    blend = [100 * row["scores"]["served_greedy"] for row in made if row["arm"] == "blend"]
    assert row_of(page, "blend")[1].startswith(f"{sum(blend) / 3:.1f} ± ")
    before, after = PROSE.split("<!-- table: small -->\n<!-- end -->")
    assert page.startswith(before)
    assert page.endswith(after)


def test_drawn_twice_is_drawn_once(records) -> None:
    """A second draw changes no byte of the page and none of a figure."""
    write(records, "severe", rows())
    first = drawn(records)
    figures = {path: path.read_bytes() for path in records.glob("*.svg")}
    assert drawn(records) == first
    assert {path: path.read_bytes() for path in records.glob("*.svg")} == figures


def test_what_was_tried_is_shown_and_not_owed(records, monkeypatch) -> None:
    """Of two arms that were tried, the one with a run has a row, the other none; neither is missing, nor run for it."""
    monkeypatch.setitem(TABLES, "small", replace(TABLES["small"], tried=("icepop", "distill")))
    write(records, "severe", [*rows(), fake("severe", "icepop", 0, 0.3)])
    page = drawn(records)
    assert row_of(page, "icepop")[-1].startswith("1 |")
    assert ARMS["distill"].title not in page
    assert "not run yet" not in page
    assert {job.arm for job in jobs(["small"])} == set(MEANS)


def test_without_records_it_says_so(records) -> None:
    """ "Not run" between the marks, and no figure."""
    assert f"<!-- table: small -->\n{NOT_RUN}<!-- end -->" in drawn(records)
    assert list(records.glob("*.svg")) == []


def test_what_is_missing_stopped_or_stale_is_named(records) -> None:
    """Two of three seeds, one run that ended early, and one of another configuration: each in words, and the last in no
    number."""
    made = rows()
    blend, straight = made[6:], made[3:6]
    straight[1]["stopped"] = "gradient norm is nan"
    blend[0] |= {"config": "0123456789abcdef", "scores": dict.fromkeys(blend[0]["scores"], 0.0)}
    write(records, "severe", [*made[:2], *straight, *blend])
    page = drawn(records)
    assert row_of(page, "uncorrected")[-1] == "2 of 3 |"
    assert row_of(page, "straight-through")[-1] == "3, 1 stopped |"
    assert row_of(page, "blend")[-1] == "2 of 3 |"
    assert float(row_of(page, "blend")[1].split(" ")[0]) > 50
    assert "- not run yet: W4A8, outliers x16: 1 of 9 runs" in page
    assert "straight-through trainer, seed 1: gradient norm is nan" in page
    assert "- left out, of an earlier configuration: W4A8, outliers x16: blend, seed 0" in page


def test_one_seed_has_no_interval(records) -> None:
    """The number, "1 of 3", and no p-value."""
    write(records, "severe", rows(seeds=1))
    page = drawn(records)
    assert re.fullmatch(r"\d\d\.\d", row_of(page, "blend")[1])
    assert row_of(page, "blend")[-1] == "1 of 3 |"
    compared = [
        line for line in page.splitlines() if line.startswith(f"| {ARMS['uncorrected'].title} |") and "+" in line
    ]
    assert re.fullmatch(r"\| .* \| \+\d+\.\d \| – \| \+\d+\.\d \| – \| 1 \|", compared[0])


def test_runs_of_different_machines_are_not_paired(records) -> None:
    """Seed 2 of the blend was run elsewhere, from another start model: it is in the arm's mean, in no difference and no
    cost, and the page says so."""
    made = rows()
    made[-1]["machine"] = "another machine"
    write(records, "severe", made)
    page = drawn(records)
    assert row_of(page, "blend")[-1] == "3 |"
    compared = next(line for line in page.splitlines() if line.startswith("| quantized rollouts") and "+" in line)
    assert compared.endswith("| 2 |")
    results = Results.read(records, "severe", tuple(MEANS), range(3))
    assert results.cost("blend").keys() == {0, 1}
    assert "- in no difference, because the two arms were run on different machines: W4A8, outliers x16: " in page


def test_over_settings_a_start_model_is_one_unit(records) -> None:
    """Seeds 0 and 1 in two settings and seed 2 in one: three units, each the mean of its settings' differences; made
    on another machine, seed 1 of the second setting is a unit of its own."""
    settings = {"severe": (0.60, 0.62, 0.64), "stale": (0.70, 0.76)}
    for setting, scores in settings.items():
        made = [fake(setting, arm, seed, 0.5) for arm in ("uncorrected", "blend") for seed in range(len(scores))]
        for row in made:
            row["scores"]["served_greedy"] = scores[row["seed"]] if row["arm"] == "blend" else 0.5
            if (setting, row["seed"]) == ("stale", 1):
                row["machine"] = "another machine"
        write(records, setting, made)
    results = [Results.read(records, setting, ("uncorrected", "blend"), range(3)) for setting in settings]
    for over, units in ((results, (15.0, 12.0, 14.0, 26.0)), (results[:1], (10.0, 12.0, 14.0))):
        estimate = pooled_difference(over, "blend", "uncorrected", score("served_greedy"))
        assert estimate is not None
        assert (estimate.seeds, estimate.mean) == (len(units), pytest.approx(sum(units) / len(units)))
        assert estimate.half_width == pytest.approx(mean_of_seeds(units).half_width)


def test_a_step_costs_what_it_does_beside_the_same_seed_uncorrected(records) -> None:
    """90 over 60 seconds of the processor is 1.50, in a run of fewer steps nothing, and the count says so."""
    made = rows()
    for row in made:
        row["seconds"]["cpu"] = 90.0 if row["arm"] == "blend" else 60.0
    made[-1]["stopped"] = "gradient norm is nan"
    made[-1]["curves"] = {name: values[:-1] for name, values in made[-1]["curves"].items()}
    write(records, "severe", made)
    assert row_of(drawn(records), "blend")[-2] == "1.50 (n = 2)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Nothing\n", "0 regions of table 'small'"),
        (PROSE + PROSE, "2 regions of table 'small'"),
        ("<!-- table: small -->\n", "1 regions begin and 0 end"),
        (PROSE + "<!-- table: other -->\n<!-- end -->\n", "no such table: other"),
    ],
)
def test_a_region_that_is_not_there_once_is_an_error(records, text, message) -> None:
    """None, two, one without an end, and one of no table: the error names it, and the page is as it was."""
    page = records.with_suffix(".md")
    page.write_text(text)
    with pytest.raises(PageError, match=message):
        draw(records, ["small"])
    assert page.read_text() == text


def test_a_quick_runs_page_is_begun_beside_its_records(tmp_path) -> None:
    """Without a page one is made, of the tables asked for, and docs/ is not touched."""
    before = PAGE.read_bytes()
    draw(tmp_path / "study-quick", ["matrix"])
    assert "<!-- table: matrix -->" in (tmp_path / "study-quick.md").read_text()
    assert PAGE.read_bytes() == before


def test_an_arm_without_a_multiplier_shows_none(records) -> None:
    """A dash for straight-through, a number for blend."""
    write(records, "severe", rows())
    page = drawn(records)
    assert row_of(page, "straight-through")[6] == "–"
    assert 0.7 <= float(row_of(page, "blend")[6].split(" ")[0]) <= 0.9


def test_the_committed_page_is_what_the_committed_records_say(tmp_path) -> None:
    """No number was edited by hand, and none is of older records. If this fails: `python -m benchmarks.study draw`."""
    if (ROOT / "docs" / "evidence").is_dir():
        shutil.copytree(ROOT / "docs" / "evidence", tmp_path / "evidence")
    shutil.copy(PAGE, tmp_path / "evidence.md")
    draw(tmp_path / "evidence", [name for name in TABLES if name != "quick"])
    assert (tmp_path / "evidence.md").read_text() == PAGE.read_text()
    for figure in (tmp_path / "evidence").glob("*.svg"):
        assert figure.read_bytes() == (ROOT / "docs" / "evidence" / figure.name).read_bytes(), figure.name


@pytest.mark.parametrize("text", ["docs/evidence.md", "docs/settings.md", "README.md"])
def test_what_is_quoted_stands_in_a_table(text) -> None:
    """Every mean with its interval in the prose is a cell of a table drawn from the records, whatever its sign."""
    prose = REGION.sub("", (ROOT / text).read_text())
    cells = set(QUOTED.findall(" ".join(content for _, _, content, _ in REGION.findall(PAGE.read_text()))))
    quoted = QUOTED.findall(prose)
    assert len(quoted) > 5
    assert not [number for number in quoted if number not in cells]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "evidence").glob("*.jsonl")), ids=lambda path: path.stem)
def test_scores_are_shares_of_the_answers(path) -> None:
    """Every committed record: its scores follow from its answers, bit by bit."""
    for row in read_jsonl(path):
        problems = len(row["answers"]["served_greedy"]) * 4
        for name, share in row["scores"].items():
            right = int(row["answers"][name], 16).bit_count()
            count = problems * (SAMPLES if name.endswith("sampled") else 1)
            assert share == pytest.approx(right / count, abs=1e-9), (row["arm"], row["seed"], name)


def test_figures_are_of_what_was_run(records) -> None:
    """Curves of the arms that have runs, with how many; a draw without records takes the figure away again."""
    write(records, "severe", rows()[:5])
    page = drawn(records)
    curves = records / "small-curves-severe.svg"
    assert f"({records.name}/{curves.name})" in page
    text = curves.read_text()
    assert "quantized rollouts, nothing else (3)" in text
    assert "straight-through trainer (2)" in text
    assert "blend" not in text
    assert "<dc:date>" not in text
    (records / "severe.jsonl").unlink()
    drawn(records)
    assert list(records.glob("*.svg")) == []


def test_the_map_is_against_the_best_without_a_multiplier(records, monkeypatch) -> None:
    """Straight-through is the best arm without one; blend's cell is its paired difference, as in the table."""
    monkeypatch.setitem(TABLES, "small", replace(TABLES["small"], settings=("severe", "stale")))
    for setting in ("severe", "stale"):
        write(records, setting, [fake(setting, arm, seed, MEANS[arm]) for arm in MEANS for seed in range(3)])
    drawn(records)
    results = Results.read(records, "stale", tuple(MEANS), range(3))
    best = results.best_unconstrained(tuple(MEANS), score("served_greedy"))
    difference = results.difference("blend", "straight-through", score("served_greedy"))
    assert best == "straight-through"
    assert difference is not None
    assert f">{shown_difference(difference)}<" in (records / "small-map.svg").read_text()


def test_a_sweeps_ratios_are_its_configurations(records) -> None:
    """The shipped form is the 0.1 that its configuration says, between c@0.05 and c@0.4: three marks on the axis."""
    arms = ("c@0.05", "blend-start", "c@0.4")
    write(records, "severe", [fake("severe", arm, seed, 0.5) for arm in arms for seed in range(2)])
    figure = tolerance(Results.read(records, "severe", arms, range(3)), arms)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0.05", "0.1", "0.4"]
    assert np.array_equal(np.asarray(figure.axes[0].lines[0].get_xdata()), [0.05, 0.1, 0.4])
    assert tolerance(Results.read(records, "severe", arms[:1], range(3)), arms[:1]) is None


@pytest.mark.parametrize("name", TABLES)
def test_a_table_compares_what_it_runs(name: str) -> None:
    """The arm that is claimed to be better and those it is compared with are among the arms with runs."""
    table = TABLES[name]
    run = {arm for arm, seeds in table.arm_seeds().items() if len(seeds)}
    assert {table.best, *table.against} <= run
