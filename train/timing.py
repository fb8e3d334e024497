"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall seconds under phase names: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`seconds/<phase>` for every phase, and `seconds/total` since the watch was made."""
        phases = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        return phases | {"seconds/total": time.perf_counter() - self.started}
