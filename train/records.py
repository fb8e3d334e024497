"""What flows through a training step, as frozen records.

Shape words: P prompts of a step, G completions per prompt, N = P * G sequences (a prompt's group is contiguous),
T response tokens (padded to the longest of the step), L prompt plus response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One prompt with a verifiable answer.

    Attributes:
        id: unique within its task.
        prompt: text as the model sees it, template applied.
        answer: reference answer.
        fields: the source's row, for graders that want more than the answer.
    """

    id: str
    prompt: str
    answer: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: response tokens, the end-of-sequence token included when it was sampled; length >= 1.
        logprobs: log-prob of each token under the distribution it was sampled from, nats; same length.
        finish_reason: "stop" (end of sequence) or "length" (cut at the limit).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclass(frozen=True)
class TokenBatch:
    """A step's sequences as tensors; response positions are aligned across the [N, T] fields.

    Attributes:
        prompts: N prompts' token ids.
        responses: N responses' token ids.
        rollout_logprobs: [N, T] float32, q_t of the deployed engine; 0 where the mask is 0.
        mask: [N, T] float32, 1 on sampled tokens.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    rollout_logprobs: Tensor
    mask: Tensor

    @classmethod
    def collate(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> TokenBatch:
        """Pad N completions to the longest.

        Raises:
            ValueError: a completion without tokens, or with another number of log-probs than tokens.
        """
        width = max(len(completion.token_ids) for completion in completions)
        logprobs = torch.zeros(len(completions), width)
        mask = torch.zeros(len(completions), width)
        for row, completion in enumerate(completions):
            length = len(completion.token_ids)
            if length == 0 or length != len(completion.logprobs):
                raise ValueError(f"completion {row}: {length} tokens with {len(completion.logprobs)} log-probs")
            logprobs[row, :length] = torch.tensor(completion.logprobs)
            mask[row, :length] = 1.0
        return cls(tuple(tuple(ids) for ids in prompts), tuple(c.token_ids for c in completions), logprobs, mask)

    @property
    def lengths(self) -> list[int]:
        """Prompt plus response tokens of each sequence."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def response_tokens(self) -> int:
        return int(self.mask.sum())
