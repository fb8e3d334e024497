"""Attribution of the train-versus-deployed gap: pure functions of log-probs of the same tokens by several models.

The parts are distances between neighbours: `weights` and `activations, KV, kernels` are the two legs of the path
trainer at W -> trainer at Q(W) -> deployed engine, and `total` goes from end to end. Distances are not shares of a sum:
errors of the legs can cancel or add up, so the legs need not add to the total, though the mean |probability difference|
of the total is never above the sum of theirs (triangle inequality). `numerics` and `engine` lie beside the path: what
is left when nothing is quantized. Shapes are [N, T], log-probs in nats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from train.discrepancy import mismatch_metrics, probability_difference
from train.records import TokenBatch

GAP_METRICS = ("prob_diff_mean", "k3", "k3_reverse", "logp_abs_diff", "logp_abs_diff_max")
FLOOR = ("numerics", "engine")  # the parts that are there when nothing is quantized
STANDS_OUT = 1.5  # times the even share of the blocks' gaps


@dataclass(frozen=True)
class Scores:
    """Log-probs of the same tokens, [N, T] each, nats; 0 where the mask is 0.

    Attributes:
        trainer: the trainer at W, in its micro-batches.
        one_by_one: the trainer at W, a sequence at a time, without padding.
        quantized: the trainer at Q(W).
        engine: the inference engine at W, nothing quantized.
        deployed: the inference engine of the target.
    """

    trainer: Tensor
    one_by_one: Tensor
    quantized: Tensor
    engine: Tensor
    deployed: Tensor


@dataclass(frozen=True)
class Part:
    """One row of the attribution.

    Attributes:
        name: what the difference is put down to.
        start: the model on the trainer's side.
        end: the model on the deployed side.
        gap: the GAP_METRICS between the two.
    """

    name: str
    start: str
    end: str
    gap: Mapping[str, float]


@dataclass(frozen=True)
class WorstToken:
    """A sampled token whose probability differs much.

    Attributes:
        sequence: row of the batch.
        position: index in the response, from 0.
        trainer: p, its probability in the trainer.
        deployed: q, its probability in the deployed engine.
    """

    sequence: int
    position: int
    trainer: float
    deployed: float


def gap(near: Tensor, far: Tensor, mask: Tensor) -> dict[str, float]:
    """GAP_METRICS of two models' log-probs [N, T].

    The tokens are samples of the deployed engine: k3 estimates KL(far || near) only where `far` is that engine.
    Elsewhere it is a distance over the same tokens, and a few that neither model would have sampled can make it huge.
    """
    metrics = mismatch_metrics(near, far, mask)
    return {name: metrics[name] for name in GAP_METRICS}


def attribute(scores: Scores, mask: Tensor) -> tuple[Part, ...]:
    """The gap in parts: numerics, engine, weights, activations with KV cache and kernels, total."""
    s = scores
    rows = (
        ("numerics", "trainer", "one by one", s.trainer, s.one_by_one),
        ("engine", "trainer", "vLLM BF16", s.trainer, s.engine),
        ("weights", "trainer", "trainer Q(W)", s.trainer, s.quantized),
        ("activations, KV, kernels", "trainer Q(W)", "target", s.quantized, s.deployed),
        ("total", "trainer", "target", s.trainer, s.deployed),
    )
    return tuple(Part(name, start, end, gap(near, far, mask)) for name, start, end, near, far in rows)


def blocks(weights: Iterable[str]) -> dict[str, list[str]]:
    """Weight names by transformer block, `model.layers.3` and the like; a weight outside of blocks is its own."""
    found: dict[str, list[str]] = {}
    for name in weights:
        numbered = re.match(r"(.*?\.\d+)\.", name)
        found.setdefault(numbered[1] if numbered else name.removesuffix(".weight"), []).append(name)
    return found


def with_quantized(
    weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """W, but Q(W) for `names`.

    Args:
        weights: name to BF16 W.
        deployed: name to BF16 Q(W) of the quantized weights.
        names: some of the quantized weights.
    """
    return {**weights, **{name: deployed[name] for name in names}}


def even_shares(gaps: Mapping[str, float]) -> dict[str, float]:
    """Each block's gap over the mean of all blocks' gaps: 1 for every block where all matter alike."""
    mean = sum(gaps.values()) / len(gaps)
    return {name: value / mean if mean else 1.0 for name, value in gaps.items()}


def standing_out(gaps: Mapping[str, float], *, floor: float) -> list[str]:
    """The blocks worth keeping in BF16: STANDS_OUT times the even share or more, and above the floor, largest first.

    Args:
        gaps: block to its mean |probability difference| when it alone is quantized.
        floor: a gap that is there without quantization; what lies under it says nothing.
    """
    shares = even_shares(gaps)
    chosen = [name for name in gaps if shares[name] >= STANDS_OUT and gaps[name] > floor]
    return sorted(chosen, key=lambda name: -gaps[name])


def ignore_entry(block: str) -> str:
    """A block as an entry of the target's `ignore` list: `re:.*layers\\.3\\..*`, or the module's own name."""
    stem, _, last = block.rpartition(".")
    return f"re:.*{stem.rpartition('.')[2]}\\.{last}\\..*" if last.isdigit() else block


def suggested_tolerance(first_step: float, *, total: float, floor: float, ratio: float) -> float:
    """c = first_step * max(ratio, floor / total), so never under the part of the gap that no training can close.

    Args:
        first_step: mean |probability difference| as training measures it, at the run's temperature.
        total: the attribution's total, and
        floor: its engine + numerics, both at temperature 1.
        ratio: the share of the gap that is to be left, `constraint.tolerance_ratio`.

    Returns:
        c, a mean |probability difference| at the run's temperature; the floor itself where the total is 0.
    """
    return first_step * max(ratio, floor / total) if total else floor


def worst_tokens(trainer: Tensor, deployed: Tensor, batch: TokenBatch, count: int) -> list[WorstToken]:
    """The `count` tokens with the largest |p - q|, worst first; the same token after the same text counts once.

    Args:
        trainer: [N, T] log-probs of the trainer.
        deployed: [N, T] log-probs of the deployed engine.
        batch: the N sequences.
        count: how many.
    """
    width = batch.mask.shape[1]
    ranked = probability_difference(trainer, deployed, batch.mask).flatten().argsort(descending=True, stable=True)
    seen: set[tuple[Sequence[int], Sequence[int]]] = set()
    found: list[WorstToken] = []
    for index in ranked.tolist():
        row, position = divmod(index, width)
        context = (batch.prompts[row], batch.responses[row][: position + 1])
        if not batch.mask[row, position] or context in seen:
            continue
        seen.add(context)
        p, q = (float(side[row, position].exp()) for side in (trainer, deployed))
        found.append(WorstToken(row, position, p, q))
        if len(found) == count:
            break
    return found
