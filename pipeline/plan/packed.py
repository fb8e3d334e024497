"""The size of a deployed checkpoint, to the byte, from the target and the model's shapes alone.

What `Target.compress` writes for a matrix [out, in] of a scheme with b bits, and a scale of s bytes per r scales:
codes out * in * b / 8, b = 8 where the format does not pack them; r * s bytes of scales, r = 1, out, out * in / group
or out * in / block; where integers are packed into words of 32 bits, the shape as two int64; asymmetric integers a zero
point per scale, packed by output rows; and an FP32 global scale where the scheme has one. Tests hold it to the tensors
that `compress` makes, target by target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compressed_tensors.config import CompressionFormat

from quant.config import QuantArgs
from quant.target import Target

NARROW = (CompressionFormat.int_quantized, CompressionFormat.float_quantized, CompressionFormat.naive_quantized)
SCALE_BYTES = {None: 2, "torch.uint8": 1, "torch.float8_e4m3fn": 1}  # BF16 unless the scheme says otherwise


@dataclass(frozen=True)
class Packed:
    """Bytes of a deployed checkpoint's tensors.

    Attributes:
        codes: the quantized weights themselves.
        scales: their scales, zero points, global scales and recorded shapes.
        static: calibrated scales of activations and KV cache.
        kept: what stays in BF16.
        quantized_parameters: how many weights the codes stand for.
    """

    codes: int
    scales: int
    static: int
    kept: int
    quantized_parameters: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.static + self.kept


def packed_size(target: Target, parameters: Mapping[str, tuple[int, ...]]) -> Packed:
    """Bytes of `target.compress` over a model's parameters.

    Args:
        target: bound to the model.
        parameters: name to shape, the model's named parameters.
    """
    args = target.spec.weights
    bits = 8 if target.scheme.format in NARROW else args.num_bits
    recorded = 2 * 8 if target.scheme.format == CompressionFormat.pack_quantized else 0  # weight_shape
    codes = sum(rows * columns * bits // 8 for rows, columns in target.shapes.values())
    scales = sum(_scales(args, rows, columns) + recorded for rows, columns in target.shapes.values())
    quantized = sum(rows * columns for rows, columns in target.shapes.values())
    kept = 2 * (sum(map(math.prod, parameters.values())) - quantized)
    return Packed(codes, scales, _static(target), kept, quantized)


def _scales(args: QuantArgs, rows: int, columns: int) -> int:
    """Bytes beside the codes of one matrix [rows, columns]."""
    if args.strategy == "tensor":
        count = 1
    elif args.block_structure is not None:
        count = (rows // args.block_structure[0]) * (columns // args.block_structure[1])
    else:
        count = rows * (columns // args.group_size if args.group_size else 1)
    size = count * SCALE_BYTES[args.scale_dtype]
    if args.strategy == "tensor_group":
        size += 4  # the FP32 scale over all groups
    if not args.symmetric:
        size += math.ceil(rows * args.num_bits / 32) * (count // rows) * 4
    return size


def _static(target: Target) -> int:
    """Bytes of the calibrated scales, one element each: FP32 for global scales, BF16 for all others."""
    return sum(4 if name.endswith("_global_scale") else 2 for name in target.static_scales)
