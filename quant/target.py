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
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from quant.config import TargetError, TargetSpec

# Matrices of equal input width are quantized together up to this many elements: rows are independent, so the result
# is the same bit for bit, while one call per matrix would be all overhead on small models. Bounds the extra memory.
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
        waiting: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in weights:
            if tensor.dtype != torch.bfloat16:
                raise ValueError(f"{name}: the target quantizes BF16-rounded weights, got {tensor.dtype}")
            if name not in quantized:
                yield name, tensor.detach()
                continue
            width = tensor.shape[1]
            batch = waiting.setdefault(width, [])
            if batch and sum(w.numel() for _, w in batch) + tensor.numel() > BATCH_ELEMENTS:
                yield from self._compress_rows(waiting.pop(width))
                batch = waiting.setdefault(width, [])
            batch.append((name, tensor.detach()))
        for batch in waiting.values():
            yield from self._compress_rows(batch)

    def _compress_rows(self, batch: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Quantize matrices of one input width in one call and split the result by rows."""
        rows = batch[0][1] if len(batch) == 1 else torch.cat([weight for _, weight in batch])
        groups = rows.unflatten(-1, (-1, self.spec.weights.group_size))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), self._args)
        compressed = self._compressor.compress(
            {"weight": rows, "weight_scale": scale, "weight_zero_point": zero_point}, self.scheme
        )
        sizes = [weight.shape[0] for _, weight in batch]
        packed = compressed["weight_packed"].split(sizes)
        scales = compressed["weight_scale"].split(sizes)
        for (name, weight), codes, scale in zip(batch, packed, scales, strict=True):
            module = name.removesuffix(".weight")
            yield f"{module}.weight_packed", codes
            yield f"{module}.weight_scale", scale
            yield f"{module}.weight_shape", torch.tensor(weight.shape)

    def dequantize(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The BF16 weights [out, in] that the deployed kernels compute with, from the packed tensors alone.

        Args:
            packed: tensors as `compress` yields them (a dict, or an export folder's safetensors).

        Returns:
            `M.weight` for every quantized module M.
        """
        by_width: dict[int, list[str]] = {}
        for module in self.modules:
            by_width.setdefault(packed[f"{module}.weight_packed"].shape[1], []).append(module)
        weights: dict[str, Tensor] = {}
        for modules in by_width.values():
            for batch in self._batches(modules, packed):
                codes = torch.cat([packed[f"{module}.weight_packed"] for module in batch])
                shapes = [packed[f"{module}.weight_shape"].tolist() for module in batch]
                rows = self._compressor.decompress(
                    {
                        "weight_packed": codes,
                        "weight_scale": torch.cat([packed[f"{module}.weight_scale"] for module in batch]),
                        "weight_shape": torch.tensor([len(codes), shapes[0][1]]),
                    },
                    self.scheme,
                )["weight"]
                sizes = [shape[0] for shape in shapes]
                weights |= {f"{module}.weight": part for module, part in zip(batch, rows.split(sizes), strict=True)}
        return weights

    def _batches(self, modules: Sequence[str], packed: Mapping[str, Tensor]) -> Iterator[list[str]]:
        batch: list[str] = []
        elements = 0
        for module in modules:
            size = 8 * packed[f"{module}.weight_packed"].numel()
            if batch and elements + size > BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(module)
            elements += size
        if batch:
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
            difference = codes ^ before[name]
            nibbles = difference | (difference >> 2)
            nibbles = (nibbles | (nibbles >> 1)) & 0x11111111
            # each byte holds two flags: counting set bits by bytes is the sum of low and high flag
            bytes_ = nibbles.view(torch.uint8)
            changed += int((bytes_ & 1).sum()) + int((bytes_ >> 4).sum())
            total += 8 * codes.numel()
    return changed / total
