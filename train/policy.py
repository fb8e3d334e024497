"""The policy: a BF16 module that computes, FP32 masters that learn.

What is quantized, blended and exported is always the BF16 weights that the masters stand for: their rounding, or the
merge of the adapters that they are (`train.masters`). Gradients leave the BF16 module as soon as they exist (a hook
hands them to the FP32 masters), so micro-batches accumulate in FP32 and no BF16 gradient buffer stays. Over several
ranks (`train.distributed`) module, masters, gradients and moments are sharded, and each rank computes its share of the
micro-batches; weights stay in shards, and come out whole on the first rank when it asks (`train.shards`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibrate import static_scales
from quant.errors import BoresightError
from quant.target import Target
from train.bf16_products import compute_through_fp32, native, recomputation
from train.config import TrainConfig
from train.distributed import World, place, whole
from train.fixed_shape import FixedShape, fixed_logsumexp
from train.masters import Masters, masters_of
from train.microbatches import alike, dealt
from train.records import TokenBatch
from train.routing import padded, replay, replayable_layers
from train.shards import gathered
from train.token_logprobs import token_logprobs

TOKENS_AT_ONCE = 256  # whose logits are held twice while sum_v pi(v)^2 is computed


class NonFiniteError(BoresightError):
    """A loss or gradient is not finite; raised before the optimizer step, so the weights are still good."""


@dataclass(frozen=True)
class TokenScores:
    """What the policy thinks of every sampled token, without gradient, on the CPU; 0 where the mask is 0.

    Attributes:
        logprobs: [N, T] float32, log pi(y_t), nats.
        sum_pi_squared: [N, T] float32 in (0, 1], sum_v pi(v)^2 of the distribution that y_t is drawn from.
    """

    logprobs: Tensor
    sum_pi_squared: Tensor


@dataclass(frozen=True)
class TokenStates:
    """Where the policy is when it chooses every sampled token, without gradient, on the CPU.

    Attributes:
        logprobs: [N, T] float32, log pi(y_t), nats; 0 where the mask is 0.
        states: [tokens, H] bfloat16, the last hidden state that predicts y_t; the mask's tokens row by row.
    """

    logprobs: Tensor
    states: Tensor


class Policy:
    """A causal LM being trained.

    Attributes:
        world: the ranks that it is trained by.
        device: what forward and backward run on.
        module: BF16 transformers causal LM, what forward and backward run on; sharded over the ranks.
        learned: the masters behind it: of its weights, or adapters.
        masters: name to FP32 parameter, what the optimizer updates: `learned.parameters`.
        optimizer: AdamW over the masters.
        fixed: the one shape of every forward pass, where rollouts come from the exact engine; else None.

    Raises:
        RoutingError: routing replay was asked for and this model's routing cannot be replayed.
        LoraError: `train.lora.modules` names what cannot be adapted in this model.
    """

    def __init__(self, module: Any, config: TrainConfig, *, seed: int = 0, world: World | None = None) -> None:
        """Take over a module as it was loaded.

        Args:
            module: a causal LM, in its checkpoint's dtype.
            config: the `[train]` table.
            seed: what new adapters are drawn from.
            world: the ranks; None is this process alone.
        """
        self.config = config
        self.world = world or World()
        self.device: torch.device = module.device
        self.fixed = FixedShape.of(config) if config.rollout.engine == "exact" else None
        if config.rollout.routing_replay:
            replayable_layers(module)  # refused now rather than in the first step
        self.world.shard(module, cpu_offload=config.distributed.cpu_offload)
        self.learned: Masters = masters_of(module, config, seed=seed)
        self.masters = self.learned.parameters
        for parameter in module.parameters():  # not its buffers: rotary frequencies in BF16 are wrong by whole turns
            if self.world.size == 1:
                parameter.data = parameter.data.to(torch.bfloat16)
            else:
                parameter.detach().copy_(parameter.detach().to(torch.bfloat16))  # BF16 values, see World.shard
        self.module = module
        checkpointing: dict[str, Any] = {"use_reentrant": False}
        if not native(self.device):
            compute_through_fp32(module)
            checkpointing["context_fn"] = recomputation
        self.module.eval()  # no dropout: old and new log-probs must come from one function
        if config.gradient_checkpointing:
            self.module.gradient_checkpointing_enable(checkpointing)
            self.module.train()
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.learned.trained)
            if parameter.requires_grad:
                _hand_over(parameter, name, self.learned)

    def weights(self) -> dict[str, Tensor]:
        """The BF16 weights that the masters stand for, in shards over several ranks: the model that is quantized and
        exported."""
        return self.learned.weights()

    def whole_weights(self) -> Mapping[str, Tensor]:
        """`weights` in one piece on the first rank, nothing on the others; all ranks must ask at the same time."""
        return gathered(self.weights(), self.world, self.device)

    @torch.no_grad()
    def run_at(self, weights: Mapping[str, Tensor]) -> None:
        """Make forward and backward run at these BF16 weights; gradients still go to the masters."""
        for name, parameter in self.module.named_parameters():
            place(parameter, weights[name])

    def microbatches(self, batch: TokenBatch, rows: Sequence[int]) -> Iterator[list[int]]:
        """This rank's share of the rows, in micro-batches of at most `microbatch_tokens` padded tokens.

        Rows of a micro-batch are alike in length. A row longer than the budget gets a micro-batch of its own. In a
        fixed shape rows keep their order. Every rank gets as many micro-batches as the others; an empty one must go
        through forward and backward too.
        """
        if self.fixed is not None:
            return self.fixed.groups(rows)
        lengths = batch.lengths
        runs = list(alike(rows, lengths, self.config.microbatch_tokens))
        return iter(dealt(runs, lengths, rank=self.world.rank, size=self.world.size))

    def logprobs(self, batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        """log pi(y_t) of the sampled tokens under the weights the module runs at, after temperature.

        Where the batch has the engine's experts, the tokens are routed to these.

        Args:
            batch: the step's N sequences.
            rows: n of them.

        Returns:
            [n, T] float32, nats, with gradient unless disabled; 0 where the mask is 0.
        """
        if self.fixed is None:
            logits, labels, where, _ = self._token_logits(batch, rows)
            values = token_logprobs(logits, labels, self.config.rollout.temperature)
        else:
            chosen, labels, where, _ = self._response_logits(batch, rows)
            values = chosen.gather(1, labels[:, None]).squeeze(1) - self._normalizer(chosen)
        return torch.zeros(len(rows), batch.mask.shape[1], device=self.device).index_put(where, values)

    def token_logits(self, batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        """What the module says at every response token, before temperature.

        Args:
            batch: the step's N sequences.
            rows: some of them, few enough for [tokens, V].

        Returns:
            [tokens, V] in the module's dtype, with gradient unless disabled; tokens in the rows' order, padding left
            out.
        """
        return self._token_logits(batch, rows)[0]

    def _normalizer(self, chosen: Tensor) -> Tensor:
        """log sum exp [tokens] of logits [tokens, V]."""
        return chosen.logsumexp(1) if self.fixed is None else fixed_logsumexp(chosen)

    def _response_logits(
        self, batch: TokenBatch, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`_token_logits` with the logits after temperature, float32."""
        logits, labels, tokens, predicting = self._token_logits(batch, rows)
        return logits.float() / self.config.rollout.temperature, labels, tokens, predicting

    def _token_logits(
        self, batch: TokenBatch, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The forward pass, kept where it predicts a response token.

        Returns:
            Logits as the module gives them [tokens, V], the sampled token ids [tokens], both indices of these tokens
            in [n, T], and those of what predicts them in the head's input.
        """
        mask = batch.mask[list(rows)].bool().to(self.device)
        rows = rows or [0]  # an empty share takes part with a row that does not count
        prompts = [len(batch.prompts[row]) for row in rows]
        sequences = [batch.prompts[row] + batch.responses[row] for row in rows]
        # logits at position i predict token i + 1: keep the positions that predict any row's response
        first = min(prompts) - 1 if self.fixed is None else 0
        if self.fixed is None:
            ids, logits = self._forward(sequences, first, [batch.experts[row] for row in rows] if batch.experts else [])
        else:
            ids, logits = self.fixed.forward(self.module, sequences)
        row, token = mask.nonzero(as_tuple=True)
        position = torch.tensor(prompts, device=self.device)[row] - 1 + token
        return logits[row, position - first], ids[row, position + 1], (row, token), (row, position - first)

    def _forward(
        self, sequences: Sequence[Sequence[int]], first: int, experts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Token ids [n, longest] and the logits [n, longest - 1 - first, V] from position `first` on.

        Routes the tokens to the given experts, one record per sequence; to the router's own where there are none.
        """
        ids, attention = self._padded(sequences)
        longest = ids.shape[1]
        kept = torch.arange(first, longest - 1, device=self.device)
        with replay(self.module, padded(experts, longest)) if experts else nullcontext():
            logits = self.module(input_ids=ids, attention_mask=attention, logits_to_keep=kept, use_cache=False).logits
        return ids, logits

    @torch.no_grad()
    def all_logprobs(self, batch: TokenBatch, rows: Sequence[int] | None = None) -> Tensor:
        """`logprobs` micro-batch by micro-batch, without gradient.

        Args:
            batch: the step's N sequences.
            rows: which to compute; None is all.

        Returns:
            [N, T] float32 on the CPU; 0 in the rows that were not asked for.
        """
        out = torch.zeros_like(batch.mask)
        for micro in self.microbatches(batch, range(len(batch.prompts)) if rows is None else rows):
            out[micro] = self.logprobs(batch, micro).cpu()
        return self.world.sum_(out)

    @torch.no_grad()
    def all_scores(self, batch: TokenBatch) -> TokenScores:
        """`all_logprobs` of every row, and from the same forward passes sum_v pi(v)^2.

        The sum is exp(logsumexp(2 z) - 2 logsumexp(z)), a few tokens at a time.
        """
        logprobs, squares = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
        for micro in self.microbatches(batch, range(len(batch.prompts))):
            chosen, labels, (row, token), _ = self._response_logits(batch, micro)
            normalizer = self._normalizer(chosen)
            collisions = torch.cat([(2 * part).logsumexp(1) for part in chosen.split(TOKENS_AT_ONCE)])
            where = (torch.tensor(micro)[row.cpu()], token.cpu())
            logprobs[where] = (chosen.gather(1, labels[:, None]).squeeze(1) - normalizer).cpu()
            squares[where] = (collisions - 2 * normalizer).exp().cpu()
        return TokenScores(self.world.sum_(logprobs), self.world.sum_(squares))

    @torch.no_grad()
    def all_states(self, batch: TokenBatch) -> TokenStates:
        """`all_logprobs` of every row, and from the same forward passes the hidden states that the head reads there."""
        logprobs = torch.zeros_like(batch.mask)
        states = torch.empty(batch.response_tokens, self.module.config.hidden_size, dtype=torch.bfloat16)
        place = batch.mask.long().flatten().cumsum(0).view_as(batch.mask) - 1  # of the mask's tokens, row by row
        for micro in self.microbatches(batch, range(len(batch.prompts))):
            with _head_inputs(self.module) as hidden:
                chosen, labels, (row, token), predicting = self._response_logits(batch, micro)
            where = (torch.tensor(micro)[row.cpu()], token.cpu())
            logprobs[where] = (chosen.gather(1, labels[:, None]).squeeze(1) - self._normalizer(chosen)).cpu()
            states[place[where]] = hidden[0][predicting].cpu()
        return TokenStates(logprobs, states)

    def static_scales(self, target: Target, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The target's calibrated scales at the present BF16 weights, from these sequences' activations.

        Leaves the module at the BF16 weights.
        """
        self.run_at(self.weights())
        lengths = [len(sequence) for sequence in sequences]
        batches = (
            self._padded([sequences[row] for row in rows])
            for rows in alike(range(len(sequences)), lengths, self.config.microbatch_tokens)
        )
        return static_scales(self.module, target, batches)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both [n, longest] int64, padded on the right."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        attention = torch.zeros(len(sequences), longest, dtype=torch.long)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            attention[i, : len(sequence)] = 1
        return ids.to(self.device), attention.to(self.device)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the updates that follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def update(self) -> float:
        """Clip the accumulated gradient, step, clear.

        Returns:
            The gradient's norm before clipping.

        Raises:
            NonFiniteError: the norm is NaN or infinite; the masters are untouched.
        """
        gradients = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        total = whole(nn.utils.get_total_norm(gradients.values()))
        norm = total.item()
        if not math.isfinite(norm):
            wrong = [name for name, gradient in gradients.items() if not whole(gradient).isfinite().all()]
            raise NonFiniteError(
                f"gradient norm is {norm}, not finite in {len(wrong)} of {len(gradients)} weights"
                f"{' from ' + wrong[0] if wrong else ''} on; the optimizer was not stepped"
            )
        nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.max_grad_norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


@contextmanager
def _head_inputs(module: Any) -> Iterator[list[Tensor]]:
    """What the language-model head gets in the forward passes inside, each [n, kept positions, H]."""
    inputs: list[Tensor] = []
    handle = module.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _hand_over(parameter: nn.Parameter, name: str, learned: Masters) -> None:
    """Move the parameter's BF16 gradient into the FP32 masters as soon as backward has made it."""

    def move(p: Tensor) -> None:
        assert p.grad is not None
        learned.accumulate(name, p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(move)
