"""One plan: memory, time and traffic of a config's step on a kind of GPU, and whether it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.plan.activations import Activations, MicroBatch, activations
from pipeline.plan.cost import Assumptions, Traffic, Work, decode_seconds, experts_read, forward_flops, fsdp_traffic
from pipeline.plan.memory import (
    EngineMemory,
    Part,
    Sizes,
    disk_bytes,
    engine_memory,
    host_parts,
    kv_bytes_per_token,
    peak,
    trainer_parts,
)
from pipeline.plan.packed import Packed, packed_size
from pipeline.plan.shape import Shape
from quant.gpus import Gpu
from quant.modules import matrices
from quant.target import Target
from train.config import ServersConfig

GIB = 2**30
NODE = 8  # GPUs of one machine


@dataclass(frozen=True)
class Model:
    """What a plan is made for, whatever the config's sizes.

    Attributes:
        shape: of the BF16 model.
        target: bound to it.
        packed: the deployed checkpoint's bytes.
        largest_quantized: elements of the largest parameter that is quantized; stacked experts are one.
        lora: [out, in] of the linear layers that adapters change; empty without LoRA.
    """

    shape: Shape
    target: Target
    packed: Packed
    largest_quantized: int
    lora: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Times:
    """Seconds of one step's phases.

    Attributes:
        prefill, decode: of the rollout.
        scoring: passes without gradient.
        training: forward and backward.
        traffic: collectives, not overlapped.
        sync: deployed tensors to the servers.
        total: one after the other; with `ahead`, the longer of rollout and the rest.
    """

    prefill: float
    decode: float
    scoring: float
    training: float
    traffic: float
    sync: float
    total: float


@dataclass(frozen=True)
class Plan:
    """All of it, in bytes and seconds.

    Attributes:
        ranks: trainer ranks.
        engines: rollout engines.
        gpus: cards in all.
        colocated: whether engine and trainer share them.
        trainer: memory of one rank by part.
        phase, trainer_peak: the phase of a step that needs most, and how much.
        trainer_room: what a card leaves to the trainer.
        work: of one micro-batch.
        engine: memory of the engine on one card.
        host, disk: bytes of one node, and of the run directory.
        tokens: of one step.
        traffic: of one rank in one step.
        times: of one step.
        fits: trainer and engine both.
    """

    ranks: int
    engines: int
    gpus: int
    colocated: bool
    trainer: tuple[Part, ...]
    phase: str
    trainer_peak: float
    trainer_room: float
    work: Activations
    engine: EngineMemory
    host: dict[str, float]
    disk: float
    tokens: Work
    traffic: Traffic
    times: Times
    fits: bool

    @property
    def trainer_fits(self) -> bool:
        return self.trainer_peak <= self.trainer_room

    @property
    def engine_fits(self) -> bool:
        return self.engine.at_once >= 1


def model_of(config: RunConfig, shape: Shape, module: nn.Module) -> Model:
    """Bind the config's target to a model on the meta device.

    Raises:
        TargetError: the target does not fit the model.
        LoraError: `train.lora.modules` names what the model does not have.
    """
    target = Target.for_model(config.target, module)
    packed = packed_size(target, shape.parameters)
    largest = max(p.numel() for name, p in module.named_parameters() if _quantized(name, p, target))
    lora: tuple[tuple[int, int], ...] = ()
    if config.train.lora is not None:
        from train.lora import Adapters  # only now: peft takes a second to import

        with torch.device("meta"):
            adapters = Adapters(module, config.train.lora, seed=0)
        lora = tuple((rows, columns) for rows, columns in (shape.parameters[name] for name in adapters.trained))
    return Model(shape, target, packed, largest, lora)


def _quantized(name: str, parameter: Tensor, target: Target) -> bool:
    """Whether the target quantizes any of a parameter's matrices."""
    return any(part.removesuffix(".weight") in target.shapes for part, _ in matrices(name, parameter))


def make_plan(config: RunConfig, model: Model, gpu: Gpu, assumed: Assumptions) -> Plan:
    """Compute a plan; pure.

    Args:
        config: its sizes, which may differ from those the model was read with.
        model: what is trained and deployed.
        gpu: the card, trainer's and engine's alike.
        assumed: rates and lengths.
    """
    train, shape, memory = config.train, model.shape, gpu.memory_gib * GIB
    rollout, ranks = train.rollout, train.distributed.ranks
    servers = rollout.servers if rollout.engine == "servers" else None
    # without servers the first rank's process has the only engine
    engines = (len(servers.urls) or servers.count) * servers.data_parallel if servers else 1
    parallel = servers.tensor_parallel if servers else 1
    response = min(assumed.response_tokens or rollout.max_tokens, rollout.max_tokens)
    prompt = min(assumed.prompt_tokens, rollout.max_model_len - rollout.max_tokens)
    tokens = Work(rollout.prompts * rollout.group_size, prompt, response)

    sizes = _sizes(config, model)
    work = activations(
        shape, micro_batch(config, prompt), checkpointing=train.gradient_checkpointing,
        taught=train.constraint.kl_weight > 0,
    )  # fmt: skip
    parts = trainer_parts(train, sizes, work, assumed.trainer_overhead_gib * GIB)
    phase, needed = peak(parts)
    fp8 = model.target.spec.kv_cache == "fp8" and rollout.target
    weights = (model.packed.total if rollout.target else 2 * shape.total) * _held_share(shape, servers)
    engine = engine_memory(
        granted=memory * rollout.gpu_memory_utilization,
        weights=weights,
        overhead=assumed.engine_overhead_gib * GIB,
        kv_per_token=kv_bytes_per_token(
            shape.layers, shape.kv_heads, shape.head_dim, fp8=fp8, tensor_parallel=parallel
        ),
        length=rollout.max_model_len,
        wanted=-(-tokens.sequences // engines),
    )
    colocated = rollout.engine == "vllm"
    room = memory * (1 - rollout.gpu_memory_utilization) if colocated else memory
    has_engine = rollout.engine != "exact"
    traffic = _traffic(config, shape, tokens)
    return Plan(
        ranks=ranks,
        engines=engines if has_engine else 0,
        gpus=ranks if servers is None else ranks + engines * parallel,
        colocated=colocated,
        trainer=tuple(parts),
        phase=phase,
        trainer_peak=needed,
        trainer_room=room,
        work=work,
        engine=engine,
        host=host_parts(train, sizes),
        disk=disk_bytes(train, sizes),
        tokens=tokens,
        traffic=traffic,
        times=_times(config, model, gpu, assumed, tokens, engine, weights, traffic, engines, parallel),
        fits=needed <= room and (engine.at_once >= 1 or not has_engine),
    )


def micro_batch(config: RunConfig, prompt: int) -> MicroBatch:
    """The largest micro-batch of a step: full rows, as many as the budget takes, or one row that is longer."""
    train, length = config.train, config.train.rollout.max_model_len
    tokens = max(train.microbatch_tokens, length)
    share = train.rollout.max_tokens / (prompt + train.rollout.max_tokens)
    return MicroBatch(tokens, length, round(tokens * share), train.attention, padded=tokens >= 2 * length)


def _sizes(config: RunConfig, model: Model) -> Sizes:
    shape, lora = model.shape, config.train.lora
    learned = shape.total if lora is None else lora.rank * sum(map(sum, model.lora))
    adapted = shape.total if lora is None else sum(rows * columns for rows, columns in model.lora)
    return Sizes(
        shape.total, learned, adapted, model.packed, shape.largest_layer, shape.outside_layers, shape.largest_parameter,
        model.largest_quantized,
    )  # fmt: skip


def _scored_share(config: RunConfig) -> float:
    """Passes without gradient over the step's tokens, in whole passes: old log-probs of all but the first mini-batch
    (of all where a critic, the token baseline or the rewards need them), the reference, the KL pull's teacher."""
    train = config.train
    every = train.advantage in ("gae", "otb") or train.constraint.stage == "reward"
    old = 1.0 if every else 1 - 1 / train.minibatches
    return old + (train.loss.reference_kl > 0) + train.epochs * _pulled_share(config)


def _pulled_share(config: RunConfig) -> float:
    """Passes at Q(W), with gradient, over the step's tokens, in whole passes."""
    constraint = config.train.constraint
    return 1 / constraint.distill_every if constraint.kl_weight > 0 else 0.0


def _traffic(config: RunConfig, shape: Shape, tokens: Work) -> Traffic:
    train = config.train
    micros = max(train.minibatches, tokens.tokens / train.distributed.ranks / train.microbatch_tokens)
    trained = micros * train.epochs * (1 + _pulled_share(config))
    return fsdp_traffic(
        shape.total, train.distributed.ranks, trained=trained, scored=micros * _scored_share(config),
        gathers=1 + _gathered_to_quantize(config) * train.updates,
    )  # fmt: skip


def _gathered_to_quantize(config: RunConfig) -> bool:
    """Whether ranks gather W for Q(W): a lever needs it, and scales may reach over more rows than a shard has."""
    constraint = config.train.constraint
    apart = config.target.weights.strategy in ("channel", "group")
    return (constraint.quantizes or constraint.kl_weight > 0) and not apart


def link(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Bytes per second between the ranks: one machine's link; of several, the slower of it and the network."""
    inside = config.train.distributed.ranks <= NODE
    return assumed.link_share * 1e9 * (gpu.link_gbs if inside else min(gpu.link_gbs, assumed.network_gbs))


def _times(
    config: RunConfig, model: Model, gpu: Gpu, assumed: Assumptions, tokens: Work, engine: EngineMemory,
    weights: float, traffic: Traffic, engines: int, parallel: int,
) -> Times:  # fmt: skip
    train, shape = config.train, model.shape
    rate = assumed.mfu * gpu.bf16_tflops * 1e12
    rollout = train.rollout

    prompts = (rollout.prompts if rollout.prefix_caching else tokens.sequences) * tokens.prompt
    prefill = forward_flops(shape, prompts, tokens.prompt) / (rate * engines * parallel)
    batch = max(1, min(engine.wanted, engine.at_once))
    context = tokens.prompt + tokens.response / 2
    decode = decode_seconds(
        steps=tokens.response * engine.wanted / batch,
        batch=batch,
        weight_bytes=weights * _read_share(model, batch),
        kv_bytes=context * engine.kv_per_token,
        flops=forward_flops(shape, 1, 2 * context) / parallel,
        bytes_per_s=assumed.bandwidth_share * gpu.memory_gbs * 1e9,
        flops_per_s=rate,
    )
    forward = forward_flops(shape, tokens.tokens, tokens.length) / (rate * train.distributed.ranks)
    passes = (3 + train.gradient_checkpointing) * train.epochs
    training = forward * passes * (1 + _pulled_share(config))
    scoring = forward * _scored_share(config)
    moved = traffic.total / link(config, gpu, assumed)
    sync = model.packed.total / (assumed.storage_gbs * 1e9) if rollout.engine == "servers" else 0.0
    made, learned = prefill + decode, scoring + training + moved
    total = sync + (max(made, learned) if rollout.ahead else made + learned)
    return Times(prefill, decode, scoring, training, moved, sync, total)


def _held_share(shape: Shape, servers: ServersConfig | None) -> float:
    """Share of the checkpoint's bytes that one of an engine's GPUs holds."""
    if servers is None:
        return 1.0
    experts = _experts_share(shape)
    ranks = servers.gpus if servers.expert_parallel else servers.tensor_parallel
    return (1 - experts) / servers.tensor_parallel + experts / ranks


def _read_share(model: Model, batch: int) -> float:
    """Share of the checkpoint's bytes that one decoding step reads: of a mixture, the experts that are touched."""
    shape = model.shape
    return 1 - _experts_share(shape) * (1 - experts_read(shape.experts, shape.chosen, batch))


def _experts_share(shape: Shape) -> float:
    """Of the bytes, by parameters: experts and the rest are nearly all quantized alike."""
    return sum(math.prod(size) for name, size in shape.parameters.items() if ".experts." in name) / shape.total
