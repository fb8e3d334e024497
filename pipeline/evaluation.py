"""What a run is evaluated on: its held-out problems, and the tasks of the suite that its config adds; torch-free.

It is made twice: before anything runs, so that a suite that does not fit the run is refused there and not after the
training, and when the evaluation begins.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from eval.suite import Generation, Suite, SuiteError, SuiteTask, load_suite
from pipeline.config import RunConfig
from quant.tables import describe

HELDOUT = "heldout"  # the task that every run is evaluated on


def evaluation_suite(config: RunConfig, heldout_task: Path) -> Suite:
    """The held-out problems, and the tasks of the suite that the config adds.

    Args:
        config: of the run.
        heldout_task: folder with the lm-eval task of the held-out problems.

    Raises:
        SuiteError: the suite cannot be used, or not by this run: a task of its has the held-out problems' name, or
            asks for longer answers than the servers of this run take.
    """
    settings, rollout = config.eval, config.train.rollout
    heldout = SuiteTask(
        name=HELDOUT, lm_eval=HELDOUT, include=str(heldout_task.resolve()), chat=False, limit=settings.limit,
        generation=Generation(temperature=settings.temperature, max_tokens=settings.max_tokens or rollout.max_tokens),
    )  # fmt: skip
    added = None if settings.suite is None else load_suite(settings.suite)
    tasks = [] if added is None else [
        task.model_copy(update={"generation": added.sampled(task), "margin": added.margin(task)}) for task in added.task
    ]  # fmt: skip
    length = settings.max_model_len or (None if added is None else added.max_model_len) or rollout.max_model_len
    try:
        return Suite(
            name=HELDOUT if added is None else added.name,
            task=(heldout, *tasks),
            max_model_len=length,
            repeat_baseline=settings.repeat_baseline,
        )
    except ValidationError as error:
        raise SuiteError(
            f"{settings.suite}, in a run with eval.max_model_len {length}: {describe(error, Suite)}"
        ) from error
