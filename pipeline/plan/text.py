"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.config import RunConfig
from pipeline.launch import torchrun
from pipeline.plan.advice import Overrides
from pipeline.plan.cost import Assumptions
from pipeline.plan.memory import PHASES
from pipeline.plan.plan import GIB, Model, Plan
from quant.gpus import Gpu

WORDS = {"sync": "sync", "train": "train", "requantize": "re-quantize"}


@dataclass(frozen=True)
class Report:
    """Everything that is said about one plan.

    Attributes:
        path: the config's file.
        config: it, with its overrides.
        overrides: as they were given.
        model: what is trained and deployed.
        gpu: the card.
        assumed: rates and lengths.
        plan: of this config.
        scaling: the same config's plans on more or fewer trainer ranks; servers stay as they are.
        advice: what to change and the plan that gives; None where it fits, or where nothing helps.
    """

    path: Path
    config: RunConfig
    overrides: Overrides
    model: Model
    gpu: Gpu
    assumed: Assumptions
    plan: Plan
    scaling: tuple[Plan, ...]
    advice: tuple[Overrides, Plan] | None


def show(report: Report) -> None:
    """Print it, readable at 100 columns."""
    _model(report)
    _trainer(report)
    _engine(report)
    _step(report)
    _scaling(report)
    _verdict(report)


def as_json(report: Report) -> dict[str, Any]:
    """Bytes, seconds and counts, for other programs."""
    shape, advice = report.model.shape, report.advice
    return {
        "fits": report.plan.fits,
        "model": {"source": shape.source, "type": shape.kind, "parameters": shape.total, "active": shape.active},
        "gpu": asdict(report.gpu),
        "packed": asdict(report.model.packed) | {"total": report.model.packed.total},
        "assumed": asdict(report.assumed),
        "plan": asdict(report.plan),
        "scaling": [
            {"ranks": p.ranks, "fits": p.fits, "trainer_bytes": p.trainer_peak, "traffic_bytes": p.traffic.total,
             "step_seconds": p.times.total, "traffic_seconds": p.times.traffic}
            for p in report.scaling
        ],
        "change": None if advice is None else [f"--set {line}" for line in advice[0]],
        "launch": launch(report),
    }  # fmt: skip


def launch(report: Report) -> list[str]:
    """The commands that start such a run."""
    distributed, rollout = report.config.train.distributed, report.config.train.rollout
    lines = []
    if rollout.servers is not None and not rollout.servers.urls:
        started = _many(rollout.servers.count, "server")
        lines.append(f"# the run starts {started} on its own machine; train.rollout.servers.urls names others")
    settings = _settings(report.overrides)
    if distributed.nodes == 1:
        return [*lines, f"boresight run {shlex.quote(str(report.path))}{settings}"]
    _, *ranks = torchrun(report.config, Path("runs") / report.config.name)
    command = f"boresight run {shlex.quote(str(report.path))}{settings}"
    return [
        *lines,
        f"{command}    # prepares; give it again after the training",
        "# on every node, with a run directory that all of them can read:",
        shlex.join(["python", *ranks]),
    ]


def _model(report: Report) -> None:
    shape, packed, target = report.model.shape, report.model.packed, report.model.target
    rollout = report.config.train.rollout
    plan, where = report.plan, "on the first rank's GPU" if report.plan.colocated else "on GPUs of their own"
    engines = f"{_many(plan.engines, 'rollout engine')} {where}" if plan.engines else "the trainer samples itself"
    parts = {"codes": packed.codes, "scales": packed.scales + packed.static, "BF16": packed.kept}
    deployed = f"{_gib(packed.total)} GiB: {', '.join(f'{name} {_gib(size)}' for name, size in parts.items())}"
    console.table(
        {
            "model": f"{shape.source}: {shape.kind}, {_count(shape.total)} parameters, {_count(shape.active)} active",
            "target": f"{target.spec.name}, {deployed}" if rollout.target else "none: rollouts from BF16",
            "GPU": f"{report.gpu.title}, {report.gpu.memory_gib:g} GiB",
            "layout": f"{_many(plan.gpus, 'GPU')}: {_many(plan.ranks, 'trainer rank')}, {engines}",
        }
    )


def _trainer(report: Report) -> None:
    plan = report.plan
    rows = [
        [part.name, *(_gib(getattr(part, phase)) if getattr(part, phase) else "-" for phase in PHASES), part.how]
        for part in plan.trainer
    ]
    totals = [sum(getattr(part, phase) for part in plan.trainer) for phase in PHASES]
    shown = [0, 1] if totals[2] == 0 or report.config.train.updates == 1 else [0, 1, 2]
    rows.append(["in all", *map(_gib, totals), f"room for {_gib(plan.trainer_room)}"])
    rows = [[row[0], *(row[1 + i] for i in shown), row[-1]] for row in rows]
    header = ["the first trainer rank's GPU", *(WORDS[PHASES[i]] for i in shown), "formula"]
    console.section("Trainer memory, GiB", header, rows, [])
    console.say(
        f"  {_gib(plan.work.logits)} of the activations are logits, of a micro-batch of {_tokens(report)} tokens"
    )
    console.say("  in the first node's host memory:")
    for name, size in plan.host.items():
        console.say(f"    {name}: {_gib(size)}")
    kept = report.config.train.keep_checkpoints
    console.say(f"  on disk: {_gib(plan.disk)}, with {_many(kept, 'checkpoint')} kept and one being written")


def _engine(report: Report) -> None:
    plan, engine, rollout = report.plan, report.plan.engine, report.config.train.rollout
    if not plan.engines:
        return
    rows = [
        ["granted", _gib(engine.granted), f"gpu_memory_utilization {rollout.gpu_memory_utilization:g}"],
        ["weights", _gib(engine.weights), "of the deployed checkpoint, one GPU's share"],
        ["CUDA, profiling, activations", _gib(engine.overhead), "assumed"],
        ["KV cache, what is left", _gib(engine.kv_cache), f"{engine.kv_per_token / 1024:.4g} KiB a token"],
    ]
    console.section("Rollout engine", ["on one of its GPUs", "GiB", "from"], rows, [])
    console.say(
        f"  {engine.at_once} sequences of {rollout.max_model_len} tokens at once, of {engine.wanted} in a step; vLLM "
        f"fits more while they are shorter"
    )


def _step(report: Report) -> None:
    plan, assumed, times = report.plan, report.assumed, report.plan.times
    tokens = plan.tokens
    rows = [
        ["prefill", _seconds(times.prefill), "2 N FLOPs a token"],
        ["decode", _seconds(times.decode), "weights and KV cache read once a step"],
        ["scoring without gradient", _seconds(times.scoring), "2 N FLOPs a token"],
        ["forward and backward", _seconds(times.training), "6 N FLOPs a token, 8 N with checkpointing"],
        ["collectives", _seconds(times.traffic), f"{_gib(plan.traffic.total)} GiB per rank, not overlapped"],
        ["weights to the servers", _seconds(times.sync), "the deployed checkpoint"],
        ["in all", _seconds(times.total), f"{times.total * report.config.train.steps / 3600:.3g} h for all steps"],
    ]
    console.section("Time of a step, expected", ["phase", "s", "from"], rows, [])
    console.say(
        f"  {tokens.sequences} sequences of {tokens.prompt} + {tokens.response} tokens, {tokens.tokens:,} in all\n"
        f"  assumed, not measured: {assumed.mfu:.0%} of {report.gpu.bf16_tflops:g} BF16 TFLOP/s, "
        f"{assumed.bandwidth_share:.0%} of {report.gpu.memory_gbs:g} GB/s memory,\n"
        f"  {assumed.link_share:.0%} of {report.gpu.link_gbs:g} GB/s inside a machine and of {assumed.network_gbs:g} "
        f"GB/s between machines"
    )


def _scaling(report: Report) -> None:
    rows = [
        [
            str(plan.ranks), f"{plan.trainer_peak / GIB:.1f}", "yes" if plan.fits else "no", _gib(plan.traffic.total),
            _seconds(plan.times.total), f"{plan.times.traffic / plan.times.total:.0%}",
        ]
        for plan in report.scaling
    ]  # fmt: skip
    header = ["trainer ranks", "GiB per GPU", "fits", "GiB moved", "step s", "moving"]
    console.section("More trainer ranks", header, rows, [])


def _verdict(report: Report) -> None:
    plan = report.plan
    console.say("")
    for name, needed, room, fits in (
        ("trainer", plan.trainer_peak, plan.trainer_room, plan.trainer_fits),
        ("engine, with one sequence", _engine_floor(report), plan.engine.granted, plan.engine_fits),
    ):
        if name == "trainer" or plan.engines:
            console.say(f"{'fits' if fits else 'DOES NOT FIT'}: {name} {_gib(needed)} of {_gib(room)} GiB")
    if plan.fits:
        for line in launch(report):
            console.verbatim(line)
    elif report.advice is None:
        console.say(
            "nothing that was tried makes it fit: smaller micro-batches, more ranks, offload, a shorter context"
        )
    else:
        changes, then = report.advice
        console.say(
            f"it fits on {_many(then.gpus, 'GPU')} ({_gib(then.trainer_peak)} of {_gib(then.trainer_room)} GiB) with:"
        )
        console.verbatim(f" {_settings(changes)}")


def _settings(overrides: Overrides) -> str:
    return "".join(f" --set {shlex.quote(line)}" for line in overrides)


def _engine_floor(report: Report) -> float:
    engine = report.plan.engine
    return engine.weights + engine.overhead + engine.kv_per_token * report.config.train.rollout.max_model_len


def _tokens(report: Report) -> str:
    return f"{max(report.config.train.microbatch_tokens, report.config.train.rollout.max_model_len):,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def powers(most: int) -> Sequence[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << i for i in range(most.bit_length())]
