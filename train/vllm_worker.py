"""Runs inside vLLM's worker: put new weights in, and read back what the kernels compute with.

vLLM's own reload leaves prepacked copies stale on a CPU (a tied lm_head, BF16 experts) and frees memory that its INT8
kernel still reads; `boresight_load` repairs that. vLLM's weight checksums do not see prepacked weights, so
`boresight_read_back` asks the kernels instead of their buffers.

The answer can be predicted from a checkpoint alone: for every quantized matrix it is bf16(code * scale), exactly what
compressed-tensors' decompression gives, with code the integer (minus its zero point) or FP8 value; all else,
embeddings, norms, biases, cache scales, comes back as the checkpoint has it. It is exact because a kernel applied to a
multiple of the identity matrix adds zeros to a single product (`_ask`); experts alone are not asked but unpacked
(`train.vllm_experts`). Tensor-parallel ranks ask their shards and join the answers. Left out: static activation scales,
4-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from quant.kernels import kernel_name
from quant.verify import VerificationError, fingerprint
from train.rank_answers import say
from train.vllm_experts import expert_weights, experts_kernel, spread
from train.vllm_shards import joined
from train.weight_files import read_weights

# Times this, a product is so far above the layer's bias that adding the bias in float32 changes no bit of it.
ABOVE_BIAS = 2.0**40

# of config.json: what two models must share before weights of the one can go into the other
SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "num_experts", "tie_word_embeddings")  # fmt: skip

INT8, W4A8, W4A16 = "/CPUInt8ScaledMMLinearKernel", "/Dynamic4bitLinearKernel", "/CPUWNA16LinearKernel"


class WeightSync:
    """Mixed into the vLLM worker as its `worker_extension_cls`."""

    model_runner: Any
    parallel_config: Any
    rank: int  # among those of its replica
    boresight_label: str | None = None  # of the weights held; None for those of the checkpoint, and while others load

    def boresight_load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Reload checkpoint-format tensors in place, whole layers of them, and repair what vLLM's reload breaks."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        model = self.model_runner.get_model()
        layers: list[Any] = list(model.modules())
        experts = [(m.quant_method, m.quant_method.moe_kernel) for m in layers if isinstance(m, RoutedExperts)]
        for method, _ in experts:
            method.moe_kernel = None  # with a kernel in place, vLLM does not prepack the new weights
        for layer in layers:
            if (
                kernel_name(layer).endswith(W4A8) and layer.bias is not None
            ):  # its kernel replaced the loadable parameter
                layer.bias.output_dim, layer.bias.weight_loader = 0, layer.weight_loader
        with _int8_kernels_own_their_scales():
            self.model_runner.reload_weights(weights_iterator=_under_both_names(model, tensors))
        for method, kernel in experts:
            method.moe_kernel = method.moe_kernel or kernel  # of a layer that was not among the tensors
        for layer in layers:
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)  # else a tied head keeps its prepacked copy
            elif isinstance(layer, LinearBase) and not hasattr(layer, "weight") and kernel_name(layer).endswith(INT8):
                layer.register_parameter("weight", None)  # lost by a layer that was not among the tensors

    @torch.inference_mode()
    def boresight_read_back(self) -> tuple[dict[str, str], dict[str, str]]:
        """Fingerprints of the weights that are computed with, and names of the kernels, by checkpoint name.

        Raises:
            VerificationError: a layer's weights cannot be asked for exactly; the message names it.
        """
        kernels: dict[str, str] = {}
        held = _effective_weights(self.model_runner.get_model(), kernels)
        return {name: fingerprint(weight) for name, weight in held}, kernels

    def boresight_load_from(self, folder: str, label: str) -> None:
        """`boresight_load` of a folder of `train.weight_files`; the weights then held go by this label.

        Raises:
            WeightFilesError: the folder is not whole; nothing was loaded.
        """
        tensors = read_weights(Path(folder))
        self.boresight_label = None
        self.boresight_load(tensors)
        self.boresight_label = label

    def boresight_held(self) -> dict[str, Any]:
        """`boresight_read_back` with the label, as a server's answer can carry it."""
        fingerprints, kernels = self.boresight_read_back()
        return {"label": self.boresight_label, "fingerprints": fingerprints, "kernels": kernels}

    def boresight_say(self, folder: str, method: str, *arguments: str) -> None:
        """Run another of these methods, and put this rank's answer into a folder (train/rank_answers.py).

        Raises:
            RankAnswersError: the folder cannot be written.
        """
        answer = getattr(self, method)(*arguments)
        say(Path(folder), f"{self.parallel_config.data_parallel_index:04d}-{self.rank:04d}", answer)

    def boresight_about(self) -> dict[str, Any]:
        """The label of the weights held, and what a server is, for a trainer that has not started it."""
        config = self.model_runner.model_config
        model = config.hf_text_config.to_dict()
        return {
            "label": self.boresight_label,
            "logprobs_mode": config.logprobs_mode,
            "max_model_len": config.max_model_len,
            "shape": {key: model[key] for key in SHAPE if key in model},
        }


@contextmanager
def _int8_kernels_own_their_scales() -> Iterator[None]:
    """vLLM's INT8 handler keeps a pointer to the scales it is made with, and a reload frees those: give it its own."""
    from vllm import _custom_ops as ops

    create = ops.create_onednn_scaled_mm

    def create_with_own_scales(weight: Tensor, scales: Tensor, *options: Any) -> Any:
        own = scales.clone()
        handler: Any = create(weight, own, *options)
        handler.scales = own  # lives as long as the handler
        return handler

    setattr(ops, "create_onednn_scaled_mm", create_with_own_scales)  # noqa: B010
    try:
        yield
    finally:
        setattr(ops, "create_onednn_scaled_mm", create)  # noqa: B010


def _under_both_names(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """W4A8 layers hold one parameter as `weight` and `weight_packed`; a reload makes it two, and reads the second."""
    twofold = {
        part
        for name, m in model.named_modules()
        if kernel_name(m).endswith(W4A8)
        for part in _checkpoint_names(model, name)
    }
    for name, tensor in tensors:
        yield name, tensor
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in twofold:
            yield f"{module}.weight_packed", tensor


def _checkpoint_names(model: Any, name: str) -> list[str]:
    """The modules that vLLM fused into this one, in order, by their names in the checkpoint."""
    stem, _, leaf = name.rpartition(".")
    return [f"{stem}.{part}" for part in model.packed_modules_mapping.get(leaf, [leaf])]


def _effective_weights(model: Any, kernels: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of everything the model computes with, one layer at a time; fills `kernels`."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for name, module in model.named_modules():
        layer: Any = module  # vLLM declares its layers' attributes only at run time
        stem = name.rpartition(".")[0]
        if isinstance(module, LinearBase):
            parts = _checkpoint_names(model, name)
            kernels.update(dict.fromkeys(parts, kernel_name(layer)))
            yield from _linear(layer, name, parts)
        elif isinstance(module, ParallelLMHead):
            kernels[name] = kernel_name(layer)
            yield f"{name}.weight", joined(layer, _ask(layer, layer.embedding_dim))[: layer.org_vocab_size]
        elif isinstance(module, VocabParallelEmbedding):
            yield f"{name}.weight", joined(layer, layer.weight)[: layer.org_vocab_size]
        elif isinstance(module, RoutedExperts):
            for weight, held in expert_weights(layer, stem):
                kernels[weight.removesuffix(".weight")] = experts_kernel(layer)
                yield weight, held
        elif isinstance(module, Attention):
            yield from _cache_scales(layer, stem)
        else:
            for parameter, tensor in layer.named_parameters(recurse=False):
                yield f"{name}.{parameter}", tensor


def _linear(layer: Any, name: str, parts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The weight and bias of a linear layer, split into the checkpoint's parts."""
    activations = None
    if getattr(layer, "scheme", None) is not None:
        activations = layer.quant_method.quantization_config.get_scheme_dict(layer, name)["input_activations"]
    width = getattr(layer, "input_size_per_partition", layer.input_size)
    weights = _ask(layer, width, activations, name)
    sizes = getattr(layer, "output_partition_sizes", [len(weights)])
    for index, (part, weight) in enumerate(zip(parts, weights.split(sizes), strict=True)):
        yield f"{part}.weight", joined(layer, weight, index)
    if layer.bias is not None:
        nothing = torch.zeros(1, width, dtype=torch.bfloat16, device=weights.device)
        biases = layer.quant_method.apply(layer, nothing, layer.bias)[0]
        for index, (part, bias) in enumerate(zip(parts, biases.split(sizes), strict=True)):
            yield f"{part}.bias", joined(layer, bias, index)


def _ask(layer: Any, width: int, activations: QuantizationArgs | None = None, name: str = "") -> Tensor:
    """The layer's effective weight [out, in], from its own kernel applied to a multiple of the identity matrix.

    Where activations stay BF16 that is the identity itself. Where the kernel quantizes them per token, or a token's
    columns by groups, the multiple is the largest code g (127 or 448), which makes the activation scale exactly 1, and
    the answer bf16(g * code * scale) still tells the code; it is then multiplied with the scale alone, and NaN stands
    where that does not explain it. A CPU's INT4 codes are told like this too: without BF16 instructions (Intel before
    Cooper Lake) vLLM's kernels cut the products off where others round them.

    Raises:
        VerificationError: activations are quantized in a way that this cannot undo.
    """
    apply = layer.quant_method.apply
    identity = torch.eye(width, dtype=torch.bfloat16, device=next(layer.parameters()).device)
    if activations is None:
        answer = apply(layer, identity, None).t()
        if not kernel_name(layer).endswith(W4A16):
            return answer
        scale = layer.weight_scale.t()
        return _explained(answer.float(), 1.0, spread(scale, [1, width // scale.shape[1]], answer.shape))
    blocks = getattr(layer, "weight_block_size", None)
    grouped = activations.strategy == "group" and blocks is not None
    if activations.dynamic is not True or not (activations.strategy == "token" or grouped) or not activations.symmetric:
        raise VerificationError(f"{name}: no exact read-back through activations quantized as {activations}")
    if kernel_name(layer).endswith(W4A8):
        # Its codes span 255, its bias is packed in, and it truncates BF16 outputs: in float32 nothing is lost.
        multiple = 255 * ABOVE_BIAS
        bias = apply(layer, torch.zeros(1, width), None)
        return ((apply(layer, identity.float() * multiple, None) - bias) / multiple).t()
    is_float = activations.type == "float"
    largest = 448.0 if is_float else 127.0
    answer = apply(layer, identity * largest, None).t().float()
    scale = spread(layer.weight_scale if blocks else layer.weight_scale.reshape(-1, 1), blocks, answer.shape)
    return _explained(answer, largest, scale, torch.float8_e4m3fn if is_float else None)


def _explained(answer: Tensor, multiple: float, scale: Tensor, codes_in: torch.dtype | None = None) -> Tensor:
    """code * scale of the codes, integers or of a float type, whose products multiple * code * scale a kernel wrote as
    this BF16 answer: all rounded to the nearest, or all cut off; NaN where no code explains it.

    Cut off, a product of a code up to 128 is short by less than the step to the next code, which is then the one.
    """
    told = (answer / (multiple * scale)).nan_to_num()  # a scale of 0 holds nothing
    codes = told.round() if codes_in is None else told.to(codes_in).float()
    rounded = (multiple * codes * scale).bfloat16() == answer
    if not rounded.all():
        nearest = _cut_off(multiple * codes * scale) == answer
        larger = torch.where(nearest, codes, codes + told.sign())
        cut_off = _cut_off(multiple * larger * scale) == answer
        if cut_off.all():
            return larger * scale
    return torch.where(rounded, codes * scale, torch.nan)


def _cut_off(value: Tensor) -> Tensor:
    """FP32 to BF16 toward zero, as FP32."""
    return (value.view(torch.int32) & ~0xFFFF).view(torch.float32)


def _cache_scales(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The key and value scales [1] as the attention kernel takes them, where the checkpoint brings its own."""
    config = getattr(getattr(layer, "quant_method", None), "quant_config", None)
    if getattr(config, "kv_cache_scheme", None) is not None:
        yield f"{name}.k_scale", torch.tensor([layer._k_scale_float])
        yield f"{name}.v_scale", torch.tensor([layer._v_scale_float])
