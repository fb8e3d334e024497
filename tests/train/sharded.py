"""What ranks quantize of their shards; run by torchrun, it is one of them.

`python -m torch.distributed.run ... -m tests.train.sharded FOLDER` writes what each rank came to into the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from train.blend import blended
from train.distributed import World, whole
from train.shards import deployed, gathered, splits

WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the target, the model's options
    "rows": ("int4-g128", {}),
    "channels": ("int8", {}),
    "blocks inside shards": ("fp8-block", WIDE),
    "blocks across shards": ("fp8-block", {"num_key_value_heads": 2}),
    "one scale for all": ("nvfp4", {}),
    "experts": ("fp8-dynamic", {"family": "qwen3-moe", "num_experts": 4}),  # 2, 2 and none
    "experts of two kinds": ("fp8-dynamic", {"family": "qwen3-moe"}),
}


def compared(case: str, world: World) -> dict[str, Any]:
    """Q(W), the blend and W of the shards against those of the whole weights."""
    name, options = CASES[case]
    model = tiny_model(**options)
    spec = TargetSpec.load(name)
    if case == "experts of two kinds":  # an expert kept in BF16: the experts of a stack are not quantized alike
        spec = spec.model_copy(update={"ignore": (*spec.ignore, r"re:.*\.experts\.0\.")})
    target = Target.for_model(spec, model)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    assert world.mesh is not None
    shards = {name: distribute_tensor(tensor, world.mesh, [Shard(0)]) for name, tensor in weights.items()}
    expected, found = target.deployed(weights), deployed(target, shards)
    mixed, expected_mixed = blended(shards, found, 0.3), blended(weights, expected, 0.3)
    sharded = [tensor for tensor in (*found.values(), *mixed.values()) if isinstance(tensor, DTensor)]
    assert len(sharded) == len(found) + len(mixed)
    again = gathered(shards, world, torch.device("cpu"))
    return {
        "names": list(found) == [name for name in weights if name in expected],
        "sharded": all(tensor.placements == (Shard(0),) for tensor in sharded),
        "alone": sorted({splits(target, name, shards[name]) for name in found}),
        "deployed": all(torch.equal(whole(found[name]), expected[name]) for name in expected),
        "blended": all(torch.equal(whole(mixed[name]), expected_mixed[name]) for name in weights),
        "gathered": len(again) == 0 or all(torch.equal(again[name], weights[name]) for name in weights),
        "count": len(again),
        "empty": any(tensor.to_local().numel() == 0 for tensor in shards.values()),
    }


def main(folder: Path) -> None:
    """What the tests ask of every rank."""
    world = World.join()
    found = {case: compared(case, world) for case in CASES}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
