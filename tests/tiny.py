"""A small random model with a character tokenizer, for tests that need a real model folder."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from train.outliers import inject_outliers
from train.warmstart import character_tokenizer

WORDS = string.ascii_letters + string.digits + string.punctuation + " \n"


Family = Literal["qwen3", "qwen2", "llama", "qwen3-moe"]
FAMILIES: dict[Family, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


def tiny_model(
    *, family: Family = "qwen3", tied: bool = False, seed: int = 0, outlier_scale: int = 1, **shape: int
) -> Any:
    """A BF16 causal LM with random weights; hidden 128, two layers, and for a mixture 8 experts of which 2 are chosen,
    unless told otherwise."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer([WORDS])
    config: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
    } | (EXPERTS if family == "qwen3-moe" else {}) | shape  # fmt: skip
    config_class, model_class = FAMILIES[family]
    model = model_class(
        config_class(
            vocab_size=-(-len(tokenizer) // 32) * 32, tie_word_embeddings=tied, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **config,
        )
    )  # fmt: skip
    for parameter in model.parameters():  # buffers stay as a loaded model has them
        parameter.data = parameter.data.bfloat16()
    inject_outliers(model, outlier_scale, seed=seed)
    return model


def tiny_folder(folder: Path, **options: Any) -> Path:
    """`tiny_model` saved with its tokenizer."""
    tiny_model(**options).save_pretrained(folder)
    character_tokenizer([WORDS]).save_pretrained(folder)
    return folder
