"""The study's page: prose written by hand, with a marked region per table that is written from the records.

    <!-- table: matrix -->
    ... numbers and figures, replaced at every draw ...
    <!-- end -->

What a region does not say is not known to it: every run that is missing, stopped early or of another configuration is
named there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.results import SCORES, Results, score, summary
from benchmarks.evidence.settings import ARMS, SETTINGS, TABLES, Table
from benchmarks.evidence.statistics import Estimate, holm, mean_of_seeds
from pipeline.run_dir import write_text
from quant.errors import BoresightError

REGION = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
START = re.compile(r"<!-- table: (\S+) -->")
NOT_RUN = "*Not run.*\n"
COMPARED = ("served_greedy", "served_sampled")
SIGNIFICANT = 0.05  # adjusted p below which a difference is set in bold
NAMES = {
    "served_greedy": "served, greedy", "served_sampled": "served, sampled",
    "bf16_greedy": "BF16, greedy", "bf16_sampled": "BF16, sampled",
}  # fmt: skip


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
        results = [Results.read(records, setting, table.arms, extra) for setting in table.settings]
        text = replaced(text, name, region(name, table, results, quick=bool(extra)))
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


def region(name: str, table: Table, results: Sequence[Results], *, quick: bool = False) -> str:
    """What stands between a table's marks.

    Args:
        results: one per setting of the table, in its order.
        quick: whether these are a quick run's records.
    """
    if not any(arm in result.runs for result in results for arm in table.arms):
        return NOT_RUN
    parts = []
    for result in results:
        if len(results) > 1:
            parts.append(f"**{SETTINGS[result.setting].title}** (`{result.setting}`)")
        parts += [scores(table, result)]
    parts += [comparisons(table, results), *notes(table, results), origin(name, results, quick=quick)]
    return "\n\n".join(part for part in parts if part) + "\n"


def scores(table: Table, result: Results) -> str:
    """The arms of one setting, a row each."""
    lines = [
        "| arm | "
        + " | ".join(NAMES[name] for name in SCORES)
        + " | gap, last 10 steps | λ at the end | cost of a step "
        "| seeds |",
        "|---" + "|---:" * (len(SCORES) + 4) + "|",
    ]
    for arm in table.arms:
        runs = result.runs.get(arm, {})
        costs = list(result.cost(arm).values())
        cells = [
            *(_shown(result.mean(arm, score(name)), 1, len(runs)) for name in SCORES),
            _shown(result.mean(arm, summary("gap_last")), 4, len(runs)),
            _shown(result.mean(arm, summary("multiplier")), 2, len(runs)) if ARMS[arm].constrained else "–",
            _shown(mean_of_seeds(costs) if costs else None, 2, len(runs)),
            _seeds(table, runs),
        ]
        lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparisons(table: Table, results: Sequence[Results]) -> str:
    """`best` minus each of `against`, in every setting; p-values adjusted over all that stand here."""
    found = {
        (result.setting, other, name): result.difference(table.best, other, score(name))
        for result in results
        for other in table.against
        for name in COMPARED
    }
    tested = {key: estimate.p for key, estimate in found.items() if estimate is not None and estimate.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    lines = [
        f"| {ARMS[table.best].title} minus | setting | " + " | ".join(f"{NAMES[name]} | p" for name in COMPARED)
        + " | seeds |",
        "|---|---" + "|---:|---:" * len(COMPARED) + "|---:|",
    ]  # fmt: skip
    for result in results:
        for other in table.against:
            estimates = [found[result.setting, other, name] for name in COMPARED]
            cells = []
            for name, estimate in zip(COMPARED, estimates, strict=True):
                p = adjusted.get((result.setting, other, name))
                cells += [_difference(estimate, bold=p is not None and p < SIGNIFICANT), "–" if p is None else _p(p)]
            count = estimates[0].seeds if estimates[0] is not None else 0
            lines.append(f"| {ARMS[other].title} | {result.setting} | {' | '.join(cells)} | {count} |")
    tests = (
        f"Differences in points, paired by seed; p of the paired t-test, adjusted by Holm over the {len(tested)} here."
    )
    return "\n".join(lines) + (f"\n\n{tests}" if tested else "")


def notes(table: Table, results: Sequence[Results]) -> list[str]:
    """What is missing, ended early, or left out, run by run."""
    lines = []
    for result in results:
        for arm in table.arms:
            runs, stale = result.runs.get(arm, {}), result.stale.get(arm, ())
            who = f"{ARMS[arm].title} ({result.setting})"
            missing = [seed for seed in range(table.seeds) if seed not in runs and seed not in stale]
            if missing:
                lines.append(f"- not run: {who}, {_seed_list(missing)}")
            if stale:
                lines.append(f"- left out, of an earlier configuration: {who}, {_seed_list(stale)}")
            lines += [
                f"- stopped early, and scored as it was then: {who}, seed {seed}: {record['stopped']}"
                for seed, record in sorted(runs.items())
                if record["stopped"] is not None
            ]
    return ["\n".join(lines)] if lines else []


def origin(name: str, results: Sequence[Results], *, quick: bool) -> str:
    """Who made the records, and how to make them again."""
    rows = [record for result in results for runs in result.runs.values() for record in runs.values()]
    told = {
        what: ", ".join(sorted({str(record[key]) for record in rows}))
        for what, key in (("on", "machine"), ("with", "versions"), ("at", "commit"))
    }
    command = f"python -m benchmarks.study all {name}{' --quick' if quick else ''}"
    hours = sum(record["seconds"]["total"] for record in rows) / 3600
    return (
        f"`{command}`: {len(rows)} runs, {hours:.1f} hours of training on one core each, on {told['on']}, "
        f"with {told['with']}, at {told['at']}."
    )


def digest(name: str, table: Table, results: Sequence[Results]) -> str:
    """A table in a line per comparison."""
    there = sum(len(result.runs.get(arm, {})) for result in results for arm in table.arms)
    lines = [f"{name}: {there} of {len(results) * len(table.arms) * table.seeds} runs. {table.question}"]
    for result in results:
        for other in table.against:
            estimate = result.difference(table.best, other, score("served_greedy"))
            lines.append(f"  {result.setting}: {table.best} minus {other}, served greedy: {_difference(estimate)}")
    return "\n".join(lines)


def _shown(estimate: Estimate | None, digits: int, runs: int) -> str:
    """mean ± half-width; with its own number of seeds where not all runs had the number."""
    if estimate is None:
        return "–"
    width = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{width}" + (f" (n = {estimate.seeds})" if estimate.seeds != runs else "")


def _difference(estimate: Estimate | None, *, bold: bool = False) -> str:
    if estimate is None:
        return "–"
    width = "" if estimate.half_width is None else f" ± {estimate.half_width:.1f}"
    text = f"{estimate.mean:+.1f}{width}"
    return f"**{text}**" if bold else text


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds(table: Table, runs: Mapping[int, Mapping[str, object]]) -> str:
    stopped = sum(record["stopped"] is not None for record in runs.values())
    count = str(len(runs)) if len(runs) >= table.seeds else f"{len(runs)} of {table.seeds}"
    return f"{count}, {stopped} stopped" if stopped else count


def _seed_list(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
