"""A diagnosis as words and tables: the same sections on the console and in Markdown. Reads the record alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.attribution import STANDS_OUT

MOST_BLOCKS = 12  # on the console; Markdown has all
SHOWN = 32  # characters of text before a token


@dataclass(frozen=True)
class Section:
    """A table with a title and the sentences under it; the first column is text, `header` names all."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def sections(record: Mapping[str, Any], *, most_blocks: int = MOST_BLOCKS) -> list[Section]:
    """Parts, blocks, worst tokens, suggestion."""
    return [_parts(record), _blocks(record, most_blocks), _worst(record), _suggestion(record)]


def markdown(record: Mapping[str, Any], *, plot: str) -> str:
    """The whole diagnosis as a page.

    Args:
        record: diagnosis.json.
        plot: the figure's path, relative to the page.
    """
    lines = [
        f"# Diagnosis: {_cell(record['model'])} on {record['target']}",
        "",
        f"{record['description']}. {record['sequences']} completions ({record['tokens']} tokens) of "
        f"{record['prompts']} {record['problems']}, sampled by the deployed engine at temperature "
        f"{record['temperature']['sampled']:g}; the same tokens scored by everyone at temperature "
        f"{record['temperature']['scored']:g}.",
        "",
        f"![where the gap comes from]({plot})",
    ]
    for section in sections(record, most_blocks=len(record["blocks"])):
        lines += ["", f"## {section.title}", ""]
        if section.rows:
            lines += [_row([_cell(name) for name in section.header]), _row(["---"] * len(section.header))]
            lines += [_row([_cell(cell) for cell in row]) for row in section.rows]
            lines.append("")
        lines += [part for note in section.notes for part in (_fenced(note), "")][:-1]
    return "\n".join(lines) + "\n"


def toml(record: Mapping[str, Any]) -> str:
    """What to put into the config."""
    lines = ["[train.constraint]", f"tolerance = {record['tolerance']['suggested']:.3g}"]
    if record["keep"]["ignore"]:
        lines = ["[quant]", f"ignore = {json.dumps(record['keep']['ignore'])}", "", *lines]
    return "\n".join(lines)


def _parts(record: Mapping[str, Any]) -> Section:
    rows = [
        (
            part["name"],
            f"{part['start']} → {part['end']}",
            _number(part["gap"]["prob_diff_mean"]),
            _number(part["gap"]["k3"]),
            _percent(part["share_of_total"]),
        )
        for part in record["parts"]
    ]
    notes = [
        "weights, then activations with KV cache and kernels, lead from the trainer to the deployed engine; total goes "
        "from end to end. share is mean |Δp| over the total's. The rows are distances, not terms of a sum: errors "
        "cancel or add up. numerics and engine lie beside that path: they are the floor, what is left when nothing is "
        "quantized. k3 estimates a KL divergence in the rows that end at the target, whose samples these tokens are; "
        "elsewhere it is one more distance.",
    ]
    return Section("Where the gap comes from", ("part", "between", "mean |Δp|", "k3", "share"), rows, notes)


def _blocks(record: Mapping[str, Any], most: int) -> Section:
    blocks = record["blocks"]
    shown = sorted(blocks, key=lambda block: -block["gap"]["prob_diff_mean"])[:most]
    rows = [
        (
            block["name"] + (" *" if block["name"] in record["keep"]["blocks"] else ""),
            _number(block["gap"]["prob_diff_mean"]),
            _number(block["gap"]["logp_abs_diff"]),
            _number(block["gap"]["k3"]),
            _percent(block["share_of_weights"]),
            f"{block['times_even']:.2f}",
        )
        for block in blocks
        if block in shown
    ]
    hidden = f"The {len(shown)} largest of {len(blocks)} blocks; the Markdown has all. " if most < len(blocks) else ""
    notes = [
        f"{hidden}One block's weights at Q(W), all others at W, in the trainer, against the trainer at W. This covers "
        f"weights; what the target does to activations and the KV cache is in the table above. Blocks are not additive "
        f"either, and no model here sampled these tokens, so k3 can be huge for a few of them. 1.00 × even is the mean "
        f"of all blocks; * stands out (at least {STANDS_OUT:.2f}).",
    ]
    header = ("block alone", "mean |Δp|", "mean |Δlog p|", "k3", "of weights", "× even")
    return Section("Which blocks are sensitive", header, rows, notes)


def _worst(record: Mapping[str, Any]) -> Section:
    rows = [
        (
            "…" + _visible(f"{token['prompt_tail']}▸{token['before']}")[-SHOWN:],
            _visible(token["token"]),
            str(token["position"]),
            f"{token['trainer']:.4f}",
            f"{token['deployed']:.4f}",
            f"{token['difference']:+.4f}",
        )
        for token in record["worst_tokens"]
    ]
    notes = [
        "p: the trainer's probability of the sampled token, q: the deployed engine's. ▸ is where the response begins; "
        "the position counts from there. A token after the same text is listed once."
    ]
    return Section(
        "Where the deployed gap is worst", ("text before", "token", "position", "p", "q", "q − p"), rows, notes
    )


def _suggestion(record: Mapping[str, Any]) -> Section:
    tolerance, keep, first = record["tolerance"], record["keep"], record["first_step"]["prob_diff_mean"]
    weights = next(part["gap"]["prob_diff_mean"] for part in record["parts"] if part["name"] == "weights")
    total = next(part["gap"]["prob_diff_mean"] for part in record["parts"] if part["name"] == "total")
    if total <= record["floor"]:
        why = (
            f"the whole gap ({_number(total)}) is within the floor ({_number(record['floor'])}): on these tokens "
            f"the target costs nothing that training could win back"
        )
    elif tolerance["held_by_floor"]:
        why = (
            f"tolerance_ratio {tolerance['ratio']:g} of the gap would be under the floor of numerics + engine "
            f"({_number(record['floor'])}), which no training can close"
        )
    else:
        why = (
            f"constraint.tolerance_ratio {tolerance['ratio']:g} of the gap {_number(first)} that a first training step "
            f"measures at W on these prompts; the floor of numerics + engine is {_number(record['floor'])}"
        )
    notes = [f"Tolerance {_number(tolerance['suggested'])}: {why}."]
    if keep["blocks"]:
        rest, control = (keep[f"weights_gap_with{who}"]["prob_diff_mean"] for who in ("", "_others"))
        notes.append(
            f"Keep {', '.join(keep['blocks'])} in BF16 ({_percent(keep['share_of_elements'])} of the quantized "
            f"weights): measured in the trainer, the weights' gap is then {_number(rest)} instead of "
            f"{_number(weights)}; with the least sensitive instead ({', '.join(keep['others'])}) it is "
            f"{_number(control)}. Diagnose again with that line in the config, under another name: the tolerance here "
            f"is that of the target as it is."
        )
    elif len(record["blocks"]) > 1:
        notes.append(
            f"No block stands out (at least {STANDS_OUT:g} times the even share, and above the floor), so none is "
            f"suggested to be kept in BF16."
        )
    notes.append(toml(record))
    return Section("What to do", (), (), notes)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.4f}" if value < 10 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def _visible(text: str) -> str:
    """Text with its line ends shown, so that it stays in a table's row."""
    return text.replace("\n", "⏎").replace("\r", "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text as it is, in a Markdown table."""
    for character in "\\|*_<>`[]":
        text = text.replace(character, f"\\{character}")
    return text


def _fenced(note: str) -> str:
    return f"```toml\n{note}\n```" if note.startswith("[") else note
