"""Runs inside vLLM's worker: put new weights in, and read back what the kernels compute with.

vLLM's own reload leaves a tied or untied lm_head on the old weights on a CPU (its prepacked copy is not refreshed),
and vLLM's weight checksums do not see prepacked weights. So the head is processed again here, and `read_back` asks
every layer's kernel instead of its buffers: a linear layer applied to the identity matrix is its effective weight,
exactly, because each sum has one non-zero term. It covers dense models on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quant.verify import fingerprint


class WeightSync:
    """Mixed into the vLLM worker as its `worker_extension_cls`."""

    model_runner: Any

    def boresight_load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Reload checkpoint-format tensors in place, then refresh what vLLM's reload forgets."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    @torch.inference_mode()
    def boresight_read_back(self) -> tuple[dict[str, str], dict[str, str]]:
        """Fingerprints of the effective weights and names of the kernels, by checkpoint name."""
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        model = self.model_runner.get_model()
        fused: dict[str, list[str]] = model.packed_modules_mapping
        weights: dict[str, str] = {}
        kernels: dict[str, str] = {}
        for name, layer in model.named_modules():
            module: Any = layer  # vLLM declares its layers' attributes only at run time
            if isinstance(layer, LinearBase):
                parts = [name]
                stem, _, leaf = name.rpartition(".")
                if leaf in fused:
                    parts = [f"{stem}.{part}" for part in fused[leaf]]
                effective = _through_kernel(module, module.input_size)
                sizes = getattr(module, "output_partition_sizes", [effective.shape[0]])
                for part, weight in zip(parts, effective.split(sizes), strict=True):
                    weights[f"{part}.weight"] = fingerprint(weight)
                    kernels[part] = _kernel(module)
                if module.bias is not None:
                    for part, bias in zip(parts, module.bias.split(sizes), strict=True):
                        weights[f"{part}.bias"] = fingerprint(bias)
            elif isinstance(layer, ParallelLMHead):
                weights[f"{name}.weight"] = fingerprint(
                    _through_kernel(module, module.embedding_dim)[: module.org_vocab_size]
                )
                kernels[name] = _kernel(module)
            elif isinstance(layer, VocabParallelEmbedding):
                weights[f"{name}.weight"] = fingerprint(module.weight[: module.org_vocab_size])
            else:
                for leaf, parameter in module.named_parameters(recurse=False):
                    weights[f"{name}.{leaf}"] = fingerprint(parameter)
        return weights, kernels


def _through_kernel(module: Any, width: int) -> Tensor:
    """The layer's effective weight [out, in]: its own kernel applied to the identity, without bias."""
    device = next(module.parameters()).device
    identity = torch.eye(width, dtype=torch.bfloat16, device=device)
    return module.quant_method.apply(module, identity, None).t()


def _kernel(module: Any) -> str:
    """The class that multiplies: compressed-tensors' scheme and kernel, or the unquantized method."""
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        return type(module.quant_method).__name__
    kernel = getattr(scheme, "kernel", None)
    return type(scheme).__name__ if kernel is None else f"{type(scheme).__name__}/{type(kernel).__name__}"
