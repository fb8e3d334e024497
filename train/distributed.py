"""The processes that train one policy together: who is first, sums over all, tensors in shards (torch's FSDP2).

Every rank goes through the same step on the same batch: the first alone samples and grades, and hands the result to the
others, so advantages, denominators and the constraint are the same numbers everywhere. Forward and backward alone are
divided (`train.microbatches`), and parameters, gradients and moments are sharded. One process is a world of one: no
group, and nothing here does anything.

CPU tensors go over gloo, a GPU's over nccl; that has not been run on GPUs yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")

# ranks wait while the first samples; that one has died is noticed by what started them
PATIENCE = timedelta(days=2)
# what torchrun tells a rank; vLLM, which makes a world of its own in the first rank's process, would take it for that
TOLD = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
        "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


@dataclass(frozen=True)
class World:
    """The processes that train one policy.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
        mesh: the group, as one dimension that tensors are sharded over; None in a world of one.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def join(cls) -> World:
        """Meet the other ranks that torchrun started, each on a GPU of its own if there are any."""
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
        mesh = init_device_mesh("cuda" if on_gpu else "cpu", (size,)) if size > 1 else None
        for name in TOLD:
            os.environ.pop(name, None)
        return cls(rank, size, mesh)

    @property
    def first(self) -> bool:
        """Whether this rank samples, grades, prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a CPU tensor by its sum over the ranks, on each of them; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def summed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sums over the ranks of numbers that every rank has by the same names, in float64."""
        if self.size == 1:
            return dict(numbers)
        names = sorted(numbers)
        totals = self.sum_(torch.tensor([numbers[name] for name in names], dtype=torch.float64))
        return dict(zip(names, totals.tolist(), strict=True))

    def shared(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on every rank; it travels as a pickle, between our own processes alone."""
        if self.size == 1:
            return make()
        held: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def shard(self, module: Any, *, cpu_offload: bool = False) -> None:
        """Give each rank its share of every parameter, in FP32; forward and backward gather them in BF16, a block at
        a time.

        The shares are FP32 so that a gradient, summed over the ranks in FP32, is not rounded before it reaches the
        masters; the sum is not divided, because a loss already is by what all ranks count. Does nothing in a world of
        one.

        Args:
            module: a causal LM as it was loaded, the same on every rank.
            cpu_offload: keep the shares in the host's memory; not run yet, it needs a GPU.
        """
        if self.mesh is None:
            return
        blocks = set(module._no_split_modules or ())
        for part in (*(m for m in module.modules() if type(m).__name__ in blocks), module):
            for parameter in part.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float().contiguous()
            fully_shard(
                part,
                mesh=self.mesh,
                # the root's too: what is put into a parameter while it is gathered would be lost
                reshard_after_forward=True,
                # inputs stay as they are, so that a block computes what it would in one process
                mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
                offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
            )
            assert isinstance(part, FSDPModule), "fully_shard changes the class"
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
        module.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank chose
        whole = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
        assert not whole, f"not sharded: {whole}"


@contextmanager
def apart() -> Iterator[None]:
    """Hide the ranks' group from a library that makes a world of its own in this process, as vLLM does when it starts.

    It asks whether there is a default group and would join ours, which the other ranks know nothing of. Once started it
    holds on to its own groups, each of one process. c10d offers no public way.
    """
    ours, named = c10d.GroupMember.WORLD, c10d._world.group_count
    if ours is None:
        yield
        return
    c10d._update_default_pg(None)
    try:
        yield
    finally:
        c10d._update_default_pg(ours)
        c10d._world.group_count = max(named, c10d._world.group_count)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; where it is sharded, every rank must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole or in the same shards, on the device of another and sharded as that is;
    nothing is sent."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def place(parameter: nn.Parameter | Tensor, tensor: Tensor) -> None:
    """Copy a tensor, or of a whole one this rank's share, into a parameter of any dtype."""
    parameter.copy_(divided(tensor.to(parameter.dtype), parameter))
