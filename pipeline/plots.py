"""The report's figures as SVG text; the only file that imports matplotlib.

Text stays text and takes the page's font; colours are CSS variables, so that one figure serves the light page, the dark
page and the printer. Lines are labelled where they end, not in a legend. Left out: interaction, which needs JavaScript.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Role = Literal["run", "other", "limit"]

# Stand-ins that matplotlib can parse; the page's CSS decides what they look like.
INK, RULE = "#010101", "#020202"
ROLES: dict[Role, str] = {"run": "#030303", "other": "#040404", "limit": "#050505"}
CSS = {
    INK: "currentColor",
    RULE: "var(--rule)",
    ROLES["run"]: "var(--run)",
    ROLES["other"]: "var(--other)",
    ROLES["limit"]: "var(--limit)",
}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
}
SIZE = (5.0, 2.7)  # inches: small, so that 10 point text is still readable on a phone
GAP = 0.11  # least distance between two line labels, as a share of the axis
FEW = 20  # points; a shorter line gets a dot on each, so that a single step is visible

# What the report's page gives its figures, for a figure that is a file of its own.
STANDALONE = """<style>
svg { font-family: system-ui, sans-serif; background: #ffffff; color: #1c2430;
  --rule: #d5dbe3; --run: #1667bd; --other: #a8501a; --limit: #7a4fb5; }
@media (prefers-color-scheme: dark) { svg { background: #12161c; color: #e5e9ef;
  --rule: #333c48; --run: #6cb2ff; --other: #ffa45c; --limit: #c4a1ff; } }
</style>"""


@dataclass(frozen=True)
class Line:
    """One curve: a value per step (NaN where there is none), named at its right end."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    role: Role = "run"
    dashed: bool = False


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, drawn as a dot with a bar."""

    label: str
    value: float
    low: float
    high: float
    role: Role


def curves(
    name: str,
    lines: Sequence[Line],
    *,
    unit: str,
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> str:
    """Values against the training step, with an optional horizontal level such as a tolerance.

    A linear axis includes 0, so that heights can be compared. `log` is for a value that falls by factors; it is taken
    only where every value is positive.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((0.13, 0.18, 0.63, 0.68))
        finite = [value for line in lines for value in line.values if math.isfinite(value)]
        finite += [] if level is None else [level[1]]
        ends = []
        for line in lines:
            style = "--" if line.dashed else "-"
            marker = "o" if len(line.steps) < FEW else ""
            axes.plot(line.steps, line.values, style, marker=marker, markersize=3, color=ROLES[line.role])
            last = next((value for value in reversed(line.values) if math.isfinite(value)), None)
            ends += [] if last is None else [(last, line.label, line.role)]
        if level is not None:
            axes.axhline(level[1], linestyle=":", color=ROLES["limit"])
            ends.append((level[1], level[0], "limit"))
        if log and min(finite) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        elif min(finite) >= 0:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        axes.set_title(unit, loc="left", fontsize=10, pad=8)
        _label(axes, ends)
        return _svg(figure, f"{unit}, by training step")


def estimates(name: str, models: Sequence[Estimate], difference: Estimate | None, limit: float | None) -> str:
    """Accuracies above; below, on its own axis, their paired difference against the non-inferiority limit."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE)
        top = figure.add_axes((0.26, 0.62, 0.70, 0.28))
        _bars(top, models)
        top.set_xlabel("accuracy", labelpad=1)
        bottom = figure.add_axes((0.26, 0.20, 0.70, 0.14))
        _bars(bottom, [] if difference is None else [difference])
        bottom.axvline(0, color=RULE)
        bottom.margins(x=0.15)
        if limit is not None:
            bottom.axvline(limit, linestyle=":", color=ROLES["limit"])
            bottom.annotate(
                "limit",
                (limit, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                color=ROLES["limit"],
            )
        bottom.set_xlabel("target − BF16", labelpad=1)
        return _svg(figure, "accuracy of both served models, and their paired difference")


def diagnosis(
    parts: Mapping[str, float], floor: Collection[str], blocks: Mapping[str, float], keep: Collection[str], limit: float
) -> str:
    """Where a gap comes from: its parts above, on a log axis; below, each block's own gap. A file of its own.

    Args:
        parts: name to mean |probability difference|, top to bottom.
        floor: the parts that are there without quantization.
        blocks: name to the same, with that block alone quantized, in the model's order.
        keep: blocks that stand out.
        limit: the suggested tolerance.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": "diagnosis"}):
        figure = Figure(figsize=(6.4, 4.8))
        figure.text(0.02, 0.95, "Parts of the gap: mean |Δp| of the sampled tokens, log scale")
        _parts(figure.add_axes((0.27, 0.57, 0.64, 0.30)), parts, floor, limit)
        figure.text(0.02, 0.45, "Blocks: mean |Δp| with one transformer block quantized, linear scale")
        _blocks(figure.add_axes((0.10, 0.12, 0.79, 0.27)), blocks, keep)
        text = _svg(figure, "the gap's parts, and the gap of each block alone")
    return _standalone(text)


def tolerance_region(
    tolerances: Sequence[float],
    rewards: Sequence[float],
    gaps: Sequence[float],
    unconstrained: tuple[float, float],
) -> str:
    """Final reward above, final discrepancy below, against the tolerance on a log axis. A file of its own.

    Args:
        tolerances: c of each arm, rising, > 0.
        rewards: mean reward of its last steps.
        gaps: mean |probability difference| of its last steps; held where it is not above the dotted line y = c.
        unconstrained: reward and gap of the arm without a constraint.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": "sweep"}):
        figure = Figure(figsize=(6.4, 4.8))
        panels = (
            ("Reward, mean of the last steps", 0.58, rewards, unconstrained[0]),
            ("Discrepancy, mean |Δp| of the last steps", 0.12, gaps, unconstrained[1]),
        )
        for title, bottom, values, level in panels:
            axes = figure.add_axes((0.10, bottom, 0.66, 0.33))
            axes.set_xscale("log")
            axes.plot(tolerances, values, "-o", markersize=5, color=ROLES["run"])
            axes.axhline(level, linestyle="--", color=ROLES["other"])
            axes.set_title(title, loc="left", fontsize=10, pad=8)
            ends: list[tuple[float, str, Role]] = [
                (values[-1], "constrained", "run"),
                (level, "unconstrained", "other"),
            ]
            if values is gaps:
                axes.plot(tolerances, tolerances, ":", color=ROLES["limit"])
                ends.append((tolerances[-1], "tolerance", "limit"))
                axes.set_xlabel("tolerance c")
            if all(value >= 0 for value in (*values, level) if math.isfinite(value)):
                axes.set_ylim(bottom=0)
            axes.set_xticks(tolerances, [f"{value:.3g}" for value in tolerances])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
            _label(axes, [end for end in ends if math.isfinite(end[0])])
        text = _svg(figure, "final reward and discrepancy against the tolerance")
    return _standalone(text)


def _standalone(text: str) -> str:
    """An inline figure as a file: with its width and its own colours."""
    text = text.replace("<svg ", '<svg width="720" ', 1)
    return text.replace(">", f">{STANDALONE}", 1) + "\n"


def _parts(axes: Axes, parts: Mapping[str, float], floor: Collection[str], limit: float) -> None:
    """A dot per part on a log axis; a part that is exactly 0 has its number alone."""
    positive = [value for value in (*parts.values(), limit) if value > 0]
    low, high = (min(positive) / 2, max(positive) * 2) if positive else (0.1, 1.0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    for row, (name, value) in enumerate(parts.items()):
        colour = ROLES["other" if name in floor else "run"]
        if value > 0:
            axes.plot([low, value], [row, row], "-", color=colour, linewidth=1)
            axes.plot([value], [row], "o", color=colour, markersize=5)
        axes.annotate(
            f"{value:.3g}", (max(value, low), row), xytext=(7, 0), textcoords="offset points", va="center", color=colour
        )
    axes.axvline(limit, linestyle=":", color=ROLES["limit"])
    axes.annotate(
        "suggested tolerance", (limit, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", color=ROLES["limit"],
    )  # fmt: skip
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _blocks(axes: Axes, blocks: Mapping[str, float], keep: Collection[str]) -> None:
    """A bar per block, those that stand out named in colour, and the even share as a level."""
    width = 0.75 * min(1.0, len(blocks) / 8)
    colours = [ROLES["limit" if name in keep else "run"] for name in blocks]
    axes.bar(range(len(blocks)), list(blocks.values()), width=width, color=colours)
    even = sum(blocks.values()) / len(blocks)
    axes.axhline(even, linestyle=":", color=INK, linewidth=1)
    axes.annotate(
        "even\nshare", (1, even), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        va="center",
    )  # fmt: skip
    if keep:
        axes.annotate(
            "worth keeping in BF16", (1, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
            ha="right", color=ROLES["limit"],
        )  # fmt: skip
    names = [name.rpartition(".")[2] for name in blocks]
    every = -(-len(names) // 24)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.set_xlabel("block")


def _bars(axes: Axes, items: Sequence[Estimate]) -> None:
    for row, item in enumerate(items):
        spread = ([item.value - item.low], [item.high - item.value])
        axes.errorbar([item.value], [row], xerr=spread, fmt="o", markersize=5, capsize=3, color=ROLES[item.role])
    axes.set_yticks(range(len(items)), [item.label for item in items])
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=5)


def _label(axes: Axes, ends: Sequence[tuple[float, str, Role]]) -> None:
    """Name each line at the height where it ends, pushed apart where two would overlap, kept beside the axes."""
    axes.get_ylim()  # settles the limits, which matplotlib computes late; before that transData maps to nowhere
    to_axes = axes.transData + axes.transAxes.inverted()
    ranked = sorted((float(to_axes.transform((0, y))[1]), text, role) for y, text, role in ends)
    heights: list[float] = []
    for height, _text, _role in ranked:
        heights.append(max(height, heights[-1] + GAP) if heights else height)
    overflow = max(heights[-1] - 1, 0)
    for height, (_height, text, role) in zip(heights, ranked, strict=True):
        axes.annotate(text, (1.02, height - overflow), xycoords="axes fraction", va="center", color=ROLES[role])


def _svg(figure: Figure, description: str) -> str:
    """The figure as an inline `<svg>`: no prolog, no metadata, colours and font left to the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, css in CSS.items():
        text = text.replace(stand_in, css)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # several figures share a page, and ids must not repeat
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
