"""Load what a model folder holds, the same way in every stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils.match import is_match
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from pipeline.config import ConfigError, RunConfig
from quant.modules import linear_modules
from quant.target import Target


def quiet_libraries() -> None:
    """Bars and advice of libraries that would stand between a run's lines; downloads keep their bars."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def load_tokenizer(folder: Path, config: RunConfig) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)


def load_module(folder: Path, config: RunConfig) -> Any:
    """The causal LM in its checkpoint's dtype, on the GPU if there is one."""
    module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        attn_implementation=config.train.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def target_for(folder: Path, config: RunConfig) -> Target:
    """The run's target bound to a folder's model, without loading its weights.

    Raises:
        ConfigError: an entry of `quant.ignore` matches no linear layer of the model.
    """
    trust = config.model.trust_remote_code
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=trust), trust_remote_code=trust
        )
    linear = linear_modules(module)
    for entry in config.quant.ignore:
        if not any(is_match(name, layer, entry) for name, layer in linear.items()):
            raise ConfigError(f"quant.ignore: {entry!r} matches no linear layer, such as {next(iter(linear))}")
    return Target.for_model(config.target, module)
