"""The zero-mismatch engine: rollouts from the trainer's own model, whose log-probs the trainer reproduces bit for bit.

For diagnosis: with a discrepancy of exactly 0 on every token, whatever else goes wrong in a run has another cause
(VeXact, arXiv 2605.14220). There is one model definition, one set of kernels and one shape (`train.fixed_shape`), so a
log-prob is the same number when its token is drawn and when the trainer computes it. No key-value cache: every token
costs a forward pass over the full width.

It serves BF16 weights only: a quantized kernel cannot equal the BF16 trainer bit for bit, so `rollout.target` is
refused by the config, and by the sync too, which finds no quantized kernel here. Left out: routing replay, which has
nothing to replay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from random import Random
from typing import Any

import torch
from torch import Tensor

from quant.errors import BoresightError
from quant.modules import matrices
from quant.verify import fingerprint
from train.config import RolloutConfig
from train.fixed_shape import FixedShape, fixed_logsumexp
from train.policy import Policy
from train.records import Completion
from train.rollout import EngineWeights


class ExactEngineError(BoresightError):
    """The exact engine was given weights that are not its model's, or a prompt that leaves no room for a response."""


class ExactEngine:
    """A BF16 copy of the policy's module that is sampled from in the trainer's own shape.

    A copy, so that a sync is as real as with another engine: what was not sent is not held.
    """

    def __init__(self, policy: Policy, ends: Collection[int]) -> None:
        """Copy the policy's module.

        Args:
            policy: one whose config asks for the exact engine.
            ends: token ids that end a response.
        """
        if policy.fixed is None:
            raise ExactEngineError("the policy computes in shapes of its own: its train.rollout.engine is not 'exact'")
        self.config: RolloutConfig = policy.config.rollout
        self.version = 0
        self._shape: FixedShape = policy.fixed
        self._module: Any = deepcopy(policy.module).requires_grad_(False)
        self._ends = frozenset(ends)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See RolloutEngine. Nothing is derived from the weights, so nothing has to be forgotten.

        Raises:
            ExactEngineError: a tensor that the model does not have, by name or shape.
        """
        held = self._weights()
        for name, tensor in tensors.items():
            if name not in held or held[name].shape != tensor.shape:
                raise ExactEngineError(f"the exact engine's model has no weight {name} {list(tensor.shape)}")
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
        self.version += 1

    def read_back(self) -> EngineWeights:
        """See RolloutEngine. The kernels read the parameters themselves: nothing is packed, so these are hashed.

        A kernel's name is its module's class.
        """
        weights = self._weights()
        kernels = {name.removesuffix(".weight"): self._owner(name) for name in weights if name.endswith(".weight")}
        return EngineWeights({name: fingerprint(weight) for name, weight in weights.items()}, kernels)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """See RolloutEngine.

        Raises:
            ExactEngineError: prompt and `max_tokens` exceed `max_model_len`.
        """
        size = self.config.group_size
        longest = max(map(len, prompts))
        if longest + self.config.max_tokens > self._shape.width:
            raise ExactEngineError(
                f"a prompt of {longest} tokens and max_tokens ({self.config.max_tokens}) exceed max_model_len "
                f"({self._shape.width})"
            )
        rows = [list(prompt) for prompt in prompts for _ in range(size)]
        chances = [Random(seed * size + g) for seed in seeds for g in range(size)]  # all bits of the seed count
        completions: list[Completion] = []
        for group in self._shape.groups(range(len(rows))):
            completions += self._sample([rows[i] for i in group], [chances[i] for i in group])
        return [completions[start : start + size] for start in range(0, len(rows), size)]

    def metrics(self) -> dict[str, float]:
        """See RolloutEngine; nothing."""
        return {}

    def _sample(self, sequences: list[list[int]], chances: Sequence[Random]) -> list[Completion]:
        """Extend at most `rows` prompts, in place, each by its own random numbers."""
        starts = [len(sequence) for sequence in sequences]
        logprobs: list[list[float]] = [[] for _ in sequences]
        reasons = ["length"] * len(sequences)
        live = list(range(len(sequences)))
        for _ in range(self.config.max_tokens):
            _, logits = self._shape.forward(self._module, sequences)
            last = [len(sequences[row]) - 1 for row in live]
            chosen = logits[live, last].float() / self.config.temperature
            distributions = (chosen - fixed_logsumexp(chosen)[:, None]).cpu()
            for row, distribution in zip(live, distributions, strict=True):
                token = _draw(distribution, chances[row].random())
                sequences[row].append(token)
                logprobs[row].append(distribution[token].item())
                if token in self._ends and not self.config.ignore_eos:
                    reasons[row] = "stop"
            live = [row for row in live if reasons[row] != "stop"]
            if not live:
                break
        return [
            Completion(tuple(sequence[start:]), tuple(values), reason, version=self.version)
            for sequence, start, values, reason in zip(sequences, starts, logprobs, reasons, strict=True)
        ]

    def _weights(self) -> dict[str, Tensor]:
        """The parameters by checkpoint name, as views; a tied head under both names."""
        parameters = self._module.named_parameters(remove_duplicate=False)
        return {part: view for name, parameter in parameters for part, view in matrices(name, parameter.detach())}

    def _owner(self, name: str) -> str:
        """The class of the module that multiplies with a checkpoint tensor."""
        path = name.partition(".experts.")[0] + ".experts" if ".experts." in name else name.rpartition(".")[0]
        return type(self._module.get_submodule(path)).__name__


def end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a response: the tokenizer's, and those of the model's generation config."""
    configured = module.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *several] if token is not None)


def _draw(logprobs: Tensor, chance: float) -> int:
    """The token at which the cumulative probability first exceeds a chance in [0, 1).

    Args:
        logprobs: [V], on the CPU.
        chance: uniform.
    """
    cumulative = logprobs.double().exp().cumsum(0)
    return int(torch.searchsorted(cumulative, chance * cumulative[-1], right=True))
