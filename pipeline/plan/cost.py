"""Time and traffic of a step from stated rates. Pure arithmetic; every rate is an assumption or a data sheet's.

Nothing here was measured on a GPU. Left out: quantization, verification and grading of a step, kernel launches, and any
overlap of communication with compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.shape import Shape


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes and a user can change.

    Attributes:
        response_tokens: of one completion, on average; None is max_tokens, the most there can be.
        prompt_tokens: of one prompt, on average.
        mfu: share of the card's BF16 peak that forward and backward reach.
        bandwidth_share: share of the card's memory bandwidth that decoding reaches.
        link_share: share of link and network that collectives reach.
        network_gbs: between machines, per GPU and direction, 1e9 bytes per second (400 Gb/s is 50).
        storage_gbs: of the folder through which servers get new weights, 1e9 bytes per second.
        trainer_overhead_gib: CUDA context, libraries and fragmentation beside the trainer's tensors.
        engine_overhead_gib: the same of vLLM, with the activations of its profiling run.
    """

    response_tokens: int | None = None
    prompt_tokens: int = 256
    mfu: float = 0.35
    bandwidth_share: float = 0.6
    link_share: float = 0.7
    network_gbs: float = 50.0
    storage_gbs: float = 2.0
    trainer_overhead_gib: float = 2.0
    engine_overhead_gib: float = 3.0


@dataclass(frozen=True)
class Work:
    """Tokens of one step, over all ranks.

    Attributes:
        sequences: prompts x group size.
        prompt, response: mean tokens of one sequence.
    """

    sequences: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Prompt and response tokens that the trainer computes in one pass."""
        return self.sequences * self.length


def forward_flops(shape: Shape, tokens: float, length: float) -> float:
    """2 N_active per token (arXiv 2001.08361), and causal attention: two products of 2 A FLOPs with half of the
    context, 2 A S per token and layer. A backward pass costs twice that."""
    return tokens * (2 * shape.active + 2 * shape.heads * shape.head_dim * length * shape.layers)


def experts_read(experts: int, chosen: int, tokens: float) -> float:
    """Expected share of a layer's experts that a batch of tokens touches, under uniform routing: 1 - (1 - k/E)^B."""
    return 1 - (1 - chosen / experts) ** tokens if experts else 1.0


def decode_seconds(
    *,
    steps: float,
    batch: float,
    weight_bytes: float,
    kv_bytes: float,
    flops: float,
    bytes_per_s: float,
    flops_per_s: float,
) -> float:
    """Decoding `steps` tokens for `batch` sequences at once: each step reads the weights once and every sequence's keys
    and values, or computes, whichever takes longer (the roofline, arXiv 2211.05102).

    Args:
        steps: tokens per sequence, times rounds.
        batch: sequences at once on one engine.
        weight_bytes: read in one step.
        kv_bytes: keys and values of one sequence at its mean length.
        flops: of one token.
        bytes_per_s, flops_per_s: reached rates.
    """  # fmt: skip
    return steps * max((weight_bytes + batch * kv_bytes) / bytes_per_s, batch * flops / flops_per_s)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, and receives, in one step.

    Attributes:
        training: parameters and gradients of FSDP2.
        scoring: parameters for passes without gradient.
        weights: gathering W for the engine, and where scales reach over more rows than a shard has, to be quantized.
    """

    training: float
    scoring: float
    weights: float

    @property
    def total(self) -> float:
        return self.training + self.scoring + self.weights


def fsdp_traffic(parameters: int, ranks: int, *, trained: float, scored: float, gathers: int) -> Traffic:
    """FSDP2's ring collectives (arXiv 2304.11277): each moves (R - 1) / R of its tensor through every rank.

    A micro-batch all-gathers BF16 parameters for forward and for backward and reduce-scatters FP32 gradients, 8 B per
    parameter; one without gradient all-gathers once, 2 B; a gather of W 2 B.

    Args:
        parameters: P.
        ranks: R.
        trained: micro-batches with a backward pass, per rank.
        scored: micro-batches without.
        gathers: how often W is gathered.
    """
    share = parameters * (ranks - 1) / ranks
    return Traffic(8 * share * trained, 2 * share * scored, 2 * share * gathers)
