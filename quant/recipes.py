"""Which calibrated recipe goes with which target; torch-free, so that a config is refused while it is parsed."""

from __future__ import annotations

from typing import Literal

from quant.config import TargetSpec

Recipe = Literal["gptq", "awq", "smoothquant"]


def recipe_refusal(recipe: Recipe, spec: TargetSpec) -> str | None:
    """Why a recipe cannot export a target, and which one can; None when it can.

    - gptq (arXiv 2210.17323) chooses codes column by column so that each error makes up for those before it: for
      integer grids, where rounding is coarse.
    - awq (arXiv 2306.00978) scales up the weight columns that large activations meet, then rounds: for 4-bit weights
      under BF16 activations.
    - smoothquant (arXiv 2211.10438) moves outliers from activations into weights, then rounds: for 8-bit activations
      that share one scale per token or tensor, under weights that have bits to spare.
    """
    weights, inputs = spec.weights, spec.input_activations
    refusals = {
        "gptq": (
            (
                weights.type != "int",
                "has floating point weights, gptq is for integer ones",
                "smoothquant, or no recipe",
            ),
        ),
        "awq": (
            (
                weights.type != "int" or weights.num_bits != 4,
                f"has {weights.num_bits}-bit {weights.type} weights, awq is for 4-bit integer ones",
                "gptq for integer weights, or no recipe",
            ),
            (inputs is not None, "quantizes activations, awq is for BF16 ones", "gptq"),
        ),
        "smoothquant": (
            (inputs is None, "keeps activations in BF16, smoothquant is for quantized ones", "gptq or awq"),
            (weights.num_bits == 4, "has 4-bit weights, which smoothquant makes harder to round", "gptq, or no recipe"),
            (
                inputs is not None and inputs.group_size is not None,
                "scales activations by groups, which already holds outliers apart",
                "no recipe",
            ),
        ),
    }
    for refused, reason, instead in refusals[recipe]:
        if refused:
            return f"{spec.name} {reason}; use {instead}"
    return None
