"""One shape for every forward pass, so that a token's log-prob has the same bits whenever it is computed.

BF16 kernels choose their blocking by shape, so a token's numbers depend on the padding and the number of rows it is
computed with. Here both are fixed, rows keep their order, and padding is on the right without a mask: under causal
attention nothing to the left of a token knows what follows. Sampling token by token and the trainer's forward over the
whole response are then the same computation. Experts are the exception: the tokens of the whole batch are dealt out to
them, so their shapes do depend on the rest; on a CPU their results do not, and the trainer checks every token. Run on
CPUs only so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig

NORMALIZED_AT_ONCE = 64  # tokens in one logsumexp


@dataclass(frozen=True)
class FixedShape:
    """The shape of every forward pass.

    Attributes:
        rows: sequences; divides a mini-batch, so that no forward pass crosses its border.
        width: tokens, `max_model_len`.
    """

    rows: int
    width: int

    @classmethod
    def of(cls, config: TrainConfig) -> FixedShape:
        """As many rows as `microbatch_tokens` allows; one where it does not allow any."""
        rollout = config.rollout
        minibatch = rollout.prompts // config.minibatches * rollout.group_size
        most = max(1, config.microbatch_tokens // rollout.max_model_len)
        rows = next(n for n in range(min(most, minibatch), 0, -1) if minibatch % n == 0)
        return cls(rows, rollout.max_model_len)

    def groups(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows in their order, `self.rows` at a time; the last group may be smaller."""
        for start in range(0, len(rows), self.rows):
            yield list(rows[start : start + self.rows])

    def forward(self, module: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids [rows, width] and the logits [rows, width - 1, V] of each next token.

        Args:
            module: a causal LM.
            sequences: at most `rows` sequences of at most `width` token ids; absent rows are padding.
        """
        ids = torch.zeros(self.rows, self.width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ids = ids.to(module.device)
        kept = torch.arange(self.width - 1, device=module.device)
        return ids, module(input_ids=ids, logits_to_keep=kept, use_cache=False).logits


def fixed_logsumexp(logits: Tensor) -> Tensor:
    """log sum exp over the last dimension, always of [NORMALIZED_AT_ONCE, V]: no bit depends on how many tokens.

    Args:
        logits: [tokens, V] float32.

    Returns:
        [tokens] float32, nats.
    """
    parts = []
    for part in logits.split(NORMALIZED_AT_ONCE):
        padding = part.new_zeros(NORMALIZED_AT_ONCE - len(part), part.shape[1])
        parts.append(torch.cat([part, padding]).logsumexp(1)[: len(part)])
    return torch.cat(parts)
