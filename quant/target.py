"""One definition of "deployed": rollouts, export and evaluation all take their weights from a `Target`.

The arithmetic (scales, rounding, packing) is compressed-tensors' own; nothing here knows what INT4 means beyond
handing its scheme to the library. Two implementations of one quantizer would be a bug even while they agree.

Every scheme is brought to one shape: rows with one scale each (a group, an output row, a block, a tensor). Rows are
independent, so small matrices are quantized together in one call and large ones in pieces, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn

from quant.config import TargetError, TargetSpec
from quant.modules import linear_modules, matrices, siblings

# Rows are quantized in calls of up to this many elements: one call per matrix would be all overhead on small models,
# and the library's intermediates are several times their input. Bounds the extra memory.
BATCH_ELEMENTS = 1 << 21
LAYERS = "model.layers."
KV_ARGS = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)


@dataclass(frozen=True)
class Target:
    """A target bound to one model's modules.

    Attributes:
        spec: the target file.
        scheme: what compressed-tensors calls the same thing.
        shapes: module name to [out, in] of the modules whose weight is quantized, in the model's order; experts one
            by one.
        attentions: modules with static key and value scales; empty unless the KV cache is quantized.
        ignore: what is kept in BF16, as written into the checkpoint.
    """

    spec: TargetSpec
    scheme: QuantizationScheme
    shapes: Mapping[str, tuple[int, int]]
    attentions: tuple[str, ...]
    ignore: tuple[str, ...]

    @classmethod
    def for_model(cls, spec: TargetSpec, model: nn.Module) -> Target:
        """Bind a target to a model (meta device is enough).

        Raises:
            TargetError: the target matches no module; or matches the head, a part of a fused projection, or a matrix
                whose shape its kernels cannot take.
        """
        scheme = QuantizationScheme(
            targets=list(spec.targets),
            weights=QuantizationArgs(**spec.weights.model_dump(exclude_none=True)),
            input_activations=spec.input_activations
            and QuantizationArgs(**spec.input_activations.model_dump(exclude_none=True)),
        )
        scheme.format = CompressionFormat(spec.format or infer_module_format(nn.Linear, scheme))
        ignore = (*spec.ignore, *_ends(spec, model))
        linear = linear_modules(model)
        matched = {
            name: (module.out_features, module.in_features)
            for name, module in linear.items()
            if is_match(name, module, spec.targets, ignore)
        }
        if not matched:
            raise TargetError(f"target {spec.name} matches no module of {type(model).__name__}: {spec.targets}")
        if "lm_head" in matched:
            raise TargetError(f"target {spec.name} quantizes lm_head, which cannot be served here; add it to `ignore`")
        names = set(linear)
        for name, shape in matched.items():
            for sibling in siblings(name, names):
                if sibling not in matched:
                    raise TargetError(
                        f"target {spec.name} quantizes {name} but not {sibling}, which vLLM multiplies as one matrix; "
                        f"ignore both or none"
                    )
            _check_shape(spec, name, *shape)
        attentions = tuple(sorted({name.rpartition(".")[0] for name in linear if name.endswith(".k_proj")}))
        return cls(spec, scheme, matched, attentions if spec.kv_cache == "fp8" else (), ignore)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose weight is quantized."""
        return tuple(self.shapes)

    @property
    def rows_per_scale(self) -> int | None:
        """How many output rows of a weight share scales: 1, a block's height, or None for the whole matrix."""
        if self._args.strategy in ("tensor", "tensor_group"):
            return None
        return self._args.block_structure[0] if self._args.block_structure else 1

    @cached_property
    def static_scales(self) -> frozenset[str]:
        """Names of the calibrated tensors [1] that the checkpoint holds beside the weights'."""
        inputs = self.spec.input_activations
        names = {f"{attention}.{which}_scale" for attention in self.attentions for which in "kv"}
        if inputs is not None and inputs.dynamic is not True:
            leaf = "input_global_scale" if inputs.dynamic == "local" else "input_scale"
            names |= {f"{module}.{leaf}" for module in self.shapes}
        return frozenset(names)

    def compress(
        self, weights: Iterable[tuple[str, Tensor]], scales: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Stream a model's BF16 tensors into the tensors of its deployed checkpoint.

        Beyond the output, at most one matrix and its siblings, or BATCH_ELEMENTS weights, are worked on at a time.

        Args:
            weights: (name, tensor) pairs as in `model.named_parameters()`; quantized ones [out, in], BF16.
            scales: the calibrated tensors named by `static_scales`.

        Yields:
            (name, tensor): for a quantized weight `M.weight` the scheme's tensors (`M.weight_packed` or a narrow
            `M.weight`, `M.weight_scale`, and what else the format has); the calibrated scales; every other tensor as
            it came, experts one by one.

        Raises:
            ValueError: a tensor that is not BF16: quantizing FP32 masters gives other codes than serving would; or
                calibrated scales missing, or not of this target.
        """
        scales = scales or {}
        if scales.keys() != self.static_scales:
            odd = sorted(scales.keys() ^ self.static_scales)
            raise ValueError(f"calibrated scales do not fit {self.spec.name}: {odd[:3]} of {len(odd)}")
        yield from scales.items()
        for batch in self._batches(weights):
            if batch[0][0] not in self.shapes:
                yield from batch
            elif len(batch) == 1:
                yield from self._compress_slabs(*batch[0])
            else:
                yield from self._compress(batch)

    def _compress_slabs(self, module: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One matrix in slabs of rows, so that what the library works with is as small as for a small matrix."""
        if self.rows_per_scale is None:
            yield from self._compress([(module, weight)])
            return
        unit = math.lcm(32, self.spec.height_multiple)  # zero points are packed by 32 rows
        slabs = weight.split(max(1, BATCH_ELEMENTS // weight.shape[1] // unit) * unit)
        parts = [dict(self._compress([(module, slab)])) for slab in slabs]
        for name in list(parts[0]):
            if name.endswith(".weight_shape"):
                yield name, torch.tensor(weight.shape)
            else:
                yield name, _cat([part.pop(name) for part in parts])

    def _compress(self, batch: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        rows = self._rows([weight for _, weight in batch])
        pieces = [
            self._compressor.compress(
                {
                    "weight": piece.values,
                    "weight_scale": piece.scale,
                    "weight_zero_point": piece.zero_point,
                    "weight_global_scale": piece.global_scale,
                },
                self._row_scheme,
            )
            for piece in rows.pieces()
        ]
        codes_name = "weight_packed" if "weight_packed" in pieces[0] else "weight"
        codes = _cat([piece[codes_name] for piece in pieces]).split(rows.counts)
        scale = _cat([piece["weight_scale"] for piece in pieces]).split(rows.counts)
        for i, (module, weight) in enumerate(batch):
            yield f"{module}.{codes_name}", self._from_rows(codes[i], weight.shape)
            yield f"{module}.weight_scale", self._scale_shape(scale[i], weight.shape)
            if "weight_shape" in pieces[0]:
                yield f"{module}.weight_shape", torch.tensor(weight.shape)
            if rows.global_scale is not None:
                yield f"{module}.weight_global_scale", rows.global_scale
            if not self._args.symmetric:
                points = self._scale_shape(rows.zero_point.split(rows.counts)[i], weight.shape)
                yield f"{module}.weight_zero_point", pack_to_int32(points, self._args.num_bits, 0).contiguous()

    def quantized(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Stream Q(W) of the quantized weights, straight from W: what `dequantize(compress(weights))` gives, without
        the packing.

        Args:
            weights: as for `compress`.

        Yields:
            (module, [out, in] BF16), experts one by one.
        """
        for batch in self._batches(weights):
            if batch[0][0] not in self.shapes:
                continue
            rows = self._rows([weight for _, weight in batch])
            values = _cat(
                [
                    fake_quantize(piece.values, piece.scale, piece.zero_point, self._row_args, piece.global_scale)
                    for piece in rows.pieces()
                ]
            )
            for (module, weight), part in zip(batch, values.split(rows.counts), strict=True):
                yield module, self._from_rows(part, weight.shape).to(weight.dtype)

    def deployed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Q(W) of the quantized weights under their names in `weights`; stacked experts stay stacked.

        For where nothing is sent, such as the trainer's blend between two optimizer steps.
        """
        found: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}  # an expert's rows in its stack
        for name, tensor in weights.items():
            parts = [(part.removesuffix(".weight"), view) for part, view in matrices(name, tensor)]
            if len(parts) > 1 and any(part in self.shapes for part, _ in parts):
                found[name] = tensor.detach().clone()
                places |= {part.removesuffix(".weight"): view for part, view in matrices(name, found[name])}
        for module, value in self.quantized(weights.items()):
            if module in places:
                places[module].copy_(value)
            else:
                found[f"{module}.weight"] = value
        return found

    def dequantize(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The BF16 weights [out, in] that the deployed kernels compute with, from the packed tensors alone.

        Args:
            packed: tensors as `compress` yields them (a dict, or an export folder's safetensors).

        Returns:
            `M.weight` for every quantized module M, experts one by one.
        """
        return {f"{module}.weight": self.dequantized(module, packed) for module in self.shapes}

    def dequantized(self, module: str, packed: Mapping[str, Tensor]) -> Tensor:
        """`dequantize` of one module: [out, in] BF16."""
        names = ("weight", *self._compressor.compression_param_names(self.scheme))
        held = {leaf: packed[f"{module}.{leaf}"] for leaf in names if f"{module}.{leaf}" in packed}
        return self._compressor.decompress(held, self.scheme)["weight"].to(torch.bfloat16)

    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` entry of the export's config.json, as vLLM and transformers read it."""
        assert self.scheme.format is not None
        return QuantizationConfig(
            config_groups={"group_0": self.scheme},
            format=self.scheme.format.value,
            quantization_status="compressed",
            kv_cache_scheme=KV_ARGS if self.spec.kv_cache == "fp8" else None,
            ignore=list(self.ignore),
        ).to_dict()

    def _batches(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """The stream in runs that are quantized together.

        Yields:
            (module, weight) pairs whose rows are of one width, up to BATCH_ELEMENTS, or all siblings under one global
            scale; a (name, tensor) alone for what is not quantized.
        """
        batch: list[tuple[str, Tensor]] = []
        waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for name, tensor in weights:
            if tensor.dtype != torch.bfloat16:
                raise ValueError(f"{name}: the target quantizes BF16-rounded weights, got {tensor.dtype}")
            for part, matrix in matrices(name, tensor.detach()):
                module = part.removesuffix(".weight")
                if module not in self.shapes:
                    yield [(part, matrix)]
                elif self._args.strategy == "tensor_group":
                    family = siblings(module, set(self.shapes))
                    waiting.setdefault(family, {})[module] = matrix
                    if len(waiting[family]) == len(family):
                        yield list(waiting.pop(family).items())
                else:
                    size = sum(weight.numel() for _, weight in batch)
                    other_width = self._args.group_size is None and batch and matrix.shape[1] != batch[0][1].shape[1]
                    if batch and (size + matrix.numel() > BATCH_ELEMENTS or other_width):
                        yield batch
                        batch = []
                    batch.append((module, matrix))
        if batch:
            yield batch
        if waiting:
            raise ValueError(f"the weights end before all of {next(iter(waiting))} have come")

    def _rows(self, weights: Sequence[Tensor]) -> Rows:
        """Rows of one scale each, of matrices that are quantized together."""
        args = self._args
        parts = [self._to_rows(weight) for weight in weights]
        values, counts = _cat(parts), [len(part) for part in parts]
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)  # aminmax takes 2 to 6 times as long
        global_scale = None
        if args.strategy == "tensor":
            low = torch.cat([part.amin().expand(len(part), 1) for part in low.split(counts)])
            high = torch.cat([part.amax().expand(len(part), 1) for part in high.split(counts)])
        elif args.strategy == "tensor_group":
            largest = torch.maximum(high.amax(), -low.amin()).reshape(1)
            global_scale = generate_gparam(-largest, largest)
        scale, zero_point = calculate_qparams(low, high, args, global_scale)
        return Rows(values, scale.to(values.dtype), zero_point, global_scale, counts)

    def _to_rows(self, weight: Tensor) -> Tensor:
        """[out, in] -> [rows, width]: groups, output rows, or blocks."""
        args = self._args
        if args.group_size is not None:
            return weight.reshape(-1, args.group_size)
        if args.block_structure is None:
            return weight
        height, width = args.block_structure
        return weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2).flatten(0, 1)

    def _from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_to_rows`, of codes that may be packed along the columns."""
        if self._args.block_structure is None:
            return rows.reshape(shape[0], -1)
        height, width = self._args.block_structure
        return rows.reshape(-1, shape[1] // width, height, width).transpose(1, 2).reshape(shape)

    def _scale_shape(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """One value per row -> the shape the checkpoint has: [1], [blocks down, blocks across] or [out, groups]."""
        if self._args.strategy == "tensor":
            return scale[0].clone()
        if self._args.block_structure is not None:
            return scale.reshape(-1, shape[1] // self._args.block_structure[1])
        return scale.reshape(shape[0], -1)

    @cached_property
    def _args(self) -> QuantizationArgs:
        assert self.scheme.weights is not None
        return self.scheme.weights

    @cached_property
    def _row_args(self) -> QuantizationArgs:
        """The weights' arguments for rows that have one scale each."""
        return self._args.model_copy(update={"strategy": "channel", "group_size": None, "block_structure": None})

    @cached_property
    def _row_scheme(self) -> QuantizationScheme:
        return self.scheme.model_copy(update={"weights": self._row_args})

    @cached_property
    def _compressor(self) -> Any:
        assert self.scheme.format is not None
        return BaseCompressor.get_value_from_registry(self.scheme.format.value)


@dataclass(frozen=True)
class Rows:
    """Weights as rows that have one scale each.

    Attributes:
        values: [n, width] BF16.
        scale, zero_point: [n, 1]; the zero point is 0 where the scheme is symmetric.
        global_scale: [1] FP32 over all rows, or None.
        counts: how many rows each matrix has.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    global_scale: Tensor | None
    counts: list[int]

    def pieces(self) -> Iterator[Rows]:
        """Runs of rows of at most BATCH_ELEMENTS elements, or one row that is longer."""
        step = max(1, BATCH_ELEMENTS // self.values.shape[1])
        for i in range(0, len(self.values), step):
            part = slice(i, i + step)
            yield Rows(self.values[part], self.scale[part], self.zero_point[part], self.global_scale, [])


def _cat(parts: list[Tensor]) -> Tensor:
    """torch.cat, without a copy of a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ends(spec: TargetSpec, model: nn.Module) -> tuple[str, ...]:
    """Patterns for the decoder layers that the target keeps in BF16 at either end."""
    count = 1 + max(
        (int(name.split(".")[2]) for name, _ in model.named_modules() if name.startswith(LAYERS)), default=-1
    )
    if spec.keep_first_layers + spec.keep_last_layers >= count > 0:
        raise TargetError(f"target {spec.name} keeps every one of the model's {count} decoder layers in BF16")
    kept = (*range(spec.keep_first_layers), *range(count - spec.keep_last_layers, count))
    return tuple(rf"re:model\.layers\.{i}\." for i in kept)


def _check_shape(spec: TargetSpec, name: str, rows: int, width: int) -> None:
    """Raise TargetError when the scheme or its kernels cannot take a matrix [rows, width]."""
    if width % spec.width_multiple:
        raise TargetError(
            f"{name}: input width {width} is not a multiple of {spec.width_multiple}, as {spec.name} needs; "
            f"use a target with a smaller group or ignore the module"
        )
    if rows % spec.height_multiple:
        raise TargetError(
            f"{name}: {rows} output rows are not a multiple of {spec.height_multiple}, as {spec.name} needs; "
            f"ignore the module"
        )


def changed_codes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of quantized codes that differ between two compressions of the same model, in [0, 1].

    RL updates can be smaller than a quantization step, so the deployed weights may not move at all (arXiv 2602.13953).
    """
    changed = total = 0
    for name, codes in after.items():
        packed = name.endswith(".weight_packed")  # two 4-bit codes in a byte
        if packed or (codes.element_size() == 1 and name.endswith(".weight")):
            pairs = codes.view(torch.uint8) ^ before[name].to(codes.device).view(torch.uint8)
            masks = (0x0F, 0xF0) if packed else (0xFF,)
            changed += sum(int(torch.count_nonzero(pairs & mask)) for mask in masks)
            total += len(masks) * pairs.numel()
    return changed / total
