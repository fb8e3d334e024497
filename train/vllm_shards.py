"""The whole of a matrix that vLLM keeps in shards, one on each GPU of a replica: for the read-back, layer by layer.

Called by every rank of the replica at the same layer. Experts that are spread over ranks as wholes need no joining.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joined(layer: Any, shard: Tensor, part: int = 0) -> Tensor:
    """A linear layer's or an embedding's matrix (or bias), joined from all ranks of its replica.

    Args:
        layer: it.
        shard: this rank's share, as the checkpoint orders it.
        part: which of the matrices that vLLM fused into the layer; keys and values (1, 2) may be on several ranks,
            where there are more ranks than heads.
    """
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear

    if layer.tp_size == 1 or isinstance(layer, ReplicatedLinear):
        return shard
    if isinstance(layer, RowParallelLinear):  # its bias, one-dimensional, is whole everywhere
        return shard if shard.dim() == 1 else get_tp_group().all_gather(shard.contiguous(), 1)
    whole = get_tp_group().all_gather(shard.contiguous(), 0)
    if isinstance(layer, QKVParallelLinear) and part > 0 and layer.num_kv_head_replicas > 1:
        return torch.cat(whole.chunk(layer.tp_size)[:: layer.num_kv_head_replicas])
    return whole


def joined_expert(layer: Any, shard: Tensor, along: int) -> Tensor:
    """One matrix [out, in] of a mixture's expert, of whose intermediate width every rank of the replica has a share.

    Args:
        layer: the layer of experts.
        shard: this rank's share.
        along: the dimension that is shared: 0 for gate and up, 1 for down.
    """
    from vllm.distributed import get_tp_group

    if layer.moe_config.moe_parallel_config.tp_size == 1:
        return shard
    return get_tp_group().all_gather(shard.contiguous(), along)
