"""The only place that prints: stages, a line per training step, checks and verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

HEADER = (
    f"{'step':>5} {'reward':>7} {'discrepancy':>12} {'tolerance':>10} {'lambda':>7} {'codes':>7} "
    f"{'tokens':>8} {'sync':>6} {'rollout':>8} {'train':>6} {'step s':>7} {'ETA':>7}"
)


@contextmanager
def stage(name: str, detail: str = "") -> Iterator[None]:
    """Announce a stage and its seconds."""
    _out.print(f"[bold cyan]{name}[/] {escape(detail)}")
    start = time.perf_counter()
    yield
    _out.print(f"[dim]{name} took {time.perf_counter() - start:.1f} s[/]")


def skipped(name: str, artifact: Path) -> None:
    _out.print(f"[dim]{name}: complete ({escape(str(artifact))})[/]")


def say(text: str) -> None:
    _out.print(escape(text))


def verbatim(text: str) -> None:
    """For another program, or to be copied: nothing is wrapped."""
    _out.print(escape(text), soft_wrap=True)


def warn(text: str) -> None:
    _out.print(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    _err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def step_header() -> None:
    _out.print(f"[bold]{HEADER}[/]", soft_wrap=True)


def step_line(metrics: Mapping[str, Any], steps: int, eta_seconds: float) -> None:
    """One training step; the discrepancy is red above the tolerance, green inside."""
    tolerance = metrics["tolerance"]
    over = tolerance is None or not metrics["discrepancy"] <= tolerance
    changed = metrics["codes_changed"]
    seconds = {phase: metrics.get(f"seconds/{phase}", 0.0) for phase in ("quantize", "sync", "verify")}
    minutes, rest = divmod(round(eta_seconds), 60)
    _out.print(
        f"{metrics['step'] + 1:>3}/{steps} {metrics['reward']:>6.3f} "
        f"[{'red' if over else 'green'}]{metrics['discrepancy']:>12.4f}[/] "
        f"{'-' if tolerance is None else f'{tolerance:.4f}':>10} {metrics['multiplier']:>7.3f} "
        f"{'-' if changed is None else f'{changed:.2%}':>7} {metrics['tokens']:>8} {sum(seconds.values()):>6.3f} "
        f"{metrics['seconds/rollout']:>8.2f} {metrics['seconds/train']:>6.2f} {metrics['seconds/total']:>7.2f} "
        f"{minutes:>4}:{rest:02d}",
        soft_wrap=True,
    )


def table(rows: Mapping[str, object]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        _out.print(f"  {escape(name):<{width}}  {escape(str(value))}", soft_wrap=True)


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """A titled table with sentences under it; columns that hold only numbers are aligned at their right."""
    _out.print(f"\n[bold]{escape(title)}[/]")
    if rows:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
        for column, name in enumerate(header):
            numeric = all(row[column].strip("+−-%").replace(".", "").replace("e-", "").isdigit() for row in rows)
            grid.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            grid.add_row(*map(escape, row))
        _out.print(grid)
    for i, note in enumerate(notes):
        _out.print("\n" * (i > 0) + escape(note), style="bold" if note.startswith("[") else "dim")


_COLOURS = {"pass": "green", "fail": "red", "approved": "bold green", "refused": "bold red"}


def verdict(name: str, checks: Mapping[str, tuple[str, str]], report: Path) -> None:
    """The checks, the verdict and where the report is.

    Args:
        checks: name to (state, sentence).
    """
    for check, (state, why) in checks.items():
        _out.print(f"  [{_COLOURS.get(state, 'yellow')}]{state:<12}[/] {escape(check)}: {escape(why)}", soft_wrap=True)
    _out.print(f"verdict: [{_COLOURS.get(name, 'bold yellow')}]{escape(name)}[/]")
    _out.print(f"report:  {escape(str(report))}", soft_wrap=True)
