"""Memory by part: of a trainer rank, of the rollout engine, of the host and the disk. Pure arithmetic, in bytes.

P parameters, M of them learn (FP32 masters; adapters with LoRA), Q are quantized; R ranks shard the module, masters,
moments and gradients (FSDP2), and W, Q(W) and their blend with them. The deployed tensors, the engine and the
checkpoint's snapshot are the first rank's, the fullest, which is what is counted. Between syncs the deployed tensors
are in the host's memory. Left out: the critic (megabytes), libraries' own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plan.activations import Activations
from pipeline.plan.packed import Packed
from train.config import TrainConfig

PHASES = ("sync", "train", "requantize")
KV_BLOCK = 16  # tokens in a block of vLLM's cache, on a GPU


@dataclass(frozen=True)
class Part:
    """One line of a memory table.

    Attributes:
        name: what it is.
        how: the formula, for a reader.
        sync, train, requantize: bytes in each phase: weights go to the engine; forward and backward; the next
            mini-batch's weights are quantized.
    """

    name: str
    how: str
    sync: float
    train: float
    requantize: float

    @classmethod
    def always(cls, name: str, how: str, size: float) -> Part:
        return cls(name, how, size, size, size)

    @property
    def largest(self) -> float:
        return max(self.sync, self.train, self.requantize)


@dataclass(frozen=True)
class Sizes:
    """Counts of parameters, from the model's shapes and the target.

    Attributes:
        total: P.
        learned: M.
        adapted: weights that adapters change; P without LoRA.
        packed: the deployed checkpoint.
        layer: of the largest decoder layer.
        outside: of embedding, norm and head.
        largest: of the largest parameter.
        largest_quantized: of the largest that is quantized; stacked experts are one.
    """

    total: int
    learned: int
    adapted: int
    packed: Packed
    layer: int
    outside: int
    largest: int
    largest_quantized: int


def trainer_parts(
    config: TrainConfig, sizes: Sizes, work: Activations, overhead: float, *, on_cpu: bool = False
) -> list[Part]:
    """What the first trainer rank holds on its GPU, or with `on_cpu` in a CPU's memory, which it is measured in.

    The module is BF16, and its shards FP32 where there are several ranks (`train.distributed`). AdamW has two FP32
    moments (arXiv 1711.05101). FSDP2 gathers a layer at a time in BF16, the next one ahead, and what is outside of
    layers for the whole pass. A step of m mini-batches holds the weights of its beginning beside those of the present
    mini-batch, and the last one's until the new ones are in place: min(m, 2) and min(m, 3) sets.

    Args:
        config: the `[train]` table.
        sizes: of model and checkpoint.
        work: of one micro-batch.
        overhead: bytes that are no tensors: CUDA context, libraries, fragmentation.
    """
    ranks, quantized = config.distributed.ranks, sizes.packed.quantized_parameters
    offloaded = _offloaded(config)
    sharded = 0.0 if offloaded else 1 / ranks
    where = " in host memory" if offloaded else f" / {ranks} ranks" if ranks > 1 else ""
    width, dtype = (2, "BF16") if ranks == 1 else (4, "FP32")
    module = width * sizes.total * sharded
    parts = [
        Part.always(f"module, {dtype}", f"{width} B x P{where}", module),
        Part.always("masters, FP32", f"4 B x M{where}", 4 * sizes.learned * sharded),
        Part.always("AdamW moments, FP32", f"8 B x M{where}", 8 * sizes.learned * sharded),
        Part("gradients, FP32", f"4 B x M{where}", 0, 4 * sizes.learned * sharded, 0),
    ]
    if config.lora is not None:
        parts.append(Part.always("frozen base, BF16", f"2 B x P{where}", 2 * sizes.total * sharded))
    if config.loss.reference_kl > 0 or config.constraint.keeps_start:
        parts.append(Part.always("start model, BF16", f"2 B x P{where}", 2 * sizes.total * sharded))
    sets = {"sync": 1, "train": min(config.updates, 2), "requantize": min(config.updates, 3)}

    def copies(name: str, how: str, size: float) -> Part:
        times = f" x {sets['requantize']}" if sets["requantize"] > 1 else ""
        return Part(name, how + where + times, *(size * sharded * sets[phase] for phase in PHASES))

    parts.append(copies("W, BF16", "2 B x P" if config.lora is None else "2 B x adapted", 2 * sizes.adapted))
    if config.constraint.quantizes or config.constraint.kl_weight > 0:
        parts.append(copies("Q(W), BF16", "2 B x Q", 2 * quantized))
    if config.constraint.quantizes:
        blend = copies("blend of W and Q(W), BF16", "2 B x Q", 2 * quantized)
        parts.append(Part(blend.name, blend.how, 0, blend.train, blend.requantize))
        fp32 = 12 * sizes.largest_quantized * sharded
        parts.append(Part("one parameter blended in FP32", f"12 B{where}", 0, 0, fp32))
    narrow = sizes.packed.total - sizes.packed.kept if config.rollout.target else 0  # what stays BF16 is W's own
    if on_cpu:  # those of the step before are the loop's state until the step is done, with what stayed BF16 then
        held = 2 * narrow + sizes.packed.kept if config.rollout.target else 2 * sizes.total
        parts.append(Part.always("deployed tensors", "this step's, last step's", held))
    else:
        sent = narrow if ranks == 1 else sizes.packed.total if config.rollout.target else 2 * sizes.total
        parts.append(Part("deployed tensors", "this step's, until they are sent", sent, 0, 0))
        if ranks > 1:
            parts.append(Part("one weight in one piece, BF16", "2 B x largest", 2 * sizes.largest, 0, 0))
    if ranks > 1:
        gathered = 2 * (2 * sizes.layer + sizes.outside)
        parts.append(Part("gathered layers, BF16", "2 B x (2 layers + ends)", 0, gathered, 0))
        group = max(sizes.layer, sizes.outside)
        parts.append(Part("gradients being reduced", "6 B x largest group", 0, 6 * group, 0))
    else:
        parts.append(Part("one parameter's gradient", "6 B x largest", 0, 6 * sizes.largest, 0))
    parts.append(Part("activations", "one micro-batch", 0, work.peak, 0))
    parts.append(Part.always("CUDA, fragmentation", "assumed", overhead))
    return [part for part in parts if part.largest > 0]


def _offloaded(config: TrainConfig) -> bool:
    """Only shards are: a rank alone has none."""
    return config.distributed.cpu_offload and config.distributed.ranks > 1


def peak(parts: Sequence[Part]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    totals = {phase: sum(getattr(part, phase) for part in parts) for phase in PHASES}
    phase = max(totals, key=lambda name: totals[name])
    return phase, totals[phase]


def host_parts(config: TrainConfig, sizes: Sizes) -> dict[str, float]:
    """Bytes in the memory of the first node: the whole snapshot that a checkpoint is written from, the deployed tensors
    of this step and of the one before, W in one piece while it is sent, the model as each process loads it at the
    start, and with cpu_offload what is not on the GPUs."""
    share = config.distributed.processes / config.distributed.ranks
    parts = {
        "checkpoint snapshot, 12 B x M": 12.0 * sizes.learned,
        "deployed tensors, this step's and last step's": 2.0 * sizes.packed.total,
        "model as loaded, 2 B x P per process": 2.0 * sizes.total * config.distributed.processes,
    }
    if config.distributed.ranks > 1:
        parts["W in one piece while it is sent, 2 B x P"] = 2.0 * sizes.total
    if _offloaded(config):
        parts["offloaded, 4 B x P + 16 B x M"] = (4 * sizes.total + 16 * sizes.learned) * share
    return parts


def disk_bytes(config: TrainConfig, sizes: Sizes) -> float:
    """Bytes of a whole run directory: checkpoints, one more while it is written, the engine's and the exported
    checkpoint, and the BF16 policy."""
    checkpoint = 12 * sizes.learned + sizes.packed.total
    return (config.keep_checkpoints + 1) * checkpoint + 2 * sizes.packed.total + 2 * sizes.total


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, *, fp8: bool, tensor_parallel: int = 1) -> float:
    """Bytes of keys and values of one token on one GPU: 2 x layers x heads x head_dim x 2 (BF16) or 1 (FP8).

    Tensor parallelism splits the heads, and copies them where there are more GPUs than heads (vLLM).
    """
    return 2 * layers * max(1, kv_heads // tensor_parallel) * head_dim * (1 if fp8 else 2)


@dataclass(frozen=True)
class EngineMemory:
    """The rollout engine on one of its GPUs.

    Attributes:
        granted: bytes of the card that vLLM may use, its memory x gpu_memory_utilization.
        weights: the deployed checkpoint's, split over the tensor-parallel GPUs.
        overhead: assumed: CUDA context, vLLM's profiling run, activations.
        kv_per_token: bytes.
        kv_cache: what is left for keys and values; below 0 where nothing is.
        at_once: sequences of the full length that fit into it.
        wanted: sequences that one engine is to sample in a step.
    """

    granted: float
    weights: float
    overhead: float
    kv_per_token: float
    kv_cache: float
    at_once: int
    wanted: int


def engine_memory(
    *, granted: float, weights: float, overhead: float, kv_per_token: float, length: int, wanted: int
) -> EngineMemory:
    """vLLM takes its share of the card, and what weights and overhead leave of it becomes KV cache, in whole blocks."""
    left = granted - weights - overhead
    full = -(-length // KV_BLOCK) * KV_BLOCK * kv_per_token
    return EngineMemory(granted, weights, overhead, kv_per_token, left, max(0, int(left // full)), wanted)
