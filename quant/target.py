"""One definition of "deployed": rollouts, export and evaluation all take their weights from a `Target`.

The arithmetic (scales, rounding, packing) is compressed-tensors' own; nothing here knows what INT4 means beyond
handing its scheme to the library. Two implementations of one quantizer would be a bug even while they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from quant.config import TargetError, TargetSpec

# Groups of several matrices are quantized together up to this many elements: groups are independent, so the result is
# the same bit for bit, while one call per matrix would be all overhead on small models. Bounds the extra memory.
BATCH_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Target:
    """A target bound to one model's modules.

    Attributes:
        spec: the target file.
        scheme: what compressed-tensors calls the same thing.
        modules: names of the modules whose weight is quantized, in the model's order.
    """

    spec: TargetSpec
    scheme: QuantizationScheme
    modules: tuple[str, ...]

    @classmethod
    def for_model(cls, spec: TargetSpec, model: nn.Module) -> Target:
        """Bind a target to a model (meta device is enough).

        Raises:
            TargetError: the target matches no module, or a module's input width is not a multiple of the group size.
        """
        scheme = QuantizationScheme(targets=list(spec.targets), weights=QuantizationArgs(**spec.weights.model_dump()))
        matched = dict(match_named_modules(model, spec.targets, spec.ignore))
        if not matched:
            raise TargetError(f"target {spec.name} matches no module of {type(model).__name__}: {spec.targets}")
        if "lm_head" in matched:
            raise TargetError(f"target {spec.name} quantizes lm_head, which cannot be served here; add it to `ignore`")
        for name, module in matched.items():
            width = module.get_parameter("weight").shape[-1]
            if width % spec.weights.group_size:
                raise TargetError(
                    f"{name}: input width {width} is not a multiple of the target's group size "
                    f"{spec.weights.group_size}; use a target with a smaller group or ignore the module"
                )
        return cls(spec, scheme, tuple(matched))

    def compress(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Stream a model's BF16 tensors into the tensors of its deployed checkpoint.

        Args:
            weights: (name, tensor) pairs as in the model's state dict; quantized ones [out, in], BF16.

        Yields:
            (name, tensor): for a quantized weight `M.weight` the packed codes `M.weight_packed` [out, in / 8] int32,
            `M.weight_scale` [out, in / group] BF16 and `M.weight_shape` [2] int64; every other tensor as it came.

        Raises:
            ValueError: a tensor that is not BF16: quantizing FP32 masters gives other codes than serving would.
        """
        quantized = {f"{name}.weight" for name in self.modules}
        batch: list[tuple[str, Tensor]] = []
        for name, tensor in weights:
            if tensor.dtype != torch.bfloat16:
                raise ValueError(f"{name}: the target quantizes BF16-rounded weights, got {tensor.dtype}")
            if name not in quantized:
                yield name, tensor.detach()
                continue
            if batch and sum(w.numel() for _, w in batch) + tensor.numel() > BATCH_ELEMENTS:
                yield from self._compress_groups(batch)
                batch = []
            batch.append((name, tensor.detach()))
        yield from self._compress_groups(batch)

    def _compress_groups(self, batch: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Quantize the groups of several matrices in one call, as rows of one group each, and give them back."""
        if not batch:
            return
        groups, scale, counts = self._scaled_groups([weight for _, weight in batch])
        compressed = self._compressor.compress({"weight": groups, "weight_scale": scale}, self.scheme)
        packed, scales = compressed["weight_packed"].split(counts), compressed["weight_scale"].split(counts)
        for (name, weight), codes, scale in zip(batch, packed, scales, strict=True):
            module, rows = name.removesuffix(".weight"), weight.shape[0]
            yield f"{module}.weight_packed", codes.reshape(rows, -1)
            yield f"{module}.weight_scale", scale.reshape(rows, -1)
            yield f"{module}.weight_shape", torch.tensor(weight.shape)

    def _scaled_groups(self, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """The matrices' groups as rows [n, group], their scales [n, 1], and how many groups each matrix has.

        The target is symmetric, so there is no zero point, and the library skips adding zeros.
        """
        groups = torch.cat([matrix.reshape(-1, self.spec.weights.group_size) for matrix in matrices])
        scale, _ = calculate_qparams(groups.amin(1, keepdim=True), groups.amax(1, keepdim=True), self._args)
        return groups, scale, [matrix.numel() // groups.shape[1] for matrix in matrices]

    def deployed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Q(W) of the quantized weights [out, in]: what `dequantize(compress(weights))` gives, without the packing.

        For where nothing is sent, such as the trainer's blend between two optimizer steps.
        """
        found: dict[str, Tensor] = {}
        for batch in self._batches({module: weights[f"{module}.weight"].numel() for module in self.modules}):
            matrices = [weights[f"{module}.weight"] for module in batch]
            groups, scale, counts = self._scaled_groups(matrices)
            zero_point = torch.zeros_like(scale)  # the library's signature wants one here
            parts = fake_quantize(groups, scale, zero_point, self._args).split(counts)
            for module, matrix, part in zip(batch, matrices, parts, strict=True):
                found[f"{module}.weight"] = part.view_as(matrix)
        return found

    def dequantize(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The BF16 weights [out, in] that the deployed kernels compute with, from the packed tensors alone.

        Args:
            packed: tensors as `compress` yields them (a dict, or an export folder's safetensors).

        Returns:
            `M.weight` for every quantized module M.
        """
        weights: dict[str, Tensor] = {}
        sizes = {module: int(packed[f"{module}.weight_shape"].prod()) for module in self.modules}
        for batch in self._batches(sizes):
            scale = torch.cat([packed[f"{module}.weight_scale"].reshape(-1, 1) for module in batch])
            words = [packed[f"{module}.weight_packed"] for module in batch]
            size = self.spec.weights.group_size
            groups = self._compressor.decompress(
                {
                    "weight_packed": torch.cat([w.reshape(-1, size * self._args.num_bits // 32) for w in words]),
                    "weight_scale": scale,
                    "weight_shape": torch.tensor([len(scale), size]),
                },
                self.scheme,
            )["weight"]
            counts = [packed[f"{module}.weight_scale"].numel() for module in batch]
            for module, part in zip(batch, groups.split(counts), strict=True):
                weights[f"{module}.weight"] = part.reshape(packed[f"{module}.weight_shape"].tolist())
        return weights

    def _batches(self, sizes: Mapping[str, int]) -> Iterator[list[str]]:
        """The modules in runs of at most BATCH_ELEMENTS weights, or one module that is larger."""
        batch: list[str] = []
        elements = 0
        for module, size in sizes.items():
            if batch and elements + size > BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(module)
            elements += size
        yield batch

    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` entry of the export's config.json, as vLLM and transformers read it."""
        return QuantizationConfig(
            config_groups={"group_0": self.scheme},
            format=self.spec.format,
            quantization_status="compressed",
            ignore=list(self.spec.ignore),
        ).to_dict()

    @property
    def _args(self) -> QuantizationArgs:
        assert self.scheme.weights is not None
        return self.scheme.weights

    @property
    def _compressor(self) -> Any:
        return BaseCompressor.get_value_from_registry(self.spec.format)


def changed_codes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of quantized codes that differ between two compressions of the same model, in [0, 1].

    RL updates can be smaller than a quantization step, so the deployed weights may not move at all (arXiv 2602.13953).
    """
    changed = total = 0
    for name, codes in after.items():
        if name.endswith(".weight_packed"):
            pairs = (codes ^ before[name]).view(torch.uint8)  # two codes in a byte
            changed += int(torch.count_nonzero(pairs & 0x0F)) + int(torch.count_nonzero(pairs & 0xF0))
            total += 8 * codes.numel()
    return changed / total
