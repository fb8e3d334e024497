"""What to change where a plan does not fit: the first change that helps, found by computing it, as `--set` lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.config import ConfigError, RunConfig
from pipeline.plan.plan import NODE, Plan

MOST_RANKS = 64
Overrides = tuple[str, ...]
Planner = Callable[[Overrides], Plan]


def layout(ranks: int) -> Overrides:
    """The overrides that give so many trainer ranks, in machines of eight; one alone has nothing to offload with."""
    nodes = -(-ranks // NODE)
    alone = ("train.distributed.cpu_offload=false",) if ranks == 1 else ()
    return (f"train.distributed.processes={ranks // nodes}", f"train.distributed.nodes={nodes}", *alone)


def rungs(config: RunConfig, most_ranks: int) -> Iterator[Overrides]:
    """The ladder of changes, gentlest first; each rung is a choice that later ones add to, or replace if they set the
    same field: checkpointing, smaller micro-batches, more ranks, offload, engine's share, context."""
    train = config.train
    rollout = train.rollout
    if not train.gradient_checkpointing:
        yield ("train.gradient_checkpointing=true",)
    size = train.microbatch_tokens // 2
    while size >= rollout.max_model_len:  # a smaller budget changes nothing: a row is not split
        yield (f"train.microbatch_tokens={size}",)
        size //= 2
    ranks = train.distributed.ranks * 2
    while ranks <= most_ranks:
        yield layout(ranks)
        ranks *= 2
    if not train.distributed.cpu_offload:
        yield ("train.distributed.cpu_offload=true",)
    if rollout.engine == "vllm":
        share = rollout.gpu_memory_utilization - 0.05
        while share >= 0.1:
            yield (f"train.rollout.gpu_memory_utilization={share:.2f}",)
            share -= 0.05
    else:
        for share in (0.6, 0.75, 0.9):
            if rollout.gpu_memory_utilization < share:
                yield (f"train.rollout.gpu_memory_utilization={share:.2f}",)
    tokens, room = rollout.max_tokens // 2, rollout.max_model_len - rollout.max_tokens
    while tokens >= 1024:
        length = tokens + room
        yield (
            f"train.rollout.max_tokens={tokens}",
            f"train.rollout.max_model_len={length}",
            f"train.microbatch_tokens={min(train.microbatch_tokens, length)}",
        )
        tokens //= 2


def advise(config: RunConfig, planned: Planner, most_ranks: int = MOST_RANKS) -> tuple[Overrides, Plan] | None:
    """Climb the ladder until a plan fits, then drop every change that it does not need.

    Args:
        config: one that does not fit.
        planned: the plan with some overrides added to the config's.
        most_ranks: how many GPUs the trainer may get.

    Returns:
        The overrides and their plan; None where no rung fits.
    """
    chosen: dict[str, str] = {}
    engine_fitted = False
    for rung in rungs(config, most_ranks):
        tried = chosen | _fields(rung)
        try:
            plan = planned(_lines(tried))
        except ConfigError:  # choices that cannot work together
            continue
        if engine_fitted and not plan.engine_fits:  # the trainer's gain would be the engine's loss
            continue
        chosen, engine_fitted = tried, plan.engine_fits
        if plan.fits:
            return _pruned(chosen, planned, plan)
    return None


def _pruned(chosen: dict[str, str], planned: Planner, plan: Plan) -> tuple[Overrides, Plan]:
    for field in list(chosen):
        fewer = {name: value for name, value in chosen.items() if name != field}
        try:
            without = planned(_lines(fewer))
        except ConfigError:
            continue
        if without.fits:
            chosen, plan = fewer, without
    return _lines(chosen), plan


def _fields(rung: Overrides) -> dict[str, str]:
    return dict(line.split("=", 1) for line in rung)


def _lines(fields: dict[str, str]) -> Overrides:
    return tuple(f"{name}={value}" for name, value in fields.items())
