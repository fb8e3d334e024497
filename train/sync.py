"""Policy -> compress -> engine, verified: after a sync the engine provably computes with the target of these weights.

A stale or corrupt engine is this field's most common silent failure, so every sync ends with a read-back: the engine's
effective weights, asked from its own kernels, must be Q(W) for quantized modules, computed from the weights without the
packing that was sent, and the BF16 weights for all others. The kernels must be quantized ones where the target says so.

Sent is what changed since the last sync, in whole layers as the engine loads them; verified is everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.modules import engine_layer, matrices
from quant.target import Target, changed_codes
from quant.verify import VerificationError, fingerprint, require_same
from train.rollout import RolloutEngine
from train.timing import Stopwatch


@dataclass(frozen=True)
class Synced:
    """What the engine holds after a verified sync.

    Attributes:
        step: the training step whose rollouts it makes.
        tensors: the checkpoint-format tensors it holds, in the host's memory.
        sent: share of the checkpoint's bytes that were sent.
        changed: share of quantized codes that differ from the previous sync; None for the first, or without codes.
    """

    step: int
    tensors: Mapping[str, Tensor]
    sent: float
    changed: float | None


def sync(
    weights: Mapping[str, Tensor],
    target: Target | None,
    engine: RolloutEngine,
    *,
    step: int,
    previous: Synced | None,
    clock: Stopwatch,
    scales: Mapping[str, Tensor] | None = None,
    deployed: Mapping[str, Tensor] | None = None,
) -> Synced:
    """Compress, load, verify.

    Args:
        weights: name to BF16 weight, the model's named parameters; not to be changed in place before the next sync,
            which compares with them to see what moved.
        target: what is deployed; None for an engine that serves BF16 (a baseline arm).
        engine: the live engine.
        step: recorded with the result.
        previous: this engine's last sync: what it holds need not be sent again.
        clock: gets "quantize", "sync" and "verify".
        scales: the target's calibrated scales, if it has any.
        deployed: `target.deployed(weights)`, where the caller has it already.

    Raises:
        VerificationError: the engine does not compute with what it was sent; the message names the tensors.
    """
    with clock("quantize"):
        tensors = dict(target.compress(weights.items(), scales) if target else _checkpoint(weights))
        stale = _stale(previous.tensors, tensors) if previous else tensors
    with clock("sync"):
        if stale:
            engine.load(stale)
    with clock("verify"):
        verify(engine, expected_fingerprints(weights, target, scales, deployed), target)
        changed = changed_codes(previous.tensors, tensors) if previous and target else None
    sent = _size(stale) / _size(tensors)
    return Synced(step, {name: tensor.cpu() for name, tensor in tensors.items()}, sent, changed)


def held_before(engine: RolloutEngine, tensors: Mapping[str, Tensor], *, step: int) -> Synced:
    """Give a new engine what another held when its run was stopped: the next sync then sends and counts what it would
    have there, and verifies everything, as always.

    Args:
        engine: the live engine, just started.
        tensors: `Synced.tensors` of the last sync before the stop.
        step: that sync's.
    """
    engine.load(tensors)
    return Synced(step, tensors, 1.0, None)


def verify(engine: RolloutEngine, expected: Mapping[str, str], target: Target | None) -> None:
    """Compare what the engine computes with against what it must.

    Args:
        engine: the live engine.
        expected: `expected_fingerprints`.
        target: what is deployed; None for BF16.

    Raises:
        VerificationError: a weight differs (stale, corrupt, of another model), or a quantized module runs on an
            unquantized kernel.
    """
    held = engine.read_back()
    require_same(expected, held.fingerprints, "weights read back from the rollout engine")
    if target is None:
        return
    for module in target.modules:
        kernel = held.kernels[module]
        if not kernel.startswith("CompressedTensors"):
            raise VerificationError(f"{module} runs on {kernel}, not on a quantized kernel of {target.spec.name}")


def expected_fingerprints(
    weights: Mapping[str, Tensor],
    target: Target | None,
    scales: Mapping[str, Tensor] | None = None,
    deployed: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """What the read-back of an engine must give after a sync to these weights, by checkpoint name.

    Without `deployed`, Q(W) is computed and forgotten matrix by matrix.
    """
    expected = {name: fingerprint(scale) for name, scale in (scales or {}).items()}
    quantized = set(target.shapes) if target else set()
    for name, tensor in weights.items():
        for part, matrix in matrices(name, deployed.get(name, tensor) if deployed else tensor):
            if deployed or part.removesuffix(".weight") not in quantized:
                expected[part] = fingerprint(matrix)
    if target is not None and not deployed:
        for module, value in target.quantized(weights.items()):
            expected[f"{module}.weight"] = fingerprint(value)
    if "lm_head.weight" not in expected:  # tied: the head computes with the embedding
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    return expected


def _checkpoint(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        yield from matrices(name, tensor)


def _stale(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wanted tensors of every engine layer in which any differs from what is held; compared one at a time where the
    wanted are."""
    layers = {engine_layer(name) for name, tensor in wanted.items() if not _same(held[name], tensor)}
    return {name: tensor for name, tensor in wanted.items() if engine_layer(name) in layers}


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.device).view(torch.uint8), other.view(torch.uint8))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
