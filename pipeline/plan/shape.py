"""A model's shapes from its config.json: transformers' own model on the meta device, no weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from eval.source import HUB_ID
from pipeline.config import ConfigError, RunConfig
from train.config import MakeConfig
from train.warmstart import blank_model

SHIPPED = Path("configs") / "recipes" / "models"
MADE_VOCABULARY = 128  # a made model has a token per character of its problems: printable ASCII, and two more, rounded


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a causal LM.

    Attributes:
        source: where the shapes come from.
        kind: transformers' model_type.
        parameters: name to shape, the module's named parameters (a tied head is the embedding's).
        layers, hidden, heads, kv_heads, head_dim, vocab: as config.json has them.
        intermediate: width of the MLP; of one expert in a mixture.
        experts, chosen: per layer, and of these per token; 0 and 0 in a dense model.
        qk_norm: whether queries and keys are normalized per head.
        tied: whether the head is the embedding.
    """

    source: str
    kind: str
    parameters: Mapping[str, tuple[int, ...]]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    experts: int
    chosen: int
    qk_norm: bool
    tied: bool

    @property
    def total(self) -> int:
        """Parameters, each once."""
        return sum(map(math.prod, self.parameters.values()))

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with: the chosen experts only, no embedding look-up, the head."""
        return sum(math.prod(shape) * self._share(name) for name, shape in self.parameters.items())

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest decoder layer."""
        sizes: dict[str, int] = {}
        for name, shape in self.parameters.items():
            if name.startswith("model.layers."):
                layer = name.split(".")[2]
                sizes[layer] = sizes.get(layer, 0) + math.prod(shape)
        return max(sizes.values())

    @property
    def outside_layers(self) -> int:
        """Parameters of embedding, last norm and head."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if not name.startswith("model.layers."))

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest single parameter."""
        return max(map(math.prod, self.parameters.values()))

    def _share(self, name: str) -> float:
        if ".experts." in name:
            return self.chosen / self.experts
        return 0.0 if name == "model.embed_tokens.weight" and not self.tied else 1.0


def meta_model(config: RunConfig, model_config: Path | None) -> tuple[str, nn.Module]:
    """Where the shapes come from, and the model on the meta device.

    Args:
        config: of the run.
        model_config: a config.json to take instead of the model's own.

    Raises:
        ConfigError: it cannot be read, is of a model that transformers does not know, or the hub cannot be reached.
    """
    make = config.model.make
    if model_config is None and make is not None:
        return "model.make", _made(make, config.train.rollout.max_model_len)
    path = model_config or _config_file(config)
    field = "--model-config" if model_config else "model.path"
    if not os.path.isfile(path):
        raise ConfigError(f"{field}: no such file: {path}")
    trust = config.model.trust_remote_code
    try:
        loaded = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with torch.device("meta"):
            return str(path), AutoModelForCausalLM.from_config(loaded, trust_remote_code=trust)
    except Exception as error:
        raise ConfigError(f"{field}: {path} is no causal LM's config.json: {type(error).__name__}: {error}") from error


def shape_of(source: str, module: Any) -> Shape:
    """The shape of a causal LM of the families that are trained here (Llama, Qwen2, Qwen3 and their mixtures)."""
    config = module.config
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters()}
    experts = int(getattr(config, "num_experts", 0) or 0)
    mixture = any(".experts." in name for name in parameters)
    return Shape(
        source=source,
        kind=config.model_type,
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        intermediate=config.moe_intermediate_size if mixture else config.intermediate_size,
        experts=experts if mixture else 0,
        chosen=config.num_experts_per_tok if mixture else 0,
        qk_norm=any(name.endswith(".q_norm.weight") for name in parameters),
        tied="lm_head.weight" not in parameters,
    )


def _made(make: MakeConfig, max_length: int) -> nn.Module:
    with torch.device("meta"):
        return blank_model(make, vocabulary=MADE_VOCABULARY, max_length=max_length)


def _config_file(config: RunConfig) -> Path:
    """The model's config.json: in its folder, or from the hub, which knows it by id."""
    name = config.model.path
    assert name is not None, "the config has a path or a model to make"
    if os.path.isdir(name):
        return Path(name) / "config.json"
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"model.path: no such folder: {name} (and not a hub id like Qwen/Qwen3-0.6B)")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    revision = config.model.revision
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))  # once; the download tries 6 times
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # the hub's, of many kinds
        shipped = SHIPPED / f"{name.rpartition('/')[2].lower()}.json"
        given = f"--model-config {shipped}" if shipped.is_file() else "--model-config FILE"
        raise ConfigError(
            f"model.path: the hub cannot give the config.json of {name!r} ({type(error).__name__}); {given} takes a "
            f"local one"
        ) from error


def config_table(module: Any) -> dict[str, Any]:
    """The shapes as config.json names them, for what is checked without torch."""
    return json.loads(module.config.to_json_string(use_diff=False))
