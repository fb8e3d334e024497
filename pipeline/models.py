"""Load what a model folder holds, the same way in every stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils.match import is_match
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import logging as hf_logging

from pipeline.config import ConfigError, RunConfig
from quant.modules import linear_modules
from quant.target import Target

LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # log-probs are ours: train/token_logprobs.py


def quiet_libraries() -> None:
    """Bars and advice of libraries that would stand between a run's lines; downloads keep their bars."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def load_tokenizer(folder: Path, config: RunConfig) -> Any:
    """Raises ConfigError: it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        raise _refused(folder, "its tokenizer", error) from error


def load_module(folder: Path, config: RunConfig) -> Any:
    """The causal LM in its checkpoint's dtype, on the GPU if there is one; from safetensors, never from a pickle.

    Raises:
        ConfigError: its files cannot be read, or lack a weight: transformers would make one up, at random.
    """
    try:
        module, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=config.train.attention,
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _refused(folder, "the model", error) from error
    made_up = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if made_up:
        raise ConfigError(
            f"model.path: {folder}: {len(made_up)} weights are missing or of another shape than config.json says, "
            f"such as {made_up[0]}"
        )
    if config.train.liger:
        apply_liger_kernel(module, LIGER)
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def _refused(folder: Path, what: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.path: {folder}: {what} cannot be loaded: {type(error).__name__}: {error}")


def target_for(folder: Path, config: RunConfig) -> Target:
    """The run's target bound to a folder's model, without loading its weights.

    Raises:
        ConfigError: an entry of `quant.ignore` matches no linear layer of the model.
    """
    trust = config.model.trust_remote_code
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=trust), trust_remote_code=trust
            )
    except Exception as error:
        raise _refused(folder, "config.json", error) from error
    linear = linear_modules(module)
    for entry in config.quant.ignore:
        if not any(is_match(name, layer, entry) for name, layer in linear.items()):
            raise ConfigError(f"quant.ignore: {entry!r} matches no linear layer, such as {next(iter(linear))}")
    return Target.for_model(config.target, module)
