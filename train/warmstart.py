"""Make a small model with a middling accuracy, for demos and tests where no model can be downloaded.

A Qwen3 (or Qwen3-MoE) causal LM with a character tokenizer, trained from random init on worked solutions until its
sampled accuracy on unseen problems reaches a goal, then given outlier channels (`train.outliers`). With a user's own
model none of this runs.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quant.errors import BoresightError
from train.bf16_products import native
from train.config import MakeConfig
from train.grading import failures_allowed
from train.outliers import inject_outliers
from train.records import Problem
from train.tasks import Task

PAD, EOS = "<pad>", "<eos>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
CHECK_EVERY = 25
CHECK_PROBLEMS = 512
MAX_FAILED = 0.5  # share of a check that may fail to be graded


class WarmstartError(BoresightError):
    """The model did not reach its accuracy goal."""


@dataclass(frozen=True)
class Made:
    """A made model.

    Attributes:
        parameters: how many.
        sampled_accuracy: share of held-out problems solved by one sample at T = 1, before outliers; None if untrained.
        steps: supervised steps taken.
    """

    parameters: int
    sampled_accuracy: float | None
    steps: int


def make_model(
    config: MakeConfig,
    task: Task,
    out: Path,
    *,
    max_length: int,
    seed: int,
    solution: Callable[[Problem], str] | None,
    progress: Callable[[int, float], None] = lambda step, accuracy: None,
) -> Made:
    """Make, warm-start and save a BF16 model folder.

    Args:
        config: shapes, accuracy goal, outlier strength.
        task: its training problems are imitated, its held-out ones checked.
        out: the folder to write.
        max_length: longest prompt plus response, tokens.
        seed: of weights, batches, samples and outlier channels.
        solution: worked solution of a problem, what is imitated; may be None when `config.accuracy` is 0.
        progress: called with (step, sampled accuracy) at every check.

    Raises:
        WarmstartError: the goal was not reached in `config.max_steps`.
        TaskError: the grader failed on most samples of a check.
    """
    torch.manual_seed(seed)
    texts = [problem.prompt + (solution(problem) if solution else problem.answer) for problem in task.train]
    tokenizer = character_tokenizer(texts)
    model = blank_model(
        config,
        vocabulary=-(-len(tokenizer) // 32) * 32,
        max_length=max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.set_attn_implementation("eager")  # faster than sdpa in BF16 on a CPU
    steps, accuracy = 0, None
    if config.accuracy > 0:
        assert solution is not None, "the config refuses an accuracy goal without a solution to imitate"
        steps, accuracy = _imitate(model, tokenizer, task, solution, config, seed, progress)
    model = model.to(torch.bfloat16)
    inject_outliers(model, config.outlier_scale, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Made(sum(p.numel() for p in model.parameters()), accuracy, steps)


def blank_model(config: MakeConfig, *, vocabulary: int, max_length: int, **tokens: int | None) -> Any:
    """A model with random weights; Any, because transformers' annotations do not cover its decorated methods.

    Args:
        config: shapes.
        vocabulary: token ids.
        max_length: longest prompt plus response, tokens.
        tokens: ids of the special tokens, as transformers' config names them.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max(64, 1 << (max_length - 1).bit_length()),
        "tie_word_embeddings": config.tie_word_embeddings,
        **tokens,
    }
    if config.experts:
        mixture = {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": True,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **mixture))
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per character that occurs in the texts, and per digit."""
    characters = sorted(set("".join(texts)) | set(string.digits))
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=PAD))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _imitate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    solution: Callable[[Problem], str],
    config: MakeConfig,
    seed: int,
    progress: Callable[[int, float], None],
) -> tuple[int, float]:
    """Supervised steps until the accuracy goal, in BF16 autocast where that is fast; returns (steps, accuracy)."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    encoded = [
        (tokenizer.encode(problem.prompt), [*tokenizer.encode(solution(problem)), tokenizer.eos_token_id])
        for problem in task.train
    ]
    checked = rng.sample(task.heldout, min(CHECK_PROBLEMS, len(task.heldout)))
    warmup = 50
    accuracy = 0.0
    for step in range(1, config.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / warmup)
        ids, labels = _supervised_batch(rng.sample(encoded, min(config.batch_size, len(encoded))))
        with torch.autocast("cpu", torch.bfloat16, enabled=native(model.device)):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0:
            accuracy = _sampled_accuracy(model, tokenizer, checked, task)
            progress(step, accuracy)
            if accuracy >= config.accuracy:
                return step, accuracy
    raise WarmstartError(
        f"warm start reached {accuracy:.3f} sampled accuracy in {config.max_steps} steps, goal {config.accuracy}; "
        f"raise model.make.max_steps or lower model.make.accuracy"
    )


def _supervised_batch(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels [B, L]; -100 (ignored) on prompts and padding."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels = torch.full((len(pairs), longest), -100)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels


@torch.no_grad()
def _sampled_accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], task: Task) -> float:
    """Mean reward of one sample per problem at T = 1, over those that could be graded."""
    tokenizer.padding_side = "left"
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=native(model.device)):
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=32,
        )  # fmt: skip
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = list(zip(problems, texts, strict=True))
    grades = task.grade(answers, failures_allowed(MAX_FAILED, [], len(answers)))
    return fmean(grade.reward for grade in grades if grade.reward is not None)


def products_by_digit(problem: Problem) -> str:
    """Worked solution of a two-digit product: `47*85=` is continued as `3760+0235=3995`."""
    left, right = (int(factor) for factor in str(problem.fields["expression"]).split("*"))
    tens, units = left * (right // 10 * 10), left * (right % 10)
    return f"{tens:04d}+{units:04d}={left * right}"
