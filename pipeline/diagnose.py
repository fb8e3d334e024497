"""`boresight diagnose`: where a model's gap to its deployment target comes from, before anything is trained.

The deployed engine samples completions for the first training problems, with the first step's seeds; then everyone
scores the same tokens: the trainer at W, at Q(W), and with one transformer block quantized at a time; vLLM on the BF16
model; vLLM on the target. `train.attribution` turns that into parts, `pipeline.diagnosis_text` and `pipeline.plots`
into something to read. Training problems, because a tolerance chosen on held-out ones would leak into the sign-off.

Everyone scores at temperature 1, whatever the run samples at: vLLM gives log-probs of given tokens without
temperature, and a comparison of models needs one temperature, not a certain one. Only the gap that the tolerance is a
share of is measured at the run's own temperature, on the sampled log-probs, exactly as the first training step does.

The two engines live at once. On a GPU each gets half of `gpu_memory_utilization`, so that they and the trainer share
the card as in training; on a CPU each has its own `kv_cache_gib`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import console
from pipeline.config import RunConfig
from pipeline.diagnosis_text import markdown, sections
from pipeline.models import load_module, load_tokenizer, quiet_libraries, target_for
from pipeline.plots import diagnosis as draw
from pipeline.run import prepare
from pipeline.run_dir import RunDir, model_dir_of, read_json, write_json, write_text
from pipeline.training import calibration_prompts
from quant.errors import BoresightError
from quant.export import export
from quant.target import Target
from train.attribution import (
    FLOOR,
    Scores,
    attribute,
    blocks,
    even_shares,
    gap,
    ignore_entry,
    standing_out,
    suggested_tolerance,
    with_quantized,
    worst_tokens,
)
from train.config import RolloutConfig
from train.policy import Policy
from train.records import TokenBatch
from train.sync import sync
from train.tasks import load_task, render
from train.timing import Stopwatch
from train.vllm_engine import VllmEngine

WORST = 10  # tokens listed
TAIL = 32  # characters of text shown before a token


class DiagnosisError(BoresightError):
    """A model gave log-probs that are not finite: there is nothing to compare."""


def diagnose(run: RunDir, config: RunConfig, *, prompts: int) -> dict[str, Any]:
    """Measure, write `diagnose/{diagnosis.json, diagnosis.svg, diagnosis.md}`, print.

    Prepares the model first where the run directory has none.

    Args:
        run: an opened run directory.
        config: its configuration.
        prompts: how many training problems, each with `group_size` completions.

    Returns:
        The record, as in diagnosis.json.

    Raises:
        DiagnosisError: a model gave log-probs that are not finite.
        VerificationError: an engine does not compute with the weights it was given.
    """
    quiet_libraries()
    if run.prepared.is_file():
        console.skipped("prepare", run.prepared)
    else:
        prepare(run, config)
    folder = run.diagnose
    size = config.train.rollout.group_size
    with console.stage("diagnose", f"{prompts} prompts x {size} completions from {config.quant.target}"):
        start = time.perf_counter()
        record = _measure(config, model_dir_of(run, read_json(run.prepared)), folder / "engine", prompts)
        record["seconds"] = time.perf_counter() - start
        write_text(folder / "diagnosis.svg", _plot(record))
        write_text(folder / "diagnosis.md", markdown(record, plot="diagnosis.svg"))
        write_json(folder / "diagnosis.json", record)
    for section in sections(record):
        console.section(section.title, section.header, section.rows, section.notes)
    console.say("")
    console.table({"diagnosis": folder / "diagnosis.md", "plot": folder / "diagnosis.svg"})
    return record


def _measure(config: RunConfig, model_dir: Path, scratch: Path, count: int) -> dict[str, Any]:
    """Everything that is in the record but its seconds.

    Args:
        config: the run's configuration.
        model_dir: the BF16 model.
        scratch: folder for the export that the engine starts from; removed again.
        count: prompts.
    """
    task = load_task(config.train.task, config.seed)
    tokenizer = load_tokenizer(model_dir, config)
    problems = task.step_problems(0, count, config.seed)
    prompts = tokenizer(render(problems, tokenizer, chat=config.train.task.chat), add_special_tokens=False).input_ids
    rollout = _engine_config(config.train.rollout, longest=max(map(len, prompts)))
    policy = Policy(load_module(model_dir, config), config.train)
    weights = policy.weights()
    target = target_for(model_dir, config)
    scales = policy.static_scales(target, calibration_prompts(task, tokenizer, config)) if target.static_scales else {}

    engine = _deployed_engine(weights, target, scales, rollout, model_dir=model_dir, scratch=scratch, seed=config.seed)
    seeds = [(config.seed << 40) + i for i in range(count)]  # the trainer's seeds of its first step
    completions = [completion for group in engine.generate(prompts, seeds) for completion in group]
    sampled = TokenBatch.collate([prompt for prompt in prompts for _ in range(rollout.group_size)], completions)
    console.say(f"  {sampled.response_tokens} tokens sampled from {target.spec.name}, scoring them")

    batch = replace(sampled, experts=None)  # every model routes for itself, where there are experts
    by_target = _scored(engine, batch, "vLLM on the target")
    plain = VllmEngine(model_dir, rollout.model_copy(update={"routing_replay": False}), seed=config.seed)
    by_bf16 = _scored(plain, batch, "vLLM on the BF16 model")

    policy.config = config.train.model_copy(update={"rollout": rollout.model_copy(update={"temperature": 1.0})})
    deployed = target.deployed(weights)

    def quantized(names: Iterable[str]) -> Tensor:
        """The trainer's log-probs with these weights at Q(W)."""
        policy.run_at(with_quantized(weights, deployed, names))
        return _finite(policy.all_logprobs(batch), "the trainer")

    trainer = quantized([])
    with torch.no_grad():
        one_by_one = torch.cat([policy.logprobs(batch, [row]).cpu() for row in range(len(batch.prompts))])
    parts = attribute(Scores(trainer, one_by_one, quantized(deployed), by_bf16, by_target), batch.mask)
    gaps = {part.name: part.gap["prob_diff_mean"] for part in parts}
    floor = sum(gaps[name] for name in FLOOR)
    sensitivity = _sensitivity(
        {block: {name: deployed[name].numel() for name in names} for block, names in blocks(deployed).items()},
        lambda names: gap(trainer, quantized(names), batch.mask),
        whole=gaps["weights"],
        floor=floor,
    )

    policy.run_at(weights)
    policy.config = config.train
    as_scored = sampled.experts is None and config.train.rollout.temperature == 1.0
    first = gap(trainer if as_scored else policy.all_logprobs(sampled), sampled.rollout_logprobs, sampled.mask)
    ratio = config.train.constraint.tolerance_ratio
    return {
        "model": config.model.path or "made here (model.make)",
        "target": target.spec.name,
        "description": target.spec.description,
        "problems": f"training problems of step 0, seed {config.seed}",
        "prompts": count,
        "sequences": len(batch.prompts),
        "tokens": batch.response_tokens,
        "temperature": {"sampled": config.train.rollout.temperature, "scored": 1.0},
        "parts": [asdict(part) | {"share_of_total": _ratio(gaps[part.name], gaps["total"])} for part in parts],
        "floor": floor,
        "first_step": first,
        **sensitivity,
        "tolerance": {
            "suggested": suggested_tolerance(first["prob_diff_mean"], total=gaps["total"], floor=floor, ratio=ratio),
            "ratio": ratio,
            "held_by_floor": floor >= ratio * gaps["total"],
        },
        "worst_tokens": _worst(trainer, by_target, batch, tokenizer),
    }


def _deployed_engine(
    weights: Mapping[str, Tensor],
    target: Target,
    scales: Mapping[str, Tensor],
    rollout: RolloutConfig,
    *,
    model_dir: Path,
    scratch: Path,
    seed: int,
) -> VllmEngine:
    """vLLM on the target of these weights, started and synced as training does, for the sync's proof of what it holds.

    Raises:
        VerificationError: it holds something else.
    """
    try:
        export(weights.items(), target, model_dir=model_dir, out=scratch, source_step=0, scales=scales)
        engine = VllmEngine(scratch, rollout, seed=seed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(weights, target, engine, step=0, previous=None, clock=Stopwatch(), scales=scales)
    return engine


def _sensitivity(
    sizes: Mapping[str, Mapping[str, int]],
    measure: Callable[[Iterable[str]], dict[str, float]],
    *,
    whole: float,
    floor: float,
) -> dict[str, Any]:
    """The record's `blocks`, each quantized alone, and `keep`: those that stand out, and the evidence.

    Args:
        sizes: block to its quantized weights' names and numbers of elements.
        measure: the gap to the trainer at W with these weights at Q(W) and all others at W.
        whole: mean |probability difference| with all of them at Q(W).
        floor: what is there without quantization, in the same unit.
    """
    alone = {block: measure(names) for block, names in sizes.items()}
    gaps = {block: metrics["prob_diff_mean"] for block, metrics in alone.items()}
    shares = even_shares(gaps)
    keep = standing_out(gaps, floor=floor) if len(sizes) > 1 else []
    others = [block for block in sorted(gaps, key=lambda block: gaps[block]) if block not in keep][: len(keep)]

    def keeping(kept: Sequence[str]) -> dict[str, float] | None:
        """The weights' gap with these blocks in BF16."""
        return (
            measure([name for block, names in sizes.items() if block not in kept for name in names]) if kept else None
        )

    elements = {block: sum(names.values()) for block, names in sizes.items()}
    return {
        "blocks": [
            {
                "name": block,
                "elements": elements[block],
                "gap": alone[block],
                "share_of_weights": _ratio(gaps[block], whole),
                "times_even": shares[block],
            }
            for block in sizes
        ],
        "keep": {
            "blocks": keep,
            "ignore": [ignore_entry(block) for block in keep],
            "share_of_elements": sum(elements[block] for block in keep) / sum(elements.values()),
            "weights_gap_with": keeping(keep),
            "others": others,
            "weights_gap_with_others": keeping(others),
        },
    }


def _plot(record: Mapping[str, Any]) -> str:
    return draw(
        {part["name"]: part["gap"]["prob_diff_mean"] for part in record["parts"]},
        FLOOR,
        {block["name"]: block["gap"]["prob_diff_mean"] for block in record["blocks"]},
        record["keep"]["blocks"],
        record["tolerance"]["suggested"],
    )


def _engine_config(rollout: RolloutConfig, *, longest: int) -> RolloutConfig:
    """The run's rollouts, but two engines on one card, and a position of room.

    Scoring generates a token that is thrown away, so where the longest prompt and its response could fill
    `max_model_len` to the last position, responses are cut one token earlier than in training.
    """
    return rollout.model_copy(
        update={
            "max_tokens": min(rollout.max_tokens, rollout.max_model_len - 1 - longest),
            "gpu_memory_utilization": rollout.gpu_memory_utilization / 2,
        }
    )


def _scored(engine: VllmEngine, batch: TokenBatch, what: str) -> Tensor:
    """An engine's log-probs [N, T] of the batch's responses."""
    scores = torch.zeros_like(batch.mask)
    for row, values in enumerate(engine.score(batch.prompts, batch.responses)):
        scores[row, : len(values)] = torch.tensor(values)
    return _finite(scores, what)


def _finite(scores: Tensor, what: str) -> Tensor:
    broken = int((~scores.isfinite()).sum())
    if broken:
        raise DiagnosisError(f"{what} gave {broken} log-probs that are not finite; its weights or kernels are broken")
    return scores


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _worst(trainer: Tensor, deployed: Tensor, batch: TokenBatch, tokenizer: Any) -> list[Mapping[str, Any]]:
    """The worst tokens as a reader sees them."""
    rows: list[Mapping[str, Any]] = []
    for token in worst_tokens(trainer, deployed, batch, WORST):
        prompt, response = batch.prompts[token.sequence], batch.responses[token.sequence]
        token_id = response[token.position]
        before = tokenizer.decode(list(response[: token.position]))
        rows.append(
            asdict(token)
            | {
                "prompt_tail": tokenizer.decode(list(prompt))[-TAIL:],
                "before": before[-TAIL:],
                "token": tokenizer.decode([token_id]),
                "token_id": token_id,
                "difference": token.deployed - token.trainer,
            }
        )
    return rows
