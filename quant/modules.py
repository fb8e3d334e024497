"""The weight matrices of a model as its checkpoint names them: linear layers, and experts taken out of their stacks.

transformers 5 holds a layer's experts in two stacked parameters; checkpoints, vLLM and compressed-tensors know one
matrix per expert and projection. `matrices` gives those as views, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from quant.config import TargetError

# A stacked parameter [experts, rows, in] and the projections that lie above one another in its rows.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# Projections that vLLM multiplies as one matrix: they are quantized alike, or not at all.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its checkpoint names.

    Args:
        name: as in `model.named_parameters()`.
        tensor: the parameter.

    Yields:
        (name, tensor) as it came; for stacked experts `...experts.gate_up_proj` [E, 2 I, H] or `...experts.down_proj`
        [E, H, I] one view [out, in] per expert and projection, as `...experts.3.gate_proj.weight`.
    """
    stem, _, leaf = name.rpartition(".")
    if not (stem.endswith(".experts") and leaf in STACKED and tensor.ndim == 3):
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        parts = STACKED[leaf]
        for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
            yield f"{stem}.{expert}.{part}.weight", rows


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by checkpoint name, in the model's order; each stacked expert stands in as a meta Linear.

    Raises:
        TargetError: experts are stored in a way that is not known here.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3:
                continue
            # rows out, columns in; other families transpose their stacks, interleave gate and up, or add biases
            if not type(module).__name__.startswith(("Qwen2Moe", "Qwen3Moe")) or leaf not in STACKED:
                raise TargetError(f"{name}.{leaf}: the stacked experts of {type(module).__name__} are not supported")
            for matrix, rows in matrices(f"{name}.{leaf}", parameter):
                found[matrix.removesuffix(".weight")] = nn.Linear(
                    rows.shape[1], rows.shape[0], bias=False, device="meta", dtype=rows.dtype
                )
    return found


def siblings(module: str, among: set[str]) -> tuple[str, ...]:
    """The modules that vLLM fuses with this one, itself included, in vLLM's order; itself alone if it is not fused."""
    stem, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{stem}.{part}" for part in group if f"{stem}.{part}" in among)
    return (module,)


def engine_layer(name: str) -> str:
    """The layer of vLLM that loads this checkpoint tensor; it takes all of its tensors, or none.

    Fused projections are one layer, so are all experts of a block, and so is what an attention scales its cache with.
    """
    module, _, leaf = name.rpartition(".")
    stem, _, projection = module.rpartition(".")
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    if leaf in ("k_scale", "v_scale"):
        return f"{module}.attn"
    return next((f"{stem}.{group[0]}" for group in FUSED if projection in group), module)
