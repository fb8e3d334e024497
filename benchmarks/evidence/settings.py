"""What the study compares: settings (model, task, target, budget), arms (how the gap is dealt with), tables of both.

An arm changes nothing but the method, a setting nothing but the problem: within a setting every arm has the same start
models, problems, seeds, steps and tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pipeline.config import RunConfig, load_config

BASE = Path(__file__).with_name("base.toml")
ENOUGH_SEEDS = 5
FEW_SEEDS = 2


@dataclass(frozen=True)
class Arm:
    """One way to deal with the gap.

    Attributes:
        title: as tables name it.
        overrides: `--set` lines over `base.toml` and the setting.
        constrained: whether a multiplier acts in it.
    """

    title: str
    overrides: tuple[str, ...] = ()
    constrained: bool = False


@dataclass(frozen=True)
class Setting:
    """One problem to compare arms on.

    Attributes:
        title: as tables name it.
        overrides: `--set` lines over `base.toml`.
    """

    title: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Which runs answer one question.

    Attributes:
        question: what is asked.
        settings: names in SETTINGS, rows' blocks.
        arms: names in ARMS, all of them run in every setting.
        also: more arms, for which FEW_SEEDS must do.
        against: the arms that `best` is compared with, pair by pair; all must be in `arms`.
        best: the arm that is claimed to be better.
        seeds: runs of each.
    """

    question: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    against: tuple[str, ...]
    best: str = "blend"
    also: tuple[str, ...] = ()
    seeds: int = ENOUGH_SEEDS


@dataclass(frozen=True)
class Job:
    """One training run."""

    setting: str
    arm: str
    seed: int
    extra: tuple[str, ...] = field(default=(), compare=False)

    def config(self) -> RunConfig:
        """The run's whole configuration."""
        setting, arm = SETTINGS[self.setting], ARMS[self.arm]
        return load_config(BASE, (*setting.overrides, *arm.overrides, *self.extra, f"seed={self.seed}"))

    def digest(self) -> str:
        """Changes with whatever the result depends on, but the code."""
        return sha256(self.config().to_json().encode()).hexdigest()[:16]


def form(name: str, **options: object) -> tuple[str, ...]:
    """The `--set` lines of a constraint."""
    return (f'train.constraint.form="{name}"', *(f"train.constraint.{key}={value}" for key, value in options.items()))


def corrected(weight: str) -> tuple[str, ...]:
    """The `--set` lines of an importance weight."""
    return (f'train.correction.weight="{weight}"',)


BLEND = form("blend", tolerance_ratio=0.1, multiplier_rate=5.0)
PAPER = {"tolerance_ratio": 0.5, "multiplier_init": 0.1, "multiplier_rate": 1.0}  # arXiv 2606.08779, 8B dense

ARMS: Mapping[str, Arm] = {
    "bf16-then-quantize": Arm("BF16 rollouts, quantized at the end", ("train.rollout.target=false",)),
    "uncorrected": Arm("quantized rollouts, nothing else"),
    "token-tis": Arm("+ token TIS, cap 2", corrected("token-tis")),
    "icepop": Arm("+ IcePop", corrected("icepop")),
    "sequence-tis": Arm("+ sequence TIS, cap 2", corrected("sequence-tis")),
    "sequence-masked": Arm("+ sequence mask", corrected("sequence-masked")),
    "straight-through": Arm("straight-through trainer", form("straight-through", tolerance='"auto"')),
    "advantage": Arm("DCMDP, advantage stage", form("advantage", penalty='"full"', **PAPER), constrained=True),
    "advantage-excess": Arm(
        "DCMDP, excess over c", form("advantage", penalty='"excess"', **PAPER | {"multiplier_init": 0.0}),
        constrained=True,
    ),
    "advantage-hinge": Arm(
        "DCMDP, hinge", form("advantage", penalty='"hinge"', **PAPER | {"multiplier_init": 0.0}), constrained=True
    ),
    "reward-stage": Arm(
        "DCMDP, reward stage",
        ("train.normalize_std=false", *form("advantage", stage='"reward"', penalty='"full"', **PAPER)),
        constrained=True,
    ),
    "distill": Arm(
        "DCMDP through the quantizer (distill)",
        form("distill", tolerance_ratio=0.3, multiplier_rate=1.0, multiplier_max=0.1), constrained=True,
    ),
    "blend": Arm("blend", BLEND, constrained=True),
    "blend-distill": Arm("blend + distill", form("blend+distill", tolerance_ratio=0.1, multiplier_rate=5.0), True),
    "blend-blocks": Arm("blend, a multiplier per block", (*BLEND, 'train.constraint.groups="block"'), True),
    "blend-tis": Arm("blend + token TIS", (*BLEND, *corrected("token-tis")), True),
    "straight-through-tis": Arm(
        "straight-through + token TIS", (*form("straight-through", tolerance='"auto"'), *corrected("token-tis"))
    ),
}  # fmt: skip

STALE = ("train.minibatches=4", "train.epochs=2", "train.lr=2e-4")
SETTINGS: Mapping[str, Setting] = {
    "severe": Setting("W4A8, outliers x16", ("model.make.outlier_scale=16",)),
    "stale": Setting("W4A8, outliers x16, stale (2 epochs x 4, lr x2)", ("model.make.outlier_scale=16", *STALE)),
    "mild": Setting("W4A8, outliers x4", ("model.make.outlier_scale=4",)),
}

CONTENDERS = ("bf16-then-quantize", "uncorrected", "token-tis", "straight-through", "advantage", "distill", "blend")

TABLES: Mapping[str, Table] = {
    "quick": Table(
        "Does it run here?", ("severe",), ("bf16-then-quantize", "uncorrected", "blend"), against=("uncorrected",)
    ),
    "matrix": Table(
        "Which way to deal with the gap serves the best model?", ("severe",), CONTENDERS,
        against=("bf16-then-quantize", "uncorrected", "token-tis", "straight-through"),
        also=tuple(name for name in ARMS if name not in CONTENDERS),
    ),
    "regimes": Table(
        "Where does the constraint earn its place?", ("severe", "stale", "mild"),
        ("uncorrected", "token-tis", "straight-through", "blend"),
        against=("uncorrected", "token-tis", "straight-through"),
    ),
}  # fmt: skip


def jobs(tables: Sequence[str], seeds: int | None = None, extra: tuple[str, ...] = ()) -> Iterator[Job]:
    """The runs of the tables, each once: seed by seed, so that a stopped study has whole seeds; `also` comes last."""
    done: set[Job] = set()
    for name in tables:
        table = TABLES[name]
        for arms, most in ((table.arms, table.seeds), (table.also, FEW_SEEDS)):
            for seed in range(most if seeds is None else min(seeds, most)):
                for job in (Job(setting, arm, seed, extra) for setting in table.settings for arm in arms):
                    if job not in done:
                        done.add(job)
                        yield job
