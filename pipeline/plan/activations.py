"""What one micro-batch's forward and backward hold, from transformers' code for Llama, Qwen2, Qwen3 and Qwen3-MoE.

Counted tensor by tensor as autograd saves them (BF16 unless said otherwise). Tests compare it with the bytes that
autograd saves, and with the peak of living tensors, on a CPU; a GPU's kernels may save a little less or more, and its
allocator rounds up. Left out: flash attention's own buffers, which are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.plan.shape import Shape
from train.token_logprobs import AT_ONCE

Attention = Literal["eager", "sdpa", "flash_attention_2"]


@dataclass(frozen=True)
class MicroBatch:
    """Of one forward-backward.

    Attributes:
        tokens: T, padded.
        length: S, of a row.
        predicted: N, response tokens, whose logits are computed.
        attention: transformers' implementation.
        padded: whether rows differ in length, so that attention gets a mask.
    """

    tokens: int
    length: int
    predicted: int
    attention: Attention
    padded: bool


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        saved: what is held when the forward pass is done.
        peak: the most that is held at any time of forward and backward, without weights and their gradients.
        logits: the part of the peak that grows with the vocabulary.
    """

    saved: float
    peak: float
    logits: float


def layer_saved(shape: Shape, micro: MicroBatch) -> float:
    """Bytes per token that one decoder layer saves for its backward pass.

    16 H: two norms, each the FP32 input, the BF16 normalized and scaled outputs. 6 (A + K): the same of queries A and
    keys K per head, without the scaled output. Attention: queries, keys, values and output; repeated to all heads under
    a mask; eager besides 6 bytes per score. 8 I: gate, its activation, up, and their product. A mixture has those of
    its k chosen experts, with 4 H for each one's input and output.
    """
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    total: float = 16 * hidden + 8
    if shape.qk_norm:
        total += 6 * (queries + keys) + 4 * (shape.heads + shape.kv_heads)
    if micro.attention == "eager":
        total += 8 * queries + 6 * shape.heads * micro.length
    elif micro.attention == "sdpa" and micro.padded:
        total += 8 * queries + 4 * shape.heads
    else:
        total += 4 * (queries + keys) + 4 * shape.heads
    if shape.experts:
        return total + shape.chosen * (4 * hidden + 8 * shape.intermediate + 39) + 4 * shape.experts + 4
    return total + 8 * shape.intermediate


def layer_transient(shape: Shape, micro: MicroBatch) -> float:
    """Bytes per token of gradients that a layer's backward pass holds beside what is saved.

    In the MLP two of its own width and one of the hidden one, 4 I + 2 H, at its busiest: what a product no longer needs
    is freed as soon as its gradient is there. A mixture's chosen experts have theirs at once, with 2 H for each one's
    output; eager attention's scores are there in FP32 and BF16.
    """
    inside = 4 * shape.intermediate
    if shape.experts:
        inside = shape.chosen * (2 * shape.hidden + 4 * shape.intermediate)
    scores = 8 * shape.heads * micro.length if micro.attention == "eager" else 0
    return max(inside, scores) + 2 * shape.hidden


def activations(shape: Shape, micro: MicroBatch, *, checkpointing: bool, taught: bool = False) -> Activations:
    """Bytes of one micro-batch.

    With gradient checkpointing (arXiv 1604.06174) each layer keeps its input, 2 H per token, and one layer at a time is
    computed again, when the head's part is free again. Logits are V wide for N tokens, in BF16: 2 bytes saved. In the
    forward pass they are there twice, with `AT_ONCE` tokens' in FP32, twice too; in backward with two gradients. In a
    KL pull (`taught`) the teacher's are there besides, to the end.
    """
    tokens, wide = micro.tokens, micro.predicted * shape.vocab
    layer = tokens * layer_saved(shape, micro)
    transient = tokens * layer_transient(shape, micro)
    # last norm, token ids, the head's input; labels, places and normalizers of what is predicted
    ends = tokens * (6 * shape.hidden + 12) + micro.predicted * (2 * shape.hidden + 36)
    head = max(4 * wide + 8 * shape.vocab * min(micro.predicted, AT_ONCE), 6 * wide)
    kept = shape.layers * (tokens * 2 * shape.hidden if checkpointing else layer)
    in_layers = kept + layer + transient if checkpointing else kept + ends + 2 * wide + transient
    teacher = 2 * wide if taught else 0
    return Activations(kept + ends + 2 * wide, max(kept + ends + head, in_layers) + teacher, float(head + teacher))
