"""A small random Qwen3 model with a character tokenizer, for tests that need a real model folder."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from train.outliers import inject_outliers
from train.warmstart import character_tokenizer

WORDS = string.ascii_letters + string.digits + string.punctuation + " \n"


def tiny_model(*, tied: bool = False, seed: int = 0, outlier_scale: int = 1, **shape: int) -> Qwen3ForCausalLM:
    """A BF16 Qwen3 with random weights; hidden 128, two layers unless told otherwise."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer([WORDS])
    config: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
    } | shape  # fmt: skip
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 32) * 32, tie_word_embeddings=tied, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **config,
        )
    ).bfloat16()  # fmt: skip
    inject_outliers(model, outlier_scale, seed=seed)
    return model


def tiny_folder(folder: Path, **options: Any) -> Path:
    """`tiny_model` saved with its tokenizer."""
    tiny_model(**options).save_pretrained(folder)
    character_tokenizer([WORDS]).save_pretrained(folder)
    return folder
