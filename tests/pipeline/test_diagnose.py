"""What a diagnosis says and draws, from a record; no engine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from pipeline import console
from pipeline.config import load_config
from pipeline.diagnose import DiagnosisError, _engine_config, _finite, _plot
from pipeline.diagnosis_text import markdown, sections, toml

ROOT = Path(__file__).parent.parent.parent


def gap(value: float) -> dict[str, float]:
    return {
        "prob_diff_mean": value, "k3": value**2, "k3_reverse": value**2, "logp_abs_diff": 2 * value,
        "logp_abs_diff_max": 9 * value,
    }  # fmt: skip


def record(
    *, layers: int = 4, keep: list[int] | None = None, floor: float = 0.001, total: float = 0.2, tolerance: float = 0.02
) -> dict[str, Any]:
    """A diagnosis whose chosen blocks have a gap of 0.1 alone, all others 0.01."""
    chosen = [2] if keep is None else keep
    names = [f"model.layers.{i}" for i in range(layers)]
    parts = {"numerics": 0.0, "engine": floor, "weights": 0.19, "activations, KV, kernels": 0.02, "total": total}
    return {
        "model": "tiny|model", "target": "int4-g128", "description": "W4A16", "problems": "training problems",
        "prompts": 4, "sequences": 8, "tokens": 100, "temperature": {"sampled": 1.0, "scored": 1.0},
        "parts": [
            {"name": name, "start": "trainer", "end": "other", "gap": gap(v), "share_of_total": v / total}
            for name, v in parts.items()
        ],
        "floor": floor,
        "first_step": gap(total),
        "blocks": [
            {
                "name": name, "elements": 10, "gap": gap(0.1 if i in chosen else 0.01), "share_of_weights": 0.5,
                "times_even": 3.0 if i in chosen else 0.3,
            }
            for i, name in enumerate(names)
        ],
        "keep": {
            "blocks": [names[i] for i in chosen], "ignore": [rf"re:.*layers\.{i}\..*" for i in chosen],
            "share_of_elements": len(chosen) / layers, "weights_gap_with": gap(0.03) if chosen else None,
            "others": names[:1], "weights_gap_with_others": gap(0.18) if chosen else None,
        },
        "tolerance": {"suggested": tolerance, "ratio": 0.1, "held_by_floor": floor >= 0.1 * total},
        "worst_tokens": [
            {
                "sequence": 0, "position": 3, "trainer": 0.1, "deployed": 0.9, "difference": 0.8,
                "prompt_tail": "2 | 3\n=", "before": "[b]", "token": "\n", "token_id": 7,
            }
        ],
    }  # fmt: skip


def test_the_suggestion_is_toml_that_a_config_takes() -> None:
    """Parsed, it is the tolerance and the ignore patterns, and the pattern matches layer 2 but not layer 12."""
    table = tomllib.loads(toml(record()))
    assert table["train"]["constraint"]["tolerance"] == 0.02
    (entry,) = table["quant"]["ignore"]
    pattern = re.compile(entry.removeprefix("re:"))
    assert pattern.match("model.layers.2.mlp.up_proj")
    assert not pattern.match("model.layers.12.mlp.up_proj")
    assert "quant" not in tomllib.loads(toml(record(keep=[])))


def test_markdown_holds_every_number_and_its_tables_survive_any_text() -> None:
    """Each table has as many cells in each row as in its header, with pipes and line ends in the model's own text."""
    page = markdown(record(layers=20), plot="diagnosis.svg")
    assert "0.1900" in page
    assert "is then 0.0300 instead of 0.1900; with the least sensitive instead (model.layers.0) it is 0.1800" in page
    assert page.count("model.layers.") >= 20
    assert "⏎" in page
    assert "```toml\n[quant]" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_console_shows_a_long_models_largest_blocks() -> None:
    """Of 40 blocks 12 are listed, in the model's order, the one that stands out among them, and the note says so."""
    parts, found, _worst, _suggestion = sections(record(layers=40, keep=[33]))
    assert len(parts.rows) == 5
    assert len(found.rows) == 12
    assert found.rows[-1][0] == "model.layers.33 *"
    assert found.notes[0].startswith("The 12 largest of 40 blocks")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (record(), "tolerance_ratio 0.1 of the gap 0.2000"),
        (record(floor=0.05, tolerance=0.05), "would be under the floor of numerics + engine (0.0500)"),
        (record(floor=0.3, tolerance=0.3), "the whole gap (0.2000) is within the floor (0.3000)"),
        (record(keep=[]), "No block stands out"),
    ],
)
def test_the_suggestion_says_how_it_was_found(given, words) -> None:
    assert words in " ".join(sections(given)[-1].notes)


def test_text_of_a_model_is_printed_as_text(capsys) -> None:
    """`[b]` in a completion is no markup."""
    section = sections(record())[2]
    console.section(section.title, section.header, section.rows, section.notes)
    assert "[b]" in capsys.readouterr().out


def test_the_plot_is_one_well_formed_file() -> None:
    """It parses, holds each part's name and value, and needs no page around it; also with a gap of 0 and one block."""
    for given in (record(layers=32), record(layers=1, keep=[]), record(tolerance=0.0)):
        svg = _plot(given)
        ElementTree.fromstring(svg)
        assert "--run: #1667bd" in svg
        for words in ("numerics", "activations, KV, kernels", "0.19", "suggested tolerance"):
            assert words in svg


def test_scoring_has_room_for_its_thrown_away_token() -> None:
    """64 positions and a longest prompt of 40: 24 response tokens would fill them, so 23 are sampled; 20 stay 20. Each
    of the two engines gets half of the card's share."""
    rollout = load_config(ROOT / "configs" / "demo-int4.toml").train.rollout
    assert _engine_config(rollout.model_copy(update={"max_tokens": 24}), longest=40).max_tokens == 23
    assert _engine_config(rollout, longest=40).max_tokens == 20
    assert _engine_config(rollout, longest=40).gpu_memory_utilization == rollout.gpu_memory_utilization / 2


def test_a_broken_engine_is_no_measurement() -> None:
    """One NaN among the log-probs stops the diagnosis and says whose it is."""
    with pytest.raises(DiagnosisError, match="vLLM on the target gave 1 log-probs that are not finite"):
        _finite(torch.tensor([[0.0, float("nan")]]), "vLLM on the target")
