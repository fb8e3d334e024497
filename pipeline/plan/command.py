"""`boresight plan`: read the config and the shapes, plan, look for what would make it fit, print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline import console
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.models import quiet_libraries
from pipeline.plan.advice import MOST_RANKS, Overrides, Planner, advise, layout
from pipeline.plan.cost import Assumptions
from pipeline.plan.plan import Model, Plan, make_plan, model_of
from pipeline.plan.shape import config_table, meta_model, shape_of
from pipeline.plan.text import Report, as_json, powers, show
from pipeline.preflight import check_target
from quant.gpus import Gpu


def plan(
    path: Path,
    overrides: Overrides,
    *,
    gpu: Gpu,
    gpus: int | None = None,
    model_config: Path | None = None,
    assumed: Assumptions,
    json_out: bool = False,
) -> int:
    """Plan a config and print it.

    Args:
        path: the config.
        overrides: of its fields.
        gpu: the card.
        gpus: how many there are; None takes the config's own layout.
        model_config: a config.json in place of the model's own.
        assumed: rates and lengths.
        json_out: JSON instead of tables.

    Returns:
        The exit code: 0 fits, 1 does not.

    Raises:
        ConfigError: the config cannot be used, or the GPU cannot run its target.
    """
    quiet_libraries()
    config = load_config(path, overrides)
    if gpus is not None:
        overrides = (*overrides, *layout(_trainer_ranks(config, gpus)))
        config = load_config(path, overrides)
    source, module = meta_model(config, model_config)
    check_target(config, gpu.device, source, config_table(module))
    model = model_of(config, shape_of(source, module), module)
    report = _report(path, overrides, config, model, gpu, assumed, gpus)
    if json_out:
        console.verbatim(json.dumps(as_json(report), indent=2))
    else:
        show(report)
    return 0 if report.plan.fits else 1


def _report(
    path: Path, overrides: Overrides, config: RunConfig, model: Model, gpu: Gpu, assumed: Assumptions, gpus: int | None
) -> Report:
    def planned(more: Overrides) -> Plan:
        return make_plan(load_config(path, (*overrides, *more)), model, gpu, assumed)

    made = make_plan(config, model, gpu, assumed)
    most = MOST_RANKS if gpus is None else config.train.distributed.ranks
    advice = None if made.fits else advise(config, planned, most) or advise(config, planned)
    return Report(path, config, overrides, model, gpu, assumed, made, tuple(_scaled(planned)), advice)


def _scaled(planned: Planner) -> Iterator[Plan]:
    """The plan for more and more trainer ranks, as far as the config allows them: some methods are one process's."""
    for ranks in powers(MOST_RANKS):
        try:
            yield planned(layout(ranks))
        except ConfigError:
            return


def _trainer_ranks(config: RunConfig, gpus: int) -> int:
    """What is left of the GPUs when the servers have theirs.

    Raises:
        ConfigError: nothing is.
    """
    servers = config.train.rollout.servers
    taken = 0
    if servers is not None:
        taken = (len(servers.urls) or servers.count) * servers.gpus
    if gpus <= taken:
        raise ConfigError(f"--gpus: {gpus} leaves none for the trainer: train.rollout.servers takes {taken}")
    return gpus - taken
