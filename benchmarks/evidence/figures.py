"""The study's figures: learning curves, where the constraint helps, a sweep of the tolerance.

An arm has one look in all of them: a colour of the Okabe-Ito palette for its family (Okabe & Ito 2008, told apart with
any colour vision), a dash for its variant. The same records give the same bytes. White background, 8 inches wide: 9
point text can still be read where a README shows 800 pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.evidence.records import Record
from benchmarks.evidence.results import REFERENCE, Results, score, summary
from benchmarks.evidence.settings import ARMS, SETTINGS, Job

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
)  # fmt: skip
GREY = "#777777"
LOOKS: Mapping[str, tuple[str, str]] = {
    "blend-start": (BLACK, "-"), "blend-start-weak": (BLACK, "-."), "blend-start-strong": (BLACK, ":"),
    "bf16-then-quantize": (GREY, "--"), "exact": (BLACK, "--"),
    "uncorrected": (VERMILION, "-"), "length-triggered": (VERMILION, "--"),
    "token-tis": (ORANGE, "-"), "icepop": (ORANGE, "--"), "sequence-tis": (ORANGE, "-."),
    "sequence-masked": (ORANGE, ":"),
    "straight-through": (GREEN, "-"), "straight-through-tis": (GREEN, "--"),
    "straight-through-distill": (GREEN, "-."), "straight-through-start": (GREEN, ":"),
    "advantage": (PURPLE, "-"), "advantage-excess": (PURPLE, "--"), "advantage-hinge": (PURPLE, "-."),
    "reward-stage": (PURPLE, ":"),
    "distill": (SKY, "-"), "otb-4": (SKY, "-"), "grpo-4": (ORANGE, "-"), "grpo-32": (BLUE, "-"),
    "blend": (BLUE, "-"), "blend-distill": (BLUE, "--"), "blend-distill-4": (BLUE, "-."),
    "blend-blocks": (SKY, "-."), "blend-tis": (BLUE, ":"),
    "blend-start-fading": (PURPLE, "-"), "blend-start-tight-fading": (PURPLE, "--"),
    "blend-start-tight-full": (BLUE, "--"), "default": (BLUE, "--"), "reachable": (GREY, "-."),
    "straight-through-start-fading": (SKY, "--"),
}  # fmt: skip
PANELS = (("reward", "reward, training"), ("discrepancy", "gap"), ("multiplier", "λ"))
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "lines.linewidth": 1.5, "axes.edgecolor": GREY,
    "figure.facecolor": "white",
}  # fmt: skip
SWEPT = "blend-start"  # whose tolerance the arms "c@..." change
WIDTH = 8.0  # inches
LINE = 0.24  # inches of a line of a legend
HALF = 46  # characters of a legend that fit into half of the width


def looks(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of every arm; a sweep's values (`name@value`) go from dark to light in the order given."""
    swept = [arm for arm in arms if "@" in arm]
    shades = mpl.colormaps["viridis"]
    found = dict(LOOKS)
    found |= {arm: (to_hex(shades(0.9 * i / max(len(swept) - 1, 1))), "-") for i, arm in enumerate(swept)}
    return {arm: found.get(arm, (GREY, "-")) for arm in arms}


def curves(result: Results, arms: Sequence[str]) -> Figure | None:
    """Reward, gap (log) and multiplier against the step: a line for the mean over seeds, a band from the lowest to the
    highest; an arm's tolerance dashed in its colour. A run that stopped early is a thin line of its own, with a cross
    at its end.

    Returns:
        None where none of these arms has a run of more than one step.
    """
    shown = [arm for arm in arms if any(len(run["curves"]["step"]) > 1 for run in result.runs.get(arm, {}).values())]
    if not shown:
        return None
    held = [arm for arm in shown if ARMS[arm].constrained]
    panels = PANELS if held else PANELS[:2]
    labels = [f"{ARMS[arm].title} ({len(result.runs[arm])})" for arm in shown]
    columns = 2 if max(map(len, labels)) <= HALF else 1
    keys = math.ceil(len(labels) / columns)
    heights = [2.4, 1.7, 1.1][: len(panels)]
    height = sum(heights) + 0.25 * len(panels) + 0.55 + LINE * keys
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.add_gridspec(
        len(panels), 1, height_ratios=heights, left=0.1, right=0.98, top=1 - 0.1 / height,
        bottom=(0.5 + LINE * keys) / height, hspace=0.12,
    )  # fmt: skip
    axes: list[Axes] = []
    for i, (name, title) in enumerate(panels):
        panel = figure.add_subplot(grid[i], sharex=axes[0] if axes else None)
        axes.append(panel)
        for arm, (color, dash) in looks(shown).items():
            if name != "multiplier" or arm in held:
                _curve(panel, list(result.runs[arm].values()), name, color, dash)
            if name == "discrepancy" and arm in held:
                tolerance = result.mean(arm, summary("tolerance"))
                if tolerance is not None:
                    panel.axhline(tolerance.mean, color=color, linestyle=(0, (4, 3)), linewidth=0.8)
        panel.set_ylabel(title)
        if i < len(panels) - 1:
            panel.tick_params(labelbottom=False)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_minor_locator(NullLocator())
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes[-1].set_xlabel("step")
    handles = [axes[0].plot([], [], dash, color=color)[0] for color, dash in looks(shown).values()]
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.08, 0.0), ncol=columns, frameon=False)
    return figure


def where(results: Sequence[Results], arms: Sequence[str]) -> Figure:
    """Settings x arms: points of served greedy accuracy above or below the best arm without a constraint in the
    setting, with the 95% interval of the paired difference; coloured where that does not hold 0."""
    height = 0.42 * len(results) + 1.05
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.36, 0.35 / height, 0.63, 0.42 * len(results) / height))
    for y, result in enumerate(results):
        best = result.best_unconstrained(arms, score("served_greedy"))
        for x, arm in enumerate(arms):
            text, face = _cell(result, arm, best)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=2))
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(len(results)), [fill(SETTINGS[result.setting].title, 42) for result in results], fontsize=8)
    axes.set_xticks(range(len(arms)), [fill(ARMS[arm].title, 90 // len(arms)) for arm in arms], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    keys = (
        ("#cccccc", "best without a multiplier", 0.2), (SKY, "better", 0.41), (ORANGE, "worse", 0.52),
        ("#f2f2f2", "the interval holds 0", 0.62),
    )  # fmt: skip
    for color, label, left in keys:
        figure.add_artist(Rectangle((left, 0.1 / height), 0.015, 0.12 / height, facecolor=color))
        figure.text(left + 0.02, 0.16 / height, label, va="center", fontsize=8)
    return figure


def tolerance(result: Results, arms: Sequence[str]) -> Figure | None:
    """Served and BF16 greedy accuracy, and below them the gap at the end, against the tolerance's share of the first
    gap; bars are 95% intervals, the dashed line is the uncorrected arm.

    Returns:
        None with fewer than two of the sweep's values run.
    """
    ratios = {
        Job(result.setting, arm, 0).config().train.constraint.tolerance_ratio: arm
        for arm in arms
        if (arm == SWEPT or arm.startswith("c@")) and result.runs.get(arm)
    }
    if len(ratios) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 4.6))
    grid = figure.add_gridspec(2, 1, height_ratios=(1.5, 1), left=0.1, right=0.98, top=0.97, bottom=0.1, hspace=0.12)
    top = figure.add_subplot(grid[0])
    low = figure.add_subplot(grid[1], sharex=top)
    rows = (
        (top, score("served_greedy"), BLUE, "o-", "served, greedy"),
        (top, score("bf16_greedy"), BLACK, "s-", "BF16, greedy"),
        (low, summary("gap_last"), BLUE, "o-", "gap, last 10 steps"),
        (low, summary("tolerance"), GREY, "_", "tolerance"),
    )
    for axes, of, color, mark, label in rows:
        found = {ratio: result.mean(arm, of) for ratio, arm in sorted(ratios.items())}
        points = [(ratio, estimate) for ratio, estimate in found.items() if estimate is not None]
        axes.errorbar(
            [ratio for ratio, _ in points], [estimate.mean for _, estimate in points],
            yerr=[estimate.half_width or 0.0 for _, estimate in points] if mark != "_" else None,
            fmt=mark, color=color, capsize=3, markersize=5 if mark != "_" else 14, label=label,
        )  # fmt: skip
    for axes, of, color in ((top, score("served_greedy"), BLUE), (top, score("bf16_greedy"), BLACK)):
        plain = result.mean(REFERENCE, of)
        if plain is not None:
            axes.axhline(plain.mean, color=color, linestyle="--", linewidth=0.9)
    top.set_xscale("log")
    low.set_yscale("log")
    low.set_xticks(list(ratios), [f"{ratio:g}" for ratio in ratios])
    low.xaxis.set_minor_locator(NullLocator())
    low.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    low.yaxis.set_minor_locator(NullLocator())
    low.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    top.tick_params(labelbottom=False)
    top.set_ylabel("right answers, %")
    top.set_ylim(0, 100)
    low.set_ylabel("gap")
    low.set_xlabel("tolerance, as a share of the first step's gap")
    top.legend(frameon=False, loc="best")
    low.legend(frameon=False, loc="best")
    return figure


def style(name: str) -> dict[str, Any]:
    """matplotlib's settings for drawing and saving a figure of this name."""
    return STYLE | {"svg.hashsalt": name}


def svg(figure: Figure, description: str) -> str:
    """The figure as a file's text: no date, no version, coordinates to a tenth of a point."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d\d+", _tenth, path[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def _curve(axes: Axes, runs: Sequence[Record], name: str, color: str, dash: str) -> None:
    """The mean and the range of the runs that have the commonest steps, and each other run alone."""
    grids = Counter(tuple(run["curves"]["step"]) for run in runs if run["stopped"] is None)
    common = grids.most_common(1)[0][0] if grids else None
    for run in runs:
        steps, values = run["curves"]["step"], run["curves"].get(name)
        if values and tuple(steps) != common:
            axes.plot(steps, _numbers(values), dash, color=color, linewidth=0.7)
            axes.plot(steps[-1:], _numbers(values[-1:]), "x", color=color, markersize=6)
    together = [run["curves"][name] for run in runs if tuple(run["curves"]["step"]) == common and name in run["curves"]]
    if together and common is not None:
        points = [[value for value in column if value is not None] for column in zip(*together, strict=True)]
        axes.plot(common, [fmean(point) if point else math.nan for point in points], dash, color=color)
        if len(together) > 1:
            lows, highs = ([f(point) if point else math.nan for point in points] for f in (min, max))
            axes.fill_between(common, lows, highs, color=color, alpha=0.13, linewidth=0)


def _tenth(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}"


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _cell(result: Results, arm: str, best: str | None) -> tuple[str, str]:
    """Text and colour of a setting's arm."""
    own = result.mean(arm, score("served_greedy"))
    if own is None or best is None:
        return ("not run" if own is None else f"{own.mean:.1f}"), "#ffffff"
    if arm == best:
        return f"{own.mean:.1f} %", "#cccccc"
    difference = result.difference(arm, best, score("served_greedy"))
    if difference is None:
        return "no common seed", "#ffffff"
    width = "" if difference.half_width is None else f" ± {difference.half_width:.1f}"
    face = (SKY if difference.mean > 0 else ORANGE) if difference.excludes_zero else "#f2f2f2"
    return f"{difference.mean:+.1f}{width}", face
