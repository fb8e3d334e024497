"""What a mixture's experts compute with in vLLM's worker, matrix by matrix under the checkpoint's names.

Their kernel multiplies only what a router sends it, so it is not asked, as a linear layer's is (`train.vllm_worker`):
the tensors that it reads are, and turned into bf16(code * scale) here. For that their layout must be known. So on a GPU
`MOE_BACKEND` makes vLLM take the one backend that computes, in every format below, with the layout of the checkpoint:
`w13` [E, gate above up, in] and `w2` [E, out, in], row by row. The others shuffle, swap, pad or requantize (Marlin,
FlashInfer, DeepGEMM); whatever is not in `READERS` is refused, never guessed.

Read from vLLM 0.32's sources: `fused_moe/oracle/*.py` says who converts what, `fused_moe/fused_moe.py` what the kernels
compute. Scales are those that the kernel holds: after a reload they are other tensors than the layer's. With expert
parallelism a rank answers for its own experts. Left out: experts held twice (its load balancing); zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant.verify import VerificationError
from train.vllm_shards import joined_expert

MOE_BACKEND = "triton"  # vLLM's --moe-backend, for rollouts on a GPU; a CPU has no choice


def experts_kernel(layer: Any) -> str:
    """The class of the quantization and that of the kernel that multiplies."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return f"{type(layer.quant_method).__name__}/{type(getattr(kernel, 'fused_experts', None)).__name__}"


def expert_weights(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every expert's gate, up and down projection [out, in] in BF16, as `NAME.3.gate_proj.weight`.

    Args:
        layer: a RoutedExperts of vLLM.
        name: of the module that has the experts, in the checkpoint.

    Raises:
        VerificationError: it is not known what this kernel reads, or it is not of the expected shape; names both.
    """
    read = READERS.get(experts_kernel(layer))
    if read is None:
        raise VerificationError(f"{name}: no exact read-back of experts that {experts_kernel(layer)} computes with")
    _, width, hidden = _shape(layer)
    for expert, place in _places(layer, name):
        try:
            gate_up, down = read(layer, place)
        except VerificationError as error:
            raise VerificationError(f"{name}, {experts_kernel(layer)}: {error}") from error
        if gate_up.shape != (2 * width, hidden) or down.shape != (hidden, width):
            raise VerificationError(
                f"{name}: {experts_kernel(layer)} computes with matrices {tuple(gate_up.shape)} and "
                f"{tuple(down.shape)}, not {(2 * width, hidden)} and {(hidden, width)}"
            )
        gate, up = gate_up.chunk(2)
        yield f"{name}.{expert}.gate_proj.weight", joined_expert(layer, gate, 0)
        yield f"{name}.{expert}.up_proj.weight", joined_expert(layer, up, 0)
        yield f"{name}.{expert}.down_proj.weight", joined_expert(layer, down, 1)


def _places(layer: Any, name: str) -> list[tuple[int, int]]:
    """The experts of this rank, as the checkpoint counts them, and where the kernel has each: all of them, or those
    that expert parallelism gave this rank.

    Raises:
        VerificationError: some are held twice (vLLM's expert load balancing), not where vLLM says, or in parts that
            several replicas have.
    """
    here, parallel = len(layer.w13_weight), layer.moe_config.moe_parallel_config
    if parallel.dp_size > 1 and not parallel.use_ep:
        raise VerificationError(f"{name}: replicas share each expert's width; add --enable-expert-parallel")
    if layer.moe_config.num_experts != layer.moe_config.num_logical_experts:
        raise VerificationError(f"{name}: vLLM holds some experts twice (eplb), there is no exact read-back of those")
    placed = layer.expert_map_manager.expert_map  # [experts of the layer]: its place on this rank, or -1
    places = range(layer.global_num_experts) if placed is None else placed.tolist()
    found = [(expert, place) for expert, place in enumerate(places) if place >= 0]
    if sorted(place for _, place in found) != list(range(here)):
        raise VerificationError(f"{name}: {here} experts are here, and vLLM's places for them are {found}")
    return found


def _kernel(layer: Any) -> Any:
    return layer.quant_method.moe_kernel.fused_experts


def _shape(layer: Any) -> tuple[int, int, int]:
    """Experts on this rank, its share of their intermediate width, and the hidden size; without a kernel's padding."""
    config = layer.moe_config
    return len(layer.w13_weight), config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded


def _read_plain(layer: Any, expert: int) -> tuple[Tensor, Tensor]:
    """BF16 as in the checkpoint."""
    return layer.w13_weight[expert], layer.w2_weight[expert]


def _read_scaled(layer: Any, expert: int) -> tuple[Tensor, Tensor]:
    """FP8 or INT8 codes [E, out, in], with scales [E, out, 1] of rows or [E, out / b, in / b] of blocks."""
    kernel = _kernel(layer)
    return (
        _scaled(layer.w13_weight[expert], kernel.w1_scale[expert], kernel.block_shape),
        _scaled(layer.w2_weight[expert], kernel.w2_scale[expert], kernel.block_shape),
    )


def _scaled(codes: Tensor, scale: Tensor, block: list[int] | None) -> Tensor:
    if codes.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise VerificationError(f"experts' codes are {codes.dtype}, neither FP8 nor INT8")
    return (codes.float() * spread(scale, block, codes.shape)).bfloat16()


def spread(scale: Tensor, block: Sequence[int] | None, shape: Sequence[int]) -> Tensor:
    """The scale of each element of a matrix [out, in], FP32.

    Args:
        scale: [out, 1], or one per block, the last row and column of blocks perhaps cut off by the matrix's end.
        block: its height and width; None for one scale per row.
        shape: the matrix's.

    Raises:
        VerificationError: the scales are not that many.
    """
    height, width = block or (1, shape[1])
    blocks = (-(-shape[0] // height), -(-shape[1] // width))
    if tuple(scale.shape) != blocks:
        raise VerificationError(f"a matrix {tuple(shape)} has scales {tuple(scale.shape)} where {blocks} are known")
    return scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def _read_nibbles(layer: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Symmetric INT4 codes [E, out, in / 2], two in a byte, the lower first; scales [E, out, groups]."""
    kernel = _kernel(layer)
    if kernel.quant_config.w1_zp is not None or kernel.quant_config.w2_zp is not None:
        raise VerificationError("no exact read-back of experts with zero points")
    group = kernel.block_shape[1]
    return (
        _nibbles(layer.w13_weight[expert], kernel.w1_scale[expert], group),
        _nibbles(layer.w2_weight[expert], kernel.w2_scale[expert], group),
    )


def _nibbles(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    if packed.dtype != torch.uint8:
        raise VerificationError(f"experts' codes are {packed.dtype}, not two to a byte")
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1).float() - 8
    return (codes * spread(scale, (1, group), codes.shape)).bfloat16()


def _read_packed(layer: Any, expert: int) -> tuple[Tensor, Tensor]:
    """BF16, unpacked from the order in which vLLM's CPU kernel reads them; it may pad the intermediate width."""
    isa, width = _kernel(layer).isa, _shape(layer)[1]
    gate_up, down = (_unpacked(tensor[expert], isa) for tensor in (layer.w13_weight, layer.w2_weight))
    gate, up = gate_up.chunk(2)
    return torch.cat((gate[:width], up[:width])), down[:, :width]


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    order = _packing_order(tuple(packed.shape), packed.dtype, isa)
    return torch.empty_like(packed).flatten().index_copy_(0, order, packed.flatten()).view_as(packed)


@lru_cache(2)
def _packing_order(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> Tensor:
    """Where each element of a packed expert matrix comes from: positions are packed in its place, 16 bits at a time."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    places = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(torch.int16).view(-1, 2)
    low, high = (
        cpu_prepack_moe_weight(half.contiguous().view(dtype).view(1, *shape), isa).view(torch.uint16).flatten().long()
        for half in places.unbind(1)
    )
    return low | high << 16


# by `experts_kernel`, the class itself: one derived from it may compute with something else
READERS: dict[str, Callable[[Any, int], tuple[Tensor, Tensor]]] = {
    **{f"UnquantizedFusedMoEMethod/{kind}CPUUnquantizedExperts": _read_packed for kind in ("", "X86", "Arm", "Power")},
    "UnquantizedFusedMoEMethod/TritonExperts": _read_plain,
    "CompressedTensorsW8A8Fp8MoEMethod/TritonExperts": _read_scaled,
    "CompressedTensorsW8A8Int8MoEMethod/TritonExperts": _read_scaled,
    "CompressedTensorsWNA16MoEMethod/TritonWNA16Experts": _read_nibbles,
}
