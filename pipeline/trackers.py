"""`train.trackers`: the rows of metrics.jsonl, shown live by TensorBoard or Weights & Biases, through accelerate.

What counts is metrics.jsonl; a tracker gets each row's numbers when it is written, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pipeline.config import RunConfig
from pipeline.run_dir import RunDir


class Tracker(Protocol):
    """What accelerate's trackers have in common, of what is used here."""

    def start(self) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


class LiveCurves:
    """The trackers of one run."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Send a step's numbers, those that it has."""
        step = metrics["step"]
        assert step is not None, "every row has its step"
        values = {name: value for name, value in metrics.items() if value is not None and name != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=int(step))


@contextmanager
def live_curves(
    run: RunDir,
    config: RunConfig,
    names: Sequence[str],
    make: Callable[[str, RunDir, RunConfig], Tracker] | None = None,
) -> Iterator[LiveCurves]:
    """Trackers, started, and closed at the end.

    Args:
        run: TensorBoard's files and wandb's go into its `train/tensorboard` and `train/wandb`.
        config: of the run.
        names: `train.trackers`; none for a rank that is not the first.
        make: makes a tracker by its name; None is accelerate's own.
    """
    trackers = [(make or _tracker)(name, run, config) for name in names]
    for tracker in trackers:
        tracker.start()
    try:
        yield LiveCurves(trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def _tracker(name: str, run: RunDir, config: RunConfig) -> Tracker:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # accelerate's trackers log through it, and raise where there is none
    folder: Any = run.train / name
    if name == "tensorboard":
        return TensorBoardTracker(run_name=".", logging_dir=folder)
    folder.mkdir(parents=True, exist_ok=True)
    return WandBTracker("boresight", name=config.name, dir=str(folder))
