"""A setting's records as the page and its figures ask for them: by arm and seed, of the present configuration only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.evidence.records import Record, read_records
from benchmarks.evidence.settings import ARMS, Job
from benchmarks.evidence.statistics import Estimate, mean_of_seeds, paired_difference

SCORES = ("served_greedy", "served_sampled", "bf16_greedy", "bf16_sampled")
CPU = "cpu"  # seconds of one core, whatever else the machine did
REFERENCE = "uncorrected"  # what a step's cost is compared with


@dataclass(frozen=True)
class Results:
    """What was measured in one setting.

    Attributes:
        setting: its name.
        runs: arm to seed to record, for the arms asked for and, where it has any, the cost's reference.
        stale: arm to seeds whose record is of another configuration than the arm has now; they are in no number.
    """

    setting: str
    runs: Mapping[str, Mapping[int, Record]]
    stale: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(
        cls, records: Path, setting: str, arms: tuple[str, ...], seeds: range, extra: tuple[str, ...] = ()
    ) -> Results:
        """The records of these arms and seeds, the same ones for every arm.

        Args:
            records: folder of SETTING.jsonl files.
            setting: name in SETTINGS.
            arms: names in ARMS.
            seeds: which.
            extra: the `--set` lines of a quick run.
        """
        runs: dict[str, dict[int, Record]] = {}
        stale: dict[str, tuple[int, ...]] = {}
        for row in read_records(records, setting):
            arm, seed = row["arm"], row["seed"]
            if seed not in seeds or (arm not in arms and arm != REFERENCE):
                continue
            if row["config"] == Job(setting, arm, seed, extra).digest():
                runs.setdefault(arm, {})[seed] = row
            else:
                stale[arm] = (*stale.get(arm, ()), seed)
        return cls(setting, runs, stale)

    def values(self, arm: str, of: Callable[[Record], float | None]) -> dict[int, float]:
        """Seed to number, of the runs that have it."""
        found = {seed: of(record) for seed, record in sorted(self.runs.get(arm, {}).items())}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, arm: str, of: Callable[[Record], float | None]) -> Estimate | None:
        """Over the arm's seeds; None where no run has the number."""
        values = self.values(arm, of)
        return mean_of_seeds(list(values.values())) if values else None

    def difference(self, one: str, other: str, of: Callable[[Record], float | None]) -> Estimate | None:
        """one - other, paired by seed."""
        pairs = self.pairs(one, other)
        ours, theirs = (
            {seed: value for seed, value in self.values(arm, of).items() if seed in pairs} for arm in (one, other)
        )
        return paired_difference(ours, theirs)

    def pairs(self, one: str, other: str) -> tuple[int, ...]:
        """The seeds of which both arms were run on the same machine: another processor's start model is another one,
        since its sums have another order."""
        ours, theirs = self.runs.get(one, {}), self.runs.get(other, {})
        return tuple(
            seed for seed in sorted(ours.keys() & theirs.keys()) if ours[seed]["machine"] == theirs[seed]["machine"]
        )

    def cost(self, arm: str) -> dict[int, float]:
        """Seed to the processor time of this arm's training over that of the reference, same seed, machine, steps and
        tokens; runs of fewer steps are left out."""
        costs = {}
        for seed in self.pairs(arm, REFERENCE):
            record, reference = self.runs[arm][seed], self.runs[REFERENCE][seed]
            if record["curves"]["step"] != reference["curves"]["step"]:
                continue
            if CPU in record["seconds"] and CPU in reference["seconds"]:
                costs[seed] = record["seconds"][CPU] / reference["seconds"][CPU]
        return costs

    def best_unconstrained(self, arms: Sequence[str], of: Callable[[Record], float | None]) -> str | None:
        """The arm without a multiplier with the highest mean; None where no such arm has a run."""
        means = {arm: self.mean(arm, of) for arm in arms if not ARMS[arm].constrained}
        known = {arm: estimate.mean for arm, estimate in means.items() if estimate is not None}
        return max(known, key=lambda arm: known[arm]) if known else None


def pooled_difference(
    results: Sequence[Results], one: str, other: str, of: Callable[[Record], float | None]
) -> Estimate | None:
    """one - other over several settings. A seed's unit is its mean difference over the settings that have it, because
    settings of one target start from the same model; a seed on another machine is another unit.

    Returns:
        None where no setting has a pair.
    """
    units: dict[tuple[str, int], list[float]] = {}
    for result in results:
        ours, theirs = result.values(one, of), result.values(other, of)
        for seed in result.pairs(one, other):
            if seed in ours and seed in theirs:
                units.setdefault((result.runs[one][seed]["machine"], seed), []).append(ours[seed] - theirs[seed])
    return paired_difference(dict(enumerate(map(fmean, units.values()))), dict.fromkeys(range(len(units)), 0.0))


def score(name: str) -> Callable[[Record], float | None]:
    """A share of right answers, in percent."""
    return lambda record: 100 * record["scores"][name]


def summary(name: str) -> Callable[[Record], float | None]:
    """A number of the run's end."""
    return lambda record: record["summary"][name]
