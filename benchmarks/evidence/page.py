"""The study's page: prose written by hand, with a marked region per table that is written from the records.

    <!-- table: matrix -->
    ... numbers and figures, replaced at every draw ...
    <!-- end -->

What a region does not say is not known to it: every run that is missing, stopped early or of another configuration is
named there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.evidence import figures
from benchmarks.evidence.results import REFERENCE, Results, pooled_difference, score
from benchmarks.evidence.settings import SETTINGS, TABLES, Table
from benchmarks.evidence.tables import TOGETHER, comparisons, has_runs, notes, origin, scores, shown_difference
from pipeline.run_dir import write_text
from quant.errors import BoresightError

REGION = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
START = re.compile(r"<!-- table: (\S+) -->")
NOT_RUN = "*Not run.*\n"


class PageError(BoresightError, ValueError):
    """The page has no region for a table, or not exactly one; the message says which."""


def draw(records: Path, tables: Sequence[str], extra: tuple[str, ...] = ()) -> str:
    """Write the tables' regions and figures anew; all else on the page stays as it is.

    Args:
        records: folder of the records. The page is beside it, docs/evidence.md for docs/evidence, and its figures are
            in it; where there is no page, one with nothing but the regions is begun.
        tables: names in TABLES.
        extra: the `--set` lines of a quick run, which its records were made with.

    Returns:
        The same in a few lines for a terminal.

    Raises:
        PageError: the page's regions are not one for each of these tables.
    """
    page = records.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.is_file() else blank(tables)
    said = []
    for name in tables:
        check_regions(text, name, page)
        table = TABLES[name]
        seeds = range(table.first, table.first + table.seeds)
        arms = tuple(table.arm_seeds())
        results = [Results.read(records, setting, arms, seeds, extra) for setting in table.settings]
        images = draw_figures(name, table, results, records)
        text = replaced(text, name, region(name, table, results, images, quick=bool(extra)))
        said.append(digest(name, table, results))
    write_text(page, text)
    return "\n".join([*said, f"wrote {page}"])


def blank(tables: Sequence[str]) -> str:
    """A page of nothing but regions."""
    return "\n".join(
        f"## {TABLES[name].question}\n\n<!-- table: {name} -->\n{NOT_RUN}<!-- end -->\n" for name in tables
    )


def check_regions(text: str, name: str, page: Path) -> None:
    """Raises PageError unless the page has one whole region of this table, and no region of a table that is none."""
    marks, whole = START.findall(text), [found[1] for found in REGION.findall(text)]
    if marks.count(name) != 1:
        raise PageError(
            f"{page}: {marks.count(name)} regions of table {name!r}, needed is one: a line '<!-- table: {name} -->' "
            f"and after it a line '<!-- end -->'"
        )
    if marks != whole or text.count("<!-- end -->") != len(whole):
        raise PageError(f"{page}: {len(marks)} regions begin and {text.count('<!-- end -->')} end; regions do not nest")
    unknown = sorted(set(marks) - set(TABLES))
    if unknown:
        raise PageError(f"{page}: no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")


def replaced(text: str, name: str, content: str) -> str:
    """The page with this content between the marks of a region that it has."""
    return REGION.sub(lambda found: f"{found[1]}{content}{found[4]}" if found[2] == name else found[0], text)


def region(name: str, table: Table, results: Sequence[Results], images: Sequence[str], *, quick: bool = False) -> str:
    """What stands between a table's marks.

    Args:
        results: one per setting of the table, in its order.
        images: Markdown of its figures.
        quick: whether these are a quick run's records.
    """
    if not any(has_runs(table, result) for result in results):
        return NOT_RUN
    parts = [] if table.pooled else [scores(table, results)]  # they stand where the settings do one by one
    parts += [comparisons(table, results), *notes(table, results)]
    parts += [*images, origin(name, table, results, quick=quick)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw_figures(name: str, table: Table, results: Sequence[Results], folder: Path) -> list[str]:
    """Write a table's figures as NAME-KIND.svg, remove those of an earlier draw, return their Markdown."""
    there = [] if table.pooled else [result for result in results if has_runs(table, result)]
    arms = tuple(table.arm_seeds())
    found: dict[str, tuple[str, Figure | None]] = {}
    links = []
    with mpl.rc_context(figures.style(name)):
        if len(there) > 1 and REFERENCE in table.arms:
            caption = "Served greedy accuracy against the best arm without a constraint, in points"
            found[f"{name}-map"] = caption, figures.where(there, table.arms)
        for result in there:
            title = SETTINGS[result.setting].title
            if any(arm.startswith("c@") for arm in arms):
                found[f"{name}-region-{result.setting}"] = f"Tolerances, {title}", figures.tolerance(result, arms)
            found[f"{name}-curves-{result.setting}"] = (
                f"Learning curves, {title}", figures.curves(result, table.arms)
            )  # fmt: skip
        drawn = {file: (caption, figure) for file, (caption, figure) in found.items() if figure is not None}
        for old in folder.glob("*.svg"):
            if old.stem not in drawn and re.fullmatch(rf"{name}-(map|region-.*|curves-.*)", old.stem):
                old.unlink()
        images = []
        for file, (caption, figure) in drawn.items():
            write_text(folder / f"{file}.svg", figures.svg(figure, caption))
            address = f"{folder.name}/{file}.svg"
            if "-curves-" in file and len(table.settings) > 2:
                links.append(f"[{caption.removeprefix('Learning curves, ')}]({address})")
            else:
                images.append(f"![{caption}]({address})")
    return [*images, f"Learning curves: {'; '.join(links)}."] if links else images


def digest(name: str, table: Table, results: Sequence[Results]) -> str:
    """A table in a line per comparison."""
    arms = table.arm_seeds()
    there = sum(seed in arms[arm] for result in results for arm in arms for seed in result.runs.get(arm, {}))
    wanted = len(results) * sum(map(len, arms.values()))
    lines = [f"{name}: {there} of {wanted} runs. {table.question}"]
    there_are = list(filter(partial(has_runs, table), results))
    blocks = [(TOGETHER, there_are)] if table.pooled else [(result.setting, [result]) for result in there_are]
    for label, block in blocks:
        for other in table.against:
            estimate = pooled_difference(block, table.best, other, score("served_greedy"))
            lines.append(f"  {label}: {table.best} minus {other}, served greedy: {shown_difference(estimate)}")
    return "\n".join(lines)
