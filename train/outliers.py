"""Function-preserving outlier channels: what makes quantization hurt in real LLMs, as a dial for small models.

A small model trained for a minute has no outlier channels, so INT4 costs it nothing. Moving a factor S between an
RMSNorm gain and the input columns of the matrices it feeds leaves the function unchanged, bit for bit in BF16 when S
is a power of two, but makes those columns dominate their quantization groups.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS_PER_GROUP = 2  # of 128 input columns
GROUP = 128


@torch.no_grad()
def inject_outliers(model: nn.Module, scale: int, *, seed: int) -> None:
    """Scale two random channels in every 128 by `scale`, in place, where the inverse can be folded in beforehand.

    q/k/v columns with the input norm's gain, gate/up (and router) columns with the post-attention norm's gain, down
    columns with the rows of up. Made for the Llama and Qwen family's module names, and Qwen3-MoE's stacked experts.

    Args:
        model: a causal LM with `model.layers[i].{input_layernorm, self_attn, post_attention_layernorm, mlp}`.
        scale: S, a power of two; 1 changes nothing.
        seed: which channels.
    """
    if scale == 1:
        return
    generator = torch.Generator().manual_seed(seed)

    def channels(width: int) -> torch.Tensor:
        groups = range(0, width, GROUP)
        picks = [torch.randperm(min(GROUP, width - g), generator=generator)[:CHANNELS_PER_GROUP] + g for g in groups]
        return torch.cat(picks)

    decoder: nn.Module = model.get_submodule("model")
    for layer in decoder.get_submodule("layers").children():
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        qkv = [attention.get_parameter(f"{name}_proj.weight") for name in "qkv"]
        if hasattr(mlp, "experts"):  # stacks [E, rows, in]; the router reads the same norm
            stack, down = (mlp.get_parameter(f"experts.{name}_proj") for name in ("gate_up", "down"))
            up = stack[:, stack.shape[1] // 2 :]
            readers = [stack, mlp.get_parameter("gate.weight")]
        else:
            gate, up, down = (mlp.get_parameter(f"{name}_proj.weight") for name in ("gate", "up", "down"))
            readers = [gate, up]
        for norm, matrices in (("input_layernorm", qkv), ("post_attention_layernorm", readers)):
            chosen = channels(matrices[0].shape[-1])
            layer.get_parameter(f"{norm}.weight")[chosen] /= scale
            for weight in matrices:
                weight[..., chosen] *= scale
        chosen = channels(down.shape[-1])
        up[..., chosen, :] /= scale
        down[..., chosen] *= scale
