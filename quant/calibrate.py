"""What only data can give: static scales of activations and KV cache, and exports by calibrated recipes.

Scales are cheap enough to refresh while a policy trains, so they are computed here, on the trainer's own model, with
compressed-tensors' arithmetic. Recipes are llm-compressor's and run once, on a finished BF16 folder; it is imported
here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils import patch_attr
from torch import Tensor, nn
from transformers import DynamicCache

from quant.config import TargetError
from quant.errors import BoresightError
from quant.export import publish, read_tensors
from quant.recipes import Recipe, recipe_refusal
from quant.target import KV_ARGS, Target
from quant.verify import VerificationError, digests


class CalibrationError(BoresightError, ValueError):
    """The calibration data is missing, or the model computes no finite activations on it."""


def static_scales(model: Any, target: Target, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Calibrated scales from the largest magnitudes that a model's real tokens show.

    The same numbers as llm-compressor's `static_minmax` observer: its pipeline "basic", in which every layer is
    calibrated on the BF16 model's activations. They are those of the weights the model holds.

    Args:
        model: transformers causal LM in BF16; its mode and hooks are as before afterwards.
        target: bound to this model.
        batches: (token ids [n, L], attention mask [n, L]) pairs, right padded; any number, seen once.

    Returns:
        The tensors [1] named by `target.static_scales`: `M.input_scale`, `A.k_scale` and `A.v_scale` BF16 (largest
        |x|, |k| after rotary embedding, |v|, each over 448), `M.input_global_scale` FP32 (2688 over the largest |x|).
        An expert that no token was routed to gets the largest of its layer, which vLLM's FP8 experts share anyway.

    Raises:
        CalibrationError: no real token, or an activation that is not finite.
    """
    if not target.static_scales:
        return {}
    inputs = target.scheme.input_activations
    maxima = Maxima()
    with _observed(model, target, maxima) as cache, _evaluation(model), torch.no_grad():
        for ids, mask in batches:
            maxima.mask = mask.bool().to(model.device)
            if maxima.mask.any():
                model(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), past_key_values=cache,
                    use_cache=False, logits_to_keep=1,
                )  # fmt: skip
    if not maxima.largest:
        raise CalibrationError("calibration has no tokens: every batch is empty or all padding")
    scales = {}
    for name in sorted(target.static_scales):
        largest = maxima.largest.get(name)
        if largest is None:
            largest = maxima.largest[re.sub(r"\.experts\.\d+\.", ".experts.*.", name)]
        if not largest.isfinite().all():
            raise CalibrationError(f"{name}: the largest calibrated magnitude is {largest.item()}")
        if name.endswith(".input_global_scale"):
            scales[name] = generate_gparam(-largest, largest)
        else:
            args = inputs if name.endswith(".input_scale") else KV_ARGS
            assert args is not None
            scales[name] = calculate_qparams(-largest, largest, args)[0]
    return scales


class Maxima:
    """Running largest magnitudes over real tokens.

    Attributes:
        mask: [n, L] of the current batch, true for real tokens.
        largest: tensor name to [1], in the dtype observed.
    """

    mask: Tensor

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, name: str, values: Tensor) -> None:
        """Take in values [n, L, ...] of every token of the batch."""
        self.see_real(name, values[self.mask])

    def see_real(self, name: str, values: Tensor) -> None:
        """Take in values of real tokens alone, in any shape but empty."""
        low, high = values.aminmax()
        largest = torch.maximum(high, -low).reshape(1)
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest


class ObservedCache(DynamicCache):
    """A KV cache that stores nothing and shows each layer's new keys and values to `maxima`."""

    def __init__(self, maxima: Maxima, names: dict[int, str]) -> None:
        super().__init__()
        self.maxima, self.names = maxima, names

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys after rotary embedding and values, [n, heads, L, width] each, back as they came."""
        if layer_idx in self.names:
            self.maxima.see(f"{self.names[layer_idx]}.k_scale", key_states.transpose(1, 2))
            self.maxima.see(f"{self.names[layer_idx]}.v_scale", value_states.transpose(1, 2))
        return key_states, value_states


@contextmanager
def _observed(model: nn.Module, target: Target, maxima: Maxima) -> Iterator[ObservedCache | None]:
    """Hooks on what `target.static_scales` names, removed at the end; the cache to run with, if one is observed."""
    by_module = {name.rpartition(".")[0]: name for name in target.static_scales if ".input_" in name}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in by_module:
                hook: Callable[..., None] = _linear_hook(by_module[name], maxima)
            elif any(f"{name}.0.{part}" in by_module for part in ("gate_proj", "down_proj")):
                leaf = next(iter(by_module.values())).rpartition(".")[2]
                hook = _experts_hook(name, leaf, maxima)
            else:
                continue
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        layers = {int(model.get_submodule(name).layer_idx): name for name in target.attentions}  # type: ignore[arg-type]
        yield ObservedCache(maxima, layers) if layers else None


def _linear_hook(name: str, maxima: Maxima) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        maxima.see(name, args[0])

    return hook


def _experts_hook(experts: str, leaf: str, maxima: Maxima) -> Callable[..., None]:
    """Stacked experts compute inside one module: each one's inputs are worked out again from the routing."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        hidden, chosen = args[0][maxima.mask.flatten()], args[1][maxima.mask.flatten()]
        for expert in chosen.unique().tolist():
            tokens = hidden[(chosen == expert).any(1)]
            gate, up = nn.functional.linear(tokens, module.gate_up_proj[expert]).chunk(2, dim=-1)
            values = {"gate_proj": tokens, "up_proj": tokens, "down_proj": module.act_fn(gate) * up}
            for part, value in values.items():
                maxima.see_real(f"{experts}.{expert}.{part}.{leaf}", value)
                maxima.see_real(f"{experts}.*.{part}.{leaf}", value)

    return hook


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def calibrated_export(
    model_dir: Path,
    target: Target,
    *,
    recipe: Recipe,
    sequences: Sequence[Sequence[int]],
    out: Path,
    source_step: int,
) -> dict[str, Any]:
    """Quantize a BF16 model folder with one of llm-compressor's recipes and write a servable folder.

    Layers are calibrated one after another, each on what the quantized ones before it put out; sequences run one by
    one, so nothing is padded. Experts are calibrated on all tokens.

    Args:
        model_dir: BF16 model folder; config.json and tokenizer go into the export.
        target: bound to this model.
        recipe: what chooses the codes; `recipe_refusal` says which targets it is for.
        sequences: token ids to calibrate on, such as rollouts.
        out: the folder to make; replaced if it exists. What llm-compressor says goes to `<out>.log` beside it.
        source_step: training step the weights come from.

    Returns:
        The manifest: that of `quant.export.export`, with the recipe, and the number, tokens and SHA-256 of the
        sequences.

    Raises:
        TargetError: the recipe is not for this target.
        CalibrationError: no sequences, or an empty one.
        VerificationError: what llm-compressor wrote is not this target's checkpoint.
    """
    refusal = recipe_refusal(recipe, target.spec)
    if refusal is not None:
        raise TargetError(refusal)
    if not sequences or not all(sequences):
        raise CalibrationError(f"{recipe} calibrates on token sequences, got {len(sequences)}, at least one must "
                               "be given and none may be empty")  # fmt: skip
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _oneshot(model_dir, target, recipe, sequences, partial, log=out.with_name(f"{out.name}.log"))
    for path in partial.iterdir():
        if ".safetensors" not in path.name:  # its recipe.yaml carries Python object tags: nothing to ship
            path.unlink()
    _require_layout(target, partial)
    manifest = {
        "recipe": recipe,
        "calibration": {
            "sequences": len(sequences),
            "tokens": sum(map(len, sequences)),
            "sha256": hashlib.sha256(json.dumps([list(ids) for ids in sequences]).encode()).hexdigest(),
        },
        "source_step": source_step,
        "tensors": digests(read_tensors(partial)),
    }
    return publish(partial, out, target, model_dir=model_dir, manifest=manifest)


def _oneshot(
    model_dir: Path, target: Target, recipe: Recipe, sequences: Sequence[Sequence[int]], folder: Path, *, log: Path
) -> None:
    """Run llm-compressor and let it write into `folder`, its bars and messages into `log`."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier
    from loguru import logger

    def write(message: str) -> None:
        sys.stderr.write(message)  # follows the redirection, unlike llm-compressor's own sink

    logger.remove()
    logger.add(write)
    scheme = target.scheme.model_copy(deep=True)  # the modifiers write observers into theirs
    if scheme.input_activations is not None and scheme.input_activations.dynamic is not True:
        scheme.input_activations.observer = "static_minmax"  # not the default, a moving average
    quantization: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": list(target.ignore)}
    if target.attentions:
        quantization["kv_cache_scheme"] = KV_ARGS.model_copy(update={"observer": "static_minmax"})
    modifiers: dict[Recipe, Callable[[], list[Any]]] = {
        "gptq": lambda: [GPTQModifier(**quantization)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**quantization)],
        "smoothquant": lambda: [SmoothQuantModifier(), QuantizationModifier(**quantization)],
    }
    with (
        log.open("w") as file,
        redirect_stdout(file),
        redirect_stderr(file),
        _pinning_where_possible(),
        # a vLLM engine of this process has made a group of one; llm-compressor would reduce over it, on accelerators
        patch_attr(torch.distributed, "is_initialized", lambda: False),
    ):
        oneshot(
            model=str(model_dir),
            recipe=modifiers[recipe](),
            dataset=Dataset.from_dict({"input_ids": [list(ids) for ids in sequences]}),
            num_calibration_samples=len(sequences),
            shuffle_calibration_samples=False,
            output_dir=str(folder),
        )


@contextmanager
def _pinning_where_possible() -> Iterator[None]:
    """llm-compressor's AWQ pins host memory, which torch refuses on a machine without an accelerator."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
    else:
        with patch_attr(IntermediatesCache, "pin_memory", lambda cache, batch: None):
            yield


def _require_layout(target: Target, folder: Path) -> None:
    """Raise VerificationError unless the folder's quantized modules hold the tensors, by name, dtype and shape, that
    the target itself writes for them."""
    blank = ((f"{name}.weight", torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in target.shapes.items())
    scales = {
        name: torch.ones(1, dtype=torch.float32 if name.endswith("_global_scale") else torch.bfloat16)
        for name in target.static_scales
    }
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in target.compress(blank, scales)}
    owners = {name.rpartition(".")[0] for name in expected}
    found = {
        name: (t.dtype, tuple(t.shape))
        for name, t in read_tensors(folder)
        if name.rpartition(".")[0] in owners and not name.endswith(".bias")
    }
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise VerificationError(
            f"llm-compressor's {target.spec.name} checkpoint is not laid out as the target's: {len(wrong)} of "
            f"{len(expected)} tensors differ, first {wrong[0]}: {found.get(wrong[0])}, not {expected.get(wrong[0])}"
        )
