"""What the study compares: settings (model, task, target, budget), arms (how the gap is dealt with), tables of both.

An arm changes nothing but the method, a setting nothing but the problem: within a setting every arm has the same start
models, problems, seeds, steps and tokens.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pipeline.config import RunConfig, load_config
from quant.tables import apply_override

BASE = Path(__file__).with_name("base.toml")
TARGETS = "benchmarks/evidence/targets"  # seen from the repository's root, where the study runs
ENOUGH_SEEDS = 5
FEW_SEEDS = 2
COMPLETIONS = 128  # of a step, in every arm
RATIO_ALONE = "train.constraint.tolerance=null"  # unless an arm says otherwise; no TOML file can say null
FROM_W = "train.constraint.multiplier_init=0"  # likewise, as it was the default of all forms; it is in no digest


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
        quantized: whether what is served is the quantized model; else it is the BF16 one, in vLLM as always.
    """

    title: str
    overrides: tuple[str, ...] = ()
    quantized: bool = True


@dataclass(frozen=True)
class Table:
    """Which runs answer one question.

    Attributes:
        question: what is asked.
        settings: names in SETTINGS, rows' blocks.
        arms: names in ARMS, all of them run in every setting.
        also: more arms, for which FEW_SEEDS must do.
        tried: arms that were tried on the way: shown in the settings that have runs of them, owed in none.
        against: the arms that `best` is compared with, pair by pair; all must be in `arms`.
        best: the arm that is claimed to be better.
        seeds: runs of each, numbered from `first`.
        first: above 0 for seeds that nothing was chosen on.
        pooled: whether it says the differences over all its settings together, not one by one.
    """

    question: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    against: tuple[str, ...]
    best: str = "blend-start"
    also: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    seeds: int = ENOUGH_SEEDS
    first: int = 0
    pooled: bool = False

    def arm_seeds(self, most: int | None = None) -> dict[str, range]:
        """Its arms in order, with the seeds that each should have, none for those tried; no more than `most`."""
        wanted = (
            dict.fromkeys(self.arms, self.seeds) | dict.fromkeys(self.also, FEW_SEEDS) | dict.fromkeys(self.tried, 0)
        )
        return {
            arm: range(self.first, self.first + (count if most is None else min(most, count)))
            for arm, count in wanted.items()
        }


@dataclass(frozen=True)
class Job:
    """One training run."""

    setting: str
    arm: str
    seed: int
    extra: tuple[str, ...] = field(default=(), compare=False)

    def config(self) -> RunConfig:
        """The run's whole configuration."""
        return load_config(BASE, (FROM_W, *self.overrides()))

    @property
    def dense(self) -> bool:
        """Whether its model is no mixture of experts."""
        make = self.config().model.make
        return make is None or make.experts == 0

    def overrides(self) -> tuple[str, ...]:
        """What is set over `base.toml`."""
        given = (*SETTINGS[self.setting].overrides, *ARMS[self.arm].overrides, *self.extra)
        return (RATIO_ALONE, *given, f"seed={self.seed}")

    def digest(self) -> str:
        """Of everything that is set for the run; not of the code, nor of what is left at its default."""
        table = tomllib.loads(BASE.read_text())
        for override in self.overrides():
            apply_override(table, override)
        return sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def form(name: str, **options: object) -> tuple[str, ...]:
    """The `--set` lines of a constraint."""
    return (f'train.constraint.form="{name}"', *(f"train.constraint.{key}={value}" for key, value in options.items()))


def corrected(weight: str) -> tuple[str, ...]:
    """The `--set` lines of an importance weight."""
    return (f'train.correction.weight="{weight}"',)


def grouped(size: int) -> tuple[str, ...]:
    """The `--set` lines of another group size at the same number of completions."""
    return (f"train.rollout.group_size={size}", f"train.rollout.prompts={COMPLETIONS // size}")


BLEND = form("blend", tolerance_ratio=0.1, multiplier_rate=5.0)
TO_POLICY = ('train.constraint.distill_from="policy"', "train.constraint.distill_every=1")
BLEND_DISTILL = (*form("blend+distill", tolerance_ratio=0.1, multiplier_rate=5.0, distill_weight=0.1), *TO_POLICY)
EVERY_4TH = (*BLEND_DISTILL, "train.constraint.distill_every=4")
FROM_START = (*EVERY_4TH, 'train.constraint.distill_from="start"')
PULLED = (*FROM_START, "train.constraint.distill_weight=0.4")
TIGHT = (*PULLED, "train.constraint.tolerance_ratio=0.02", "train.constraint.multiplier_init=1")
REACHABLE = 'train.constraint.tolerance="auto"'
NO_MULTIPLIER = ("train.constraint.multiplier_init=1", "train.constraint.multiplier_min=1")
HALVED = (
    'train.schedule.kind="length-triggered"', "train.schedule.surge_baseline_steps=10",
    "train.schedule.surge_ratio=1.3",
)  # fmt: skip
PAPER = {"tolerance_ratio": 0.5, "multiplier_init": 0.1, "multiplier_rate": 1.0}  # arXiv 2606.08779, 8B dense

ARMS: Mapping[str, Arm] = {
    "before": Arm("before RL", ("train.steps=1", "train.lr=1e-12")),  # a step that moves no BF16 weight
    "bf16-then-quantize": Arm("BF16 rollouts, quantized at the end", ("train.rollout.target=false",)),
    "uncorrected": Arm("quantized rollouts, nothing else"),
    "token-tis": Arm("+ token TIS, cap 2", corrected("token-tis")),
    "icepop": Arm("+ IcePop", corrected("icepop")),
    "sequence-tis": Arm("+ sequence TIS, cap 2", corrected("sequence-tis")),
    "sequence-masked": Arm("+ sequence mask", corrected("sequence-masked")),
    "straight-through": Arm("straight-through trainer", form("straight-through", tolerance='"auto"')),
    "advantage": Arm("DCMDP, advantage stage", form("advantage", penalty='"full"', **PAPER), constrained=True),
    "advantage-hold": Arm(
        "DCMDP, advantage stage, c = the first gap",
        form("advantage", penalty='"full"', **PAPER | {"tolerance_ratio": 1.0, "multiplier_init": 0.0}),
        constrained=True,
    ),
    "advantage-small": Arm(
        "DCMDP, advantage stage, lambda at most 0.1",
        form("advantage", penalty='"full"', **PAPER, multiplier_max=0.1),
        constrained=True,
    ),
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
        (*form("distill", tolerance_ratio=0.3, multiplier_rate=1.0, multiplier_max=0.1), *TO_POLICY), constrained=True,
    ),
    "blend": Arm("blend", BLEND, constrained=True),
    "blend-distill": Arm("blend + distill", BLEND_DISTILL, True),
    "blend-distill-4": Arm("blend + distill in every 4th step", EVERY_4TH, True),
    "blend-distill-4-strong": Arm(
        "blend + distill in every 4th step, 4 times the KL", (*EVERY_4TH, "train.constraint.distill_weight=0.4"), True
    ),
    "straight-through-distill": Arm(
        "straight-through + distill in every 4th step, no multiplier", (*EVERY_4TH, *NO_MULTIPLIER)
    ),
    "blend-start-weak": Arm("blend + distill from the start model, a quarter of the KL", FROM_START, True),
    "blend-start": Arm("blend + distill from the start model", PULLED, True),
    "blend-start-fading": Arm(
        "blend + distill from the start, a KL that halves in 60 steps",
        (*PULLED, "train.constraint.distill_half_life=60"), True,
    ),
    "blend-start-tight-full": Arm("the default's form: c = 0.02 of the first gap, from lambda 1", TIGHT, True),
    "blend-start-tight-8": Arm(
        "the same, the pull in one step of eight at twice the weight",
        (*TIGHT, "train.constraint.distill_every=8", "train.constraint.distill_weight=0.8"), True,
    ),
    "blend-start-tight-fading": Arm(
        "blend + distill from the start, c = 0.02 of the first gap, a KL that halves in 60 steps",
        (*PULLED, "train.constraint.tolerance_ratio=0.02", "train.constraint.distill_half_life=60"), True,
    ),
    "straight-through-start-fading": Arm(
        "straight-through + distill from the start, a KL that halves in 60 steps, no multiplier",
        (*PULLED, *NO_MULTIPLIER, "train.constraint.distill_half_life=60"),
    ),
    "reachable": Arm("blend + distill from the start, a tolerance that can be reached", (*PULLED, REACHABLE), True),
    "default": Arm("the default", (*TIGHT, REACHABLE), True),
    "blend-start-strong": Arm(
        "blend + distill from the start, 2.5 times the KL", (*PULLED, "train.constraint.distill_weight=1.0"), True
    ),
    "straight-through-start": Arm(
        "straight-through + distill from the start model, no multiplier", (*PULLED, *NO_MULTIPLIER)
    ),
    "blend-blocks": Arm("blend, a multiplier per block", (*BLEND, 'train.constraint.groups="block"'), True),
    "blend-tis": Arm("blend + token TIS", (*BLEND, *corrected("token-tis")), True),
    "straight-through-tis": Arm(
        "straight-through + token TIS", (*form("straight-through", tolerance='"auto"'), *corrected("token-tis"))
    ),
    **{
        f"c@{c}": Arm(f"c = {c} of the first gap", (*PULLED, f"train.constraint.tolerance_ratio={c}"), True)
        for c in (0.02, 0.05, 0.2, 0.4, 0.8)
    },
    **{
        f"eta@{eta}": Arm(f"eta {eta}", (*PULLED, f"train.constraint.multiplier_rate={eta}"), True)
        for eta in (0.5, 1.0, 20.0)
    },
    **{
        f"init@{init}": Arm(f"lambda_0 {init}", (*PULLED, f"train.constraint.multiplier_init={init}"), True)
        for init in (0.1, 0.5, 1.0)
    },
    "grpo-32": Arm("GRPO, groups of 32", (*PULLED, *grouped(32)), True),
    "otb-4": Arm(
        "OTB, groups of 4", (*PULLED, *grouped(4), 'train.advantage="otb"', "train.normalize_std=false"), True
    ),
    "grpo-4": Arm("GRPO, groups of 4", (*PULLED, *grouped(4)), True),
    "length-triggered": Arm("halved after a surge of the length", HALVED),
    "straight-through-halved": Arm(
        "straight-through trainer, halved after a surge of the length",
        (*form("straight-through", tolerance='"auto"'), *HALVED),
    ),
    "replay": Arm("the trainer routes as the engine did", ("train.rollout.routing_replay=true",)),
    "exact": Arm(
        "the trainer's own engine: no mismatch", ("train.rollout.target=false", 'train.rollout.engine="exact"')
    ),
}  # fmt: skip

OUTLIERS = ("model.make.outlier_scale=16",)
STALE = ("train.minibatches=4", "train.epochs=2", "train.lr=2e-4")
LARGE = ("model.make.lr=1e-3", 'train.attention="eager"')  # a gentler warm start; attention: neither is faster
PRODUCTS = (
    'train.task.name="products"', "train.task.options={min_terms=2,max_terms=2,min_digits=2,max_digits=2,seed=0}",
    "train.task.size=12000", 'train.task.prompt="{expression}="', 'train.task.completion_split="="',
    'model.make.solution="train.warmstart:products_by_digit"', "train.rollout.max_tokens=20",
)  # fmt: skip
TOTALS = (
    'train.task.name="chain_sum"', "train.task.options={min_terms=6,max_terms=6,min_digits=1,max_digits=1,seed=0}",
    "train.task.size=40000", 'train.task.prompt="{expression}="', 'train.task.completion_split="="',
    'model.make.solution="benchmarks.evidence.tasks:running_totals"', "train.rollout.max_tokens=32",
)  # fmt: skip


def target(name: str) -> str:
    """The `--set` line of a deployment target."""
    return f'quant.target="{name}"'


def shape(hidden: int, layers: int) -> tuple[str, ...]:
    """The `--set` lines of a model's size, four heads and a feed-forward of twice the width."""
    return (
        f"model.make.hidden_size={hidden}", f"model.make.intermediate_size={2 * hidden}",
        f"model.make.head_dim={hidden // 4}", f"model.make.layers={layers}",
    )  # fmt: skip


SETTINGS: Mapping[str, Setting] = {
    "mild": Setting("W4A8, outliers x4", ("model.make.outlier_scale=4",)),
    "severe": Setting("W4A8, outliers x16", OUTLIERS),
    "stale": Setting("W4A8, outliers x16, 2 epochs x 4 mini-batches, lr x2", (*OUTLIERS, *STALE)),
    "room": Setting(
        "W4A8, outliers x16, 2 epochs x 4 mini-batches, lr x2, answers of up to 40 tokens",
        (*OUTLIERS, *STALE, "train.rollout.max_tokens=40"),
    ),
    "fast": Setting("W4A8, outliers x16, lr x5", (*OUTLIERS, "train.lr=5e-4")),
    "long": Setting("W4A8, outliers x16, 500 steps", (*OUTLIERS, "train.steps=500")),
    "int4-severe": Setting("INT4 g128, outliers x16", (target("int4-g128"), *OUTLIERS)),
    "int4-stale": Setting("INT4 g128, outliers x16, stale", (target("int4-g128"), *OUTLIERS, *STALE)),
    "int4-fast": Setting("INT4 g128, outliers x16, lr x5", (target("int4-g128"), *OUTLIERS, "train.lr=5e-4")),
    "int4-long": Setting("INT4 g128, outliers x16, 500 steps", (target("int4-g128"), *OUTLIERS, "train.steps=500")),
    "int4-g32": Setting("INT4 g32, outliers x16", (target("int4-g32"), *OUTLIERS)),
    "int4-channel": Setting(
        "INT4 per channel, outliers x16, 2M parameters", (target("int4-channel"), *OUTLIERS, *shape(256, 3))
    ),
    **{
        f"int4-channel-{size}m-x{scale}": Setting(
            f"INT4 per channel, outliers x{scale}, {size}M parameters",
            (target("int4-channel"), f"model.make.outlier_scale={scale}", *shape(*widths), *LARGE),
        )
        for scale in (8, 16)
        for size, widths in ((2, (256, 3)), (9, (512, 4)), (32, (768, 6)))
    },
    "int8": Setting("INT8, outliers x16", (target("int8"), *OUTLIERS)),
    "fp8": Setting("FP8, outliers x16", (target("fp8-dynamic"), *OUTLIERS)),
    "fp8-long": Setting(
        "FP8 with an FP8 KV cache, running totals, outliers x16",
        (target("fp8-dynamic"), 'quant.kv_cache="fp8"', *OUTLIERS, *TOTALS),
    ),
    "products": Setting("W4A8, products, outliers x8", ("model.make.outlier_scale=8", *PRODUCTS)),
    "totals": Setting("W4A8, running totals, outliers x8", ("model.make.outlier_scale=8", *TOTALS)),
    "int4-products": Setting("INT4 g128, products, outliers x16", (target("int4-g128"), *OUTLIERS, *PRODUCTS)),
    "int4-totals": Setting("INT4 g128, running totals, outliers x16", (target("int4-g128"), *OUTLIERS, *TOTALS)),
    "mixture": Setting(
        "BF16, 8 experts, 2 of them per token", ("model.make.experts=8", "train.rollout.target=false"), quantized=False
    ),
    "natural": Setting(
        "W4A8, outliers grown by a warm start at lr x3",
        ("model.make.outlier_scale=1", "model.make.lr=9e-3", "model.make.accuracy=0.6"),
    ),
    "severe-1m": Setting("W4A8, outliers x16, 1.2M parameters", (*OUTLIERS, *shape(256, 2))),
    "w4a8-g32": Setting("W4A8 g32, outliers x16", (target(f"{TARGETS}/w4a8-g32.toml"), *OUTLIERS)),
    "int4-4m": Setting("INT4 g128, outliers x16, 4M parameters", (target("int4-g128"), *OUTLIERS, *shape(384, 3))),
}

CONTENDERS = (
    "uncorrected", "straight-through", "straight-through-distill", "straight-through-start", "distill", "blend",
    "blend-distill", "blend-distill-4", "blend-start",
)  # fmt: skip
REGIME_ARMS = ("uncorrected", "straight-through", "straight-through-start", "blend", "blend-start")
FEW_ARMS = ("uncorrected", "straight-through", "blend-start")
BESIDE_TIGHT = ("uncorrected", "straight-through", "blend-start", "straight-through-start")
TIGHT_ARMS = (*BESIDE_TIGHT, "blend-start-tight-full")
FADING = ("blend-start-fading", "blend-start-tight-fading", "straight-through-start-fading")
SIZES = tuple(name for name in SETTINGS if name.startswith("int4-channel-"))
ETAS = tuple(name for name in ARMS if name.startswith("eta@"))
LAMBDAS = tuple(name for name in ARMS if name.startswith("init@"))

TABLES: Mapping[str, Table] = {
    "quick": Table(
        "Does it run here?", ("severe",), ("bf16-then-quantize", "uncorrected", "blend"), against=("uncorrected",),
        best="blend", seeds=FEW_SEEDS,
    ),
    "matrix": Table(
        "Which way to deal with the gap serves the best model?", ("severe",), ("before", *CONTENDERS),
        against=("uncorrected", "straight-through", "straight-through-start", "distill", "blend", "blend-distill-4"),
        also=(
            "bf16-then-quantize", "token-tis", "advantage", "icepop", "sequence-tis", "sequence-masked",
            "advantage-excess", "advantage-hinge", "reward-stage", "blend-blocks", "blend-tis",
            "straight-through-tis", "advantage-hold", "advantage-small", "blend-distill-4-strong", "blend-start-weak",
            "blend-start-strong",
        ),
        tried=ETAS,
    ),
    "regimes": Table(
        "Where does the constraint earn its place?",
        ("severe", "stale", "fast", "mild", "fp8", "int4-severe", "int4-stale", "int4-fast"), REGIME_ARMS,
        against=REGIME_ARMS[:4], tried=("before", "reachable", "blend-start-tight-full"),
    ),
    "overall": Table(
        "And over all settings in which quantization hurts, together?",
        ("severe", "stale", "fast", "int4-severe", "int4-stale", "int4-fast"), REGIME_ARMS,
        against=REGIME_ARMS[:4], pooled=True,
    ),
    "harmless": Table(
        "And over those in which it hardly does?", ("mild", "fp8"), REGIME_ARMS, against=REGIME_ARMS[:4], pooled=True,
    ),
    "pulls": Table(
        "Towards whom to pull, and how hard?", ("severe", "stale", "fast", "mild", "fp8"),
        ("uncorrected", "blend-start"), against=(),
        tried=(
            "token-tis", "straight-through-distill", "blend-distill-4", "blend-distill-4-strong", "blend-start-weak",
            "blend-start-strong",
        ),
    ),
    "release": Table(
        "Does the multiplier let go where there is nothing to gain?", ("fp8", "mild"),
        ("uncorrected", "straight-through-start", "blend-start", "reachable"), best="reachable",
        against=("uncorrected", "straight-through-start", "blend-start"),
    ),
    "others": Table(
        "And on INT8, and with long answers over an FP8 KV cache?", ("int8", "fp8-long"),
        ("before", "uncorrected", "straight-through", "default"),
        best="default", against=("uncorrected", "straight-through"), tried=(*REGIME_ARMS[2:], "reachable"), seeds=3,
    ),
    "lead": Table(
        "Is the lead over the straight-through trainer more than chance?", ("severe", "stale"),
        ("straight-through", "blend-start"), against=("straight-through",), seeds=10,
    ),
    "fresh": Table(
        "And on the seeds that nothing was chosen on?", ("severe", "stale"), ("straight-through", "blend-start"),
        against=("straight-through",), first=5,
    ),
    "shipped": Table(
        "And the default, with INT8 activations, on seeds that nothing was chosen on?", ("severe", "stale"),
        ("straight-through-start", "default"), against=("straight-through-start",), best="default", seeds=3, first=10,
    ),
    "ahead": Table(
        "Is the default ahead of what has no constraint, with INT8 activations, on five more of them?",
        ("severe", "stale"), ("uncorrected", "straight-through", "default"),
        against=("uncorrected", "straight-through"), best="default", first=13,
    ),
    "again": Table(
        "And of the straight-through trainer, on five more that were fixed before one was run?", ("severe", "stale"),
        ("straight-through", "default"), against=("straight-through",), best="default", first=18,
    ),
    "ten": Table(
        "And on these ten together?", ("severe", "stale"), ("straight-through", "default"),
        against=("straight-through",), best="default", seeds=10, first=13,
    ),
    "long": Table(
        "Does it stay ahead over 500 steps?", ("int4-long",),
        (*FEW_ARMS, "blend-start-tight-full", "straight-through-start", *FADING),
        against=(*FEW_ARMS, "straight-through-start", *FADING), best="blend-start-tight-full", seeds=FEW_SEEDS,
    ),
    "long-w4a8": Table(
        "And with INT8 activations?", ("long",), FEW_ARMS, against=FEW_ARMS[:2], tried=("blend-start-fading",),
        seeds=FEW_SEEDS,
    ),
    "fading": Table(
        "Does a pull that fades cost a short run?", ("int4-severe", "int4-stale"),
        ("blend-start", *FADING), against=("blend-start",), best="blend-start-fading",
    ),
    "tasks": Table(
        "Does it hold on another task, with long answers?", ("int4-totals",), FEW_ARMS, against=FEW_ARMS[:2], seeds=3,
    ),
    "tasks-few": Table(
        "And on two with INT8 activations, and on one where hardly an answer is right?",
        ("products", "totals", "int4-products"),
        FEW_ARMS, against=FEW_ARMS[:2], seeds=FEW_SEEDS,
    ),
    "natural": Table(
        "Does it hold with outliers that training grew?", ("natural", "mild"), FEW_ARMS, against=FEW_ARMS[:2],
        seeds=FEW_SEEDS,
    ),
    "once": Table(
        "And once each: at 4M parameters, at 1.2M with INT8 activations, with a scale for 32 columns under them?",
        ("int4-4m", "severe-1m", "w4a8-g32"), FEW_ARMS, against=FEW_ARMS[:2], seeds=1,
    ),
    "granularity": Table(
        "Does it hold whether a scale is shared by 32 columns, by 128 or by a whole row?",
        ("severe", "int4-g32", "int4-severe", "int4-channel"), ("before", *FEW_ARMS),
        against=FEW_ARMS[:2], seeds=3,
    ),
    "sizes": Table(
        "Does it hold from 2M to 32M parameters?", SIZES,
        ("before", "uncorrected", "straight-through", "default"), against=("uncorrected", "straight-through"),
        best="default", seeds=1,
    ),
    "routing": Table(
        "Does a mixture's routing noise matter, with BF16 on both sides?", ("mixture",),
        ("uncorrected", "token-tis", "icepop", "replay"), against=("uncorrected",), best="replay", seeds=3,
    ),
    "tolerance": Table(
        "Is there a region of tolerances?", ("severe", "stale", "int4-stale"),
        ("uncorrected", "blend-start", "c@0.2", "c@0.4", "c@0.8"), against=("uncorrected",),
        tried=("c@0.05", "c@0.02"), seeds=3,
    ),
    "tight": Table(
        "Is a tighter tolerance better, a full first step, or both levers at full strength throughout?",
        ("int4-severe", "int4-stale", "int4-fast"), TIGHT_ARMS, against=BESIDE_TIGHT, best="blend-start-tight-full",
        tried=("init@1.0", "c@0.05", "c@0.02"),
    ),
    "tight-overall": Table(
        "And over all three settings together?", ("int4-severe", "int4-stale", "int4-fast"), TIGHT_ARMS,
        against=BESIDE_TIGHT, best="blend-start-tight-full", pooled=True,
    ),
    "seldom": Table(
        "Is a pull in one step of eight enough, at twice the weight?", ("int4-severe", "int4-stale"),
        ("uncorrected", "blend-start-tight-full", "blend-start-tight-8"), best="blend-start-tight-8",
        against=("blend-start-tight-full",),
    ),
    "multiplier": Table(
        "How much do eta and lambda_0 matter?", ("int4-severe",), ("blend-start", *ETAS, *LAMBDAS),
        against=(*ETAS, *LAMBDAS), seeds=3,
    ),
    "groups": Table(
        "OTB with groups of 4 against GRPO with groups of 32, equal tokens", ("severe",),
        ("grpo-32", "otb-4", "grpo-4"), against=("grpo-32", "grpo-4"), best="otb-4", seeds=3,
    ),
    "schedule": Table(
        "Does the length-triggered schedule save a run that blows up?", ("fast",), ("uncorrected", "length-triggered"),
        against=("uncorrected",), best="length-triggered", seeds=3,
    ),
    "room": Table(
        "And a run whose answers have room to grow?", ("room",), ("straight-through", "straight-through-halved"),
        against=("straight-through",), best="straight-through-halved", seeds=1,
    ),
    "zero-mismatch": Table(
        "What does it buy to have no mismatch at all?", ("mild",), ("bf16-then-quantize", "exact"),
        against=("bf16-then-quantize",), best="exact", seeds=3,
    ),
}  # fmt: skip


def jobs(tables: Sequence[str], seeds: int | None = None, extra: tuple[str, ...] = ()) -> Iterator[Job]:
    """The runs of the tables, each once: seed by seed, so that a stopped study has whole seeds; `also` comes last."""
    done: set[Job] = set()
    for name in tables:
        table = TABLES[name]
        wanted = table.arm_seeds(seeds)
        for arms in (table.arms, table.also):
            for seed in range(table.first, table.first + table.seeds):
                for job in (Job(setting, arm, seed, extra) for setting in table.settings for arm in arms):
                    if seed in wanted[job.arm] and job not in done:
                        done.add(job)
                        yield job
