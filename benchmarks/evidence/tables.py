"""A table of the study as Markdown: arms' means, paired differences, what is missing, who made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.evidence.results import SCORES, Results, pooled_difference, score, summary
from benchmarks.evidence.settings import ARMS, SETTINGS, Table
from benchmarks.evidence.statistics import Estimate, holm, mean_of_seeds

COMPARED = ("served_greedy", "served_sampled")
TOGETHER = "all of them together"
SIGNIFICANT = 0.05  # adjusted p below which a difference is set in bold
NAMES = {
    "served_greedy": "served, greedy", "served_sampled": "served, sampled",
    "bf16_greedy": "BF16, greedy", "bf16_sampled": "BF16, sampled",
}  # fmt: skip


def has_runs(table: Table, result: Results) -> bool:
    """Whether any of the table's runs is there."""
    return any(result.runs.get(arm) for arm in table.arm_seeds())


def scores(table: Table, results: Sequence[Results]) -> str:
    """A row for every arm in every setting that has runs."""
    several = len(results) > 1
    lines = [
        f"| {'setting | ' * several}arm | " + " | ".join(NAMES[name] for name in SCORES)
        + " | gap, last 10 steps | λ at the end | cost of a step | seeds |",
        "|---" + "|---" * several + "|---:" * (len(SCORES) + 4) + "|",
    ]  # fmt: skip
    for result in results:
        label = SETTINGS[result.setting].title
        for arm, seeds in table.arm_seeds().items() if has_runs(table, result) else ():
            runs = result.runs.get(arm, {})
            if not runs and not seeds:
                continue
            costs = list(result.cost(arm).values())
            cells = [
                *([label] if several else []),
                ARMS[arm].title,
                *(_shown(result.mean(arm, score(name)), 1, len(runs)) for name in SCORES),
                _shown(result.mean(arm, summary("gap_last")), 4, len(runs)),
                _shown(result.mean(arm, summary("multiplier")), 2, len(runs)) if ARMS[arm].constrained else "–",
                _shown(mean_of_seeds(costs) if costs else None, 2, len(runs)),
                _seeds(runs, len(seeds)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            label = ""
    return "\n".join(lines)


def comparisons(table: Table, results: Sequence[Results]) -> str:
    """`best` minus each of `against`, in every setting that has runs or over these together; p-values are adjusted over
    all that stand here."""
    there = [result for result in results if has_runs(table, result)]
    names = (*COMPARED, "bf16_greedy") if table.pooled else COMPARED
    blocks = [(TOGETHER, there)] if table.pooled else [(SETTINGS[result.setting].title, [result]) for result in there]
    found = {
        (label, other, name): pooled_difference(block, table.best, other, score(name))
        for label, block in blocks
        for other in table.against
        for name in names
    }
    if not found:
        return ""
    tested = {key: estimate.p for key, estimate in found.items() if estimate is not None and estimate.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    lines = [
        f"| {'setting | ' * (len(results) > 1)}*{ARMS[table.best].title}* minus | "
        + " | ".join(f"{NAMES[name]} | p" for name in names) + " | seeds |",
        "|---" + "|---" * (len(results) > 1) + "|---:|---:" * len(names) + "|---:|",
    ]  # fmt: skip
    for label, _ in blocks:
        shown = label
        for other in table.against:
            estimates = [found[label, other, name] for name in names]
            cells = [shown] if len(results) > 1 else []
            cells.append(ARMS[other].title)
            for name, estimate in zip(names, estimates, strict=True):
                p = adjusted.get((label, other, name))
                cells += [
                    shown_difference(estimate, bold=p is not None and p < SIGNIFICANT),
                    "–" if p is None else _p(p),
                ]
            lines.append(f"| {' | '.join(cells)} | {estimates[0].seeds if estimates[0] is not None else 0} |")
            shown = ""
    over = " and averaged over the settings, a start model's being one" if table.pooled else ""
    tests = (
        f"Differences in points, paired by seed{over}; p of the paired t-test, adjusted by Holm over the {len(tested)} "
        "here."
    )
    return "\n".join(lines) + (f"\n\n{tests}" if tested else "")


def notes(table: Table, results: Sequence[Results]) -> list[str]:
    """What is missing, ended early, or left out."""
    lines = []
    for result in results:
        setting, missing = SETTINGS[result.setting].title, 0
        for arm, seeds in table.arm_seeds().items():
            runs, stale = result.runs.get(arm, {}), result.stale.get(arm, ())
            missing += sum(seed not in runs and seed not in stale for seed in seeds)
            other = set(result.runs.get(table.best, {})) & set(runs) - set(result.pairs(arm, table.best))
            if arm in table.against and other:
                lines.append(
                    f"- in no difference, because the two arms were run on different machines: {setting}: "
                    f"{ARMS[arm].title}, {_seed_list(sorted(other))}"
                )
            if stale:
                lines.append(
                    f"- left out, of an earlier configuration: {setting}: {ARMS[arm].title}, {_seed_list(stale)}"
                )
            lines += [
                f"- stopped early, and scored as it was then: {setting}: {ARMS[arm].title}, seed {seed}: "
                f"{record['stopped']}"
                for seed, record in sorted(runs.items())
                if record["stopped"] is not None
            ]
        if not has_runs(table, result) and not result.stale:
            lines.append(f"- not run: {setting}")
        elif missing:
            wanted = sum(map(len, table.arm_seeds().values()))
            lines.append(f"- not run yet: {setting}: {missing} of {wanted} runs; the column of seeds says which")
    return ["\n".join(lines)] if lines else []


def origin(name: str, table: Table, results: Sequence[Results], *, quick: bool) -> str:
    """Who made the records, and how to make them again."""
    rows = [
        (result.setting, record)
        for result in results
        for arm in table.arm_seeds()
        for record in result.runs.get(arm, {}).values()
    ]
    made: dict[tuple[str, str], set[str]] = {}
    for setting, record in rows:
        made.setdefault((record["machine"], record["versions"]), set()).add(setting)
    where = "; ".join(
        f"on {machine}, with {versions}" + (f": {', '.join(sorted(settings))}" if len(made) > 1 else "")
        for (machine, versions), settings in sorted(made.items())
    )
    commits = ", ".join(sorted({str(record["commit"]) for _, record in rows}))
    return (
        f"`python -m benchmarks.study all {name}{' --quick' if quick else ''}`: {len(rows)} runs, at "
        f"{commits}, {where}."
    )


def _shown(estimate: Estimate | None, digits: int, runs: int) -> str:
    """mean ± half-width; with its own number of seeds where not all runs had the number."""
    if estimate is None:
        return "–"
    width = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{width}" + (f" (n = {estimate.seeds})" if estimate.seeds != runs else "")


def shown_difference(estimate: Estimate | None, *, bold: bool = False) -> str:
    """Points with their sign and half-width."""
    if estimate is None:
        return "–"
    width = "" if estimate.half_width is None else f" ± {estimate.half_width:.1f}"
    text = f"{estimate.mean:+.1f}{width}"
    return f"**{text}**" if bold else text


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds(runs: Mapping[int, Mapping[str, object]], wanted: int) -> str:
    stopped = sum(record["stopped"] is not None for record in runs.values())
    count = str(len(runs)) if len(runs) >= wanted else f"{len(runs)} of {wanted}"
    return f"{count}, {stopped} stopped" if stopped else count


def _seed_list(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
