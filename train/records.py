"""What flows through a training step, as frozen records.

Shape words: P prompts of a step, G completions per prompt, N = P * G sequences (a prompt's group is contiguous),
T response tokens (padded to the longest of the step), L prompt plus response tokens.

torch is imported where tensors are made, not here: a grading worker needs `Problem` and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        experts: [prompt + response - 1, layers, k] integer, the experts each token was routed to in each decoder layer;
            the last token was sampled but not computed, so it has none. None where routing is not recorded.
        version: of the weights that sampled it, as the engine counts its loads; 0 before the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    experts: Tensor | None = field(default=None, compare=False, repr=False)
    version: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Sample:
    """One rollout as a reader sees it.

    Attributes:
        problem: what was asked.
        text: the completion, decoded.
        reward: what it earned; None where it could not be graded.
        finish_reason: "stop" or "length".
        failed: why it could not be graded, such as "timeout"; None where it was.
    """

    problem: Problem
    text: str
    reward: float | None
    finish_reason: str
    failed: str | None = None


@dataclass(frozen=True)
class TokenBatch:
    """A step's sequences as tensors; response positions are aligned across the [N, T] fields.

    Attributes:
        prompts: N prompts' token ids.
        responses: N responses' token ids.
        rollout_logprobs: [N, T] float32, q_t of the deployed engine; 0 where the mask is 0.
        mask: [N, T] float32, 1 on sampled tokens.
        experts: N completions' experts; None where routing is not recorded.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    rollout_logprobs: Tensor
    mask: Tensor
    experts: tuple[Tensor, ...] | None = None

    @classmethod
    def collate(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> TokenBatch:
        """Pad N completions to the longest.

        Raises:
            ValueError: a completion without tokens, with another number of log-probs than tokens, or with experts for
                other than prompt + response - 1 tokens; some completions with experts and others without.
        """
        import torch

        width = max(len(completion.token_ids) for completion in completions)
        logprobs = torch.zeros(len(completions), width)
        mask = torch.zeros(len(completions), width)
        for row, completion in enumerate(completions):
            length = len(completion.token_ids)
            if length == 0 or length != len(completion.logprobs):
                raise ValueError(f"completion {row}: {length} tokens with {len(completion.logprobs)} log-probs")
            logprobs[row, :length] = torch.tensor(completion.logprobs)
            mask[row, :length] = 1.0
        return cls(
            tuple(tuple(ids) for ids in prompts),
            tuple(c.token_ids for c in completions),
            logprobs,
            mask,
            _experts(prompts, completions),
        )

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """Prompt and response token ids of each sequence."""
        return [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Prompt plus response tokens of each sequence."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def response_tokens(self) -> int:
        return int(self.mask.sum())


def _experts(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> tuple[Tensor, ...] | None:
    """The completions' experts, if they have any; raises what `TokenBatch.collate` says."""
    recorded = tuple(completion.experts for completion in completions if completion.experts is not None)
    if not recorded:
        return None
    if len(recorded) != len(completions):
        raise ValueError(f"{len(recorded)} of {len(completions)} completions have experts; all of them or none must")
    for row, (prompt, completion, experts) in enumerate(zip(prompts, completions, recorded, strict=True)):
        computed = len(prompt) + len(completion.token_ids) - 1
        if len(experts) != computed:
            raise ValueError(f"completion {row}: experts for {len(experts)} of {computed} computed tokens")
    return recorded
