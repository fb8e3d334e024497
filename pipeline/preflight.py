"""What can be known before any minute of work, without torch: `boresight check`, and the first thing `run` does."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from eval.source import HUB_ID
from eval.suite import SuiteError
from pipeline.config import ConfigError, RunConfig
from pipeline.evaluation import evaluation_suite
from quant.config import TargetError, TargetSpec
from quant.hardware import Device, detect_device, unread_reason, unsupported_reason, visible_gpus
from quant.recipes import recipe_refusal
from quant.server_process import KEY_VARIABLE
from quant.tables import LARGEST_INTEGER, ParseError, parse_json, read_json_object, shown

EXPERT = "model.layers.0.mlp.experts.0.gate_proj"
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe")
# of config.json: what is computed with here
SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "head_dim",
         "max_position_embeddings")  # fmt: skip


def preflight(config: RunConfig, device: Device | None = None) -> tuple[TargetSpec, Device]:
    """Refuse what cannot work: hardware, model folder, shapes against the target, data, grader.

    Args:
        config: of the run.
        device: where it is to run; None is this machine.

    Returns:
        The target and the device it will run on.

    Raises:
        ConfigError: one line naming the field or file, what was given, and what is allowed.
    """
    elsewhere, device = device is not None, device or detect_device()
    if config.train.rollout.batch_invariant and device.kind == "cpu":
        raise ConfigError("train.rollout.batch_invariant: needs a GPU, vLLM has no such kernels on a CPU")
    if config.train.distributed.cpu_offload and device.kind == "cpu":
        raise ConfigError("train.distributed.cpu_offload: needs a GPU, everything is in the host's memory already")
    if config.train.liger and device.kind == "cpu":
        raise ConfigError("train.liger: needs a GPU, its kernels are Triton's")
    if config.train.liger and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "train.liger: 'liger_kernel' is not installed; pip install liger-kernel, or set liger = false"
        )
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name!r} is not installed; pip install {name}, or leave it out")
    if config.train.rollout.sleep and device.kind == "cpu":
        raise ConfigError("train.rollout.sleep: needs a GPU, on a CPU there is no other memory to sleep in")
    _check_servers(config, None if elsewhere else len(visible_gpus()))
    spread = config.train.rollout.servers is not None and config.train.rollout.servers.expert_parallel
    if spread and device.kind == "cpu":
        raise ConfigError("train.rollout.servers.expert_parallel: needs GPUs, vLLM's CPU kernel wants all experts")
    try:
        evaluation_suite(config, Path())
    except SuiteError as error:
        raise ConfigError(f"eval.suite: {error}") from error
    source, shape = _model_shape(config)
    spec = check_target(config, device, source, shape)
    if spread and shape and not _experts(shape):
        raise ConfigError(f"train.rollout.servers.expert_parallel: {source} is no mixture of experts")
    if config.train.distributed.ranks > 1 and spec.calibrated:
        raise ConfigError(
            f"train.distributed: {spec.name} has static scales, which are calibrated in one process only; set "
            f"processes = 1 and nodes = 1, or choose a target with dynamic ones"
        )
    _check_task(config)
    arm = config.signoff.baseline_arm
    if arm is not None and not os.path.isfile(arm):
        raise ConfigError(f"signoff.baseline_arm: no such file: {arm}")
    return spec, device


def check_target(config: RunConfig, device: Device, source: str, shape: dict[str, Any]) -> TargetSpec:
    """Refuse a target that the device, the model or the rollouts cannot have.

    Args:
        config: of the run.
        device: where it is to run.
        source: where the shape is from, for the message.
        shape: as config.json names it; empty for an unseen model.

    Raises:
        ConfigError: one line.
    """
    try:
        spec = config.target
    except TargetError as error:
        raise ConfigError(f"quant.target: {error}") from error
    if config.train.rollout.routing_replay and shape and not _experts(shape):
        raise ConfigError(f"train.rollout.routing_replay: {source} is no mixture of experts, there is no routing")
    experts = _experts(shape) > 0 and not spec.keeps(EXPERT)
    reason = unsupported_reason(spec, device, experts=experts)
    if reason is not None:
        raise ConfigError(f"quant.target: {reason}")
    unread = unread_reason(spec, device, experts=experts)
    if config.train.rollout.target and unread is not None:
        instead = "keep the experts in BF16 with quant.ignore" if spec.read_back and experts else "int8"
        raise ConfigError(
            f"quant.target: rollouts from {spec.name} could not be verified, {unread} cannot be read back exactly "
            f"yet; train against fp8-dynamic or {instead}, or from BF16 with train.rollout.target = false"
        )
    if config.quant.recipe is not None and (refusal := recipe_refusal(config.quant.recipe, spec)) is not None:
        raise ConfigError(f"quant.recipe: {refusal}")
    _check_widths(spec, source, _widths(spec, shape))
    return spec


def _check_servers(config: RunConfig, gpus: int | None) -> None:
    """Of `gpus` GPUs; None where they are another machine's, and not counted."""
    servers = config.train.rollout.servers
    if servers is None:
        return
    needed = servers.count * servers.gpus
    if servers.urls and not os.environ.get(KEY_VARIABLE):
        raise ConfigError(f"train.rollout.servers.urls: the servers' key must be in {KEY_VARIABLE}, which is not set")
    if not servers.urls and gpus is not None and 0 < gpus < needed:
        raise ConfigError(
            f"train.rollout.servers: count * tensor_parallel * data_parallel is {needed}, this process sees {gpus} GPUs"
        )


def _model_shape(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Where the model's shape comes from, and the shape as config.json names it; empty for an unseen hub id."""
    make = config.model.make
    if make is not None:
        shape = {
            "hidden_size": make.hidden_size,
            "intermediate_size": make.intermediate_size,
            "num_attention_heads": make.heads,
            "head_dim": make.head_dim,
            "num_experts": make.experts,
        }
        return "model.make", shape
    assert config.model.path is not None
    folder = Path(config.model.path)
    if not os.path.exists(folder):  # unlike Path's, False for a name that is too long too
        if HUB_ID.fullmatch(config.model.path):
            return config.model.path, {}  # a hub id: its shapes are checked once it is here, before training
        raise ConfigError(f"model.path: no such folder: {config.model.path} (and not a hub id like Qwen/Qwen3-0.6B)")
    for pattern, what in (
        ("config.json", "config.json"),
        ("*.safetensors", "safetensors weights"),
        ("tokenizer*", "tokenizer"),
    ):
        if not any(path.is_file() for path in folder.glob(pattern)):
            raise ConfigError(f"model.path: {folder} has no {what}")
    source = folder / "config.json"
    try:
        shape = read_json_object(source)
    except ParseError as error:
        raise ConfigError(f"model.path: {source} {error}") from error
    for key, value in shape.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INTEGER
        if (key in SIZES or key.endswith("_experts")) and value is not None and not whole:
            raise ConfigError(f"model.path: {source} has {key} = {shown(value)}, not a whole number")
    if "quantization_config" in shape:
        raise ConfigError(f"model.path: {folder} is quantized already; give the BF16 model")
    if _experts(shape) and shape.get("model_type") not in MOE_FAMILIES:
        raise ConfigError(
            f"model.path: {folder} is a mixture of experts of type {shape.get('model_type')!r}; "
            f"supported are {', '.join(MOE_FAMILIES)}"
        )
    limit = shape.get("max_position_embeddings")
    length = config.train.rollout.max_model_len
    if limit is not None and length > limit:
        raise ConfigError(f"train.rollout.max_model_len: {length} is over the model's {limit} positions")
    return str(source), shape


def _experts(shape: dict[str, Any]) -> int:
    """Experts per layer; 0 for a dense model."""
    counts = [value for key, value in shape.items() if key.endswith("_experts") and isinstance(value, int)]
    return max(counts, default=0)


def _widths(spec: TargetSpec, shape: dict[str, Any]) -> dict[str, int]:
    """Input widths of the linear layers that the target quantizes."""
    dense = not _experts(shape)
    names = ("hidden_size", "intermediate_size" if dense else "moe_intermediate_size")
    widths = {key: shape[key] for key in names if isinstance(shape.get(key), int)}
    if spec.keeps(EXPERT) and not dense:
        widths.pop("moe_intermediate_size", None)
    heads = shape.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0 and "hidden_size" in widths:
        widths["heads * head_dim"] = heads * (shape.get("head_dim") or shape["hidden_size"] // heads)
    return widths


def _check_widths(spec: TargetSpec, source: str, widths: dict[str, int]) -> None:
    for name, width in widths.items():
        if width % spec.width_multiple:
            raise ConfigError(
                f"quant.target: {spec.name} needs input widths that are multiples of {spec.width_multiple}; "
                f"{source} has {name} = {width}"
            )


def _check_task(config: RunConfig) -> None:
    task = config.train.task
    if task.source == "jsonl":
        for field, name in (("name", task.name), ("heldout_name", task.heldout_name)):
            if name is None:
                continue
            path = Path(name)
            if not os.path.isfile(path):
                raise ConfigError(f"train.task.{field}: no such JSONL file: {name}")
            rows = [line for line in path.read_bytes().splitlines() if line.strip()]
            if not rows:
                raise ConfigError(f"train.task.{field}: {name} is empty")
            try:
                row = parse_json(rows[0])
            except ParseError as error:
                raise ConfigError(f"train.task.{field}: {name}, first line is not JSON: {error}") from error
            if not isinstance(row, dict) or task.answer_field not in row:
                raise ConfigError(
                    f"train.task.answer_field: {name} has no field {task.answer_field!r}; "
                    f"it has {sorted(row) if isinstance(row, dict) else type(row).__name__}"
                )
            try:
                task.prompt.format_map(row)
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"train.task.prompt: {task.prompt!r} cannot be filled from {name}: {error}; it has {sorted(row)}"
                ) from error
            if field == "name" and task.heldout_name is None and len(rows) <= task.heldout_size:
                raise ConfigError(
                    f"train.task.heldout_size: {task.heldout_size} held-out problems cannot be split off the "
                    f"{len(rows)} rows of {name}"
                )
    elif task.source == "reasoning-gym" and importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("train.task.source: reasoning-gym is not installed")
    make = config.model.make
    solution = make.solution if make else None
    for field, reference in (("train.task.grader", task.grader), ("model.make.solution", solution)):
        if reference is not None and ":" in reference:
            _check_module(field, reference.partition(":")[0])


def _check_module(field: str, name: str) -> None:
    """Refuse a module that is not there, without running any of its code or its packages': that may import torch."""
    path: list[str] | None = None  # of the package so far; at the top, sys.path and what else can be imported
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ".".join(parts[:depth])
        try:
            spec = importlib.util.find_spec(module) if path is None else PathFinder.find_spec(module, path)
        except (ImportError, ValueError):  # an empty name; the program that runs, which has no file to find
            spec = None
        if spec is None:
            raise ConfigError(f"{field}: cannot find module {module!r}")
        path = list(spec.submodule_search_locations or [])
