"""Policy -> compress -> engine, verified: after a sync the engine provably computes with the target of these weights.

A stale or corrupt engine is this field's most common silent failure, so every sync ends with a read-back: the engine's
effective weights, asked from its own kernels, must be what the target says (dequantized from the packed tensors) for
quantized modules and the BF16 weights for all others. The kernels must be quantized ones where the target says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quant.target import Target, changed_codes
from quant.verify import VerificationError, fingerprint, require_same
from train.rollout import RolloutEngine
from train.timing import Stopwatch


@dataclass(frozen=True)
class Synced:
    """What the engine holds after a verified sync.

    Attributes:
        step: the training step whose rollouts it makes.
        tensors: checkpoint-format tensors that were loaded.
        deployed: name to BF16 Q(W) [out, in] for the quantized weights; empty for a BF16 engine.
        changed: share of quantized codes that differ from the previous sync; None for the first, or without codes.
    """

    step: int
    tensors: Mapping[str, Tensor]
    deployed: Mapping[str, Tensor]
    changed: float | None


def sync(
    weights: Mapping[str, Tensor],
    target: Target | None,
    engine: RolloutEngine,
    *,
    step: int,
    previous: Synced | None,
    clock: Stopwatch,
) -> Synced:
    """Compress, load, verify.

    Args:
        weights: name to BF16 weight, the model's named parameters.
        target: what is deployed; None for an engine that serves BF16 (a baseline arm).
        engine: the live engine.
        step: recorded with the result.
        previous: the last sync, for the share of codes that changed.
        clock: gets "quantize", "sync" and "verify".

    Raises:
        VerificationError: the engine does not compute with what was sent; the message names the tensors.
    """
    with clock("quantize"):
        tensors = dict(target.compress(weights.items())) if target else dict(weights)
        deployed = target.dequantize(tensors) if target else {}
    with clock("sync"):
        engine.load(tensors)
    with clock("verify"):
        verify(engine, weights, deployed, target)
        changed = changed_codes(previous.tensors, tensors) if previous and target else None
    return Synced(step, tensors, deployed, changed)


def verify(
    engine: RolloutEngine, weights: Mapping[str, Tensor], deployed: Mapping[str, Tensor], target: Target | None
) -> None:
    """Compare what the engine computes with against what it must.

    Raises:
        VerificationError: a weight differs (stale, corrupt, of another model), or a quantized module runs on an
            unquantized kernel.
    """
    expected = {name: fingerprint(deployed.get(name, weight)) for name, weight in weights.items()}
    if "lm_head.weight" not in expected:  # tied: the head computes with the embedding
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    held = engine.read_back()
    require_same(expected, held.fingerprints, "weights read back from the rollout engine")
    if target is None:
        return
    for module in target.modules:
        kernel = held.kernels[module]
        if not kernel.startswith("CompressedTensors"):
            raise VerificationError(f"{module} runs on {kernel}, not on a quantized kernel of {target.spec.name}")
