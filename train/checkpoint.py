"""Checkpoints of a training run: FP32 masters, AdamW moments, the loop's state and every generator; no pickle.

A checkpoint of several ranks is gathered to the first and is what one process would have written, so any number of
ranks can go on from it.

A checkpoint is a snapshot in memory, which stalls training for a copy, and files that a thread writes while training
goes on. A folder has its name only when all of it is on disk, and a manifest of digests tells a whole one from one that
was damaged since. Problems and seeds of a step are functions of (seed, step), so a step's number is the sampler's
position. What the engine held is part of it: a resumed run starts its engine there, so its first sync sends and counts
what an uninterrupted run's would.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import BoresightError
from quant.storage import publish, remove, writing
from quant.verify import file_fingerprint
from train.distributed import divided, place, whole
from train.multiplier import AnyMultiplier, restored
from train.policy import Policy
from train.random_state import random_state, restore_random_state
from train.schedule import LengthSurge

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
APART = ("scales", "critic", "held")  # fields of the state that are tensors, each in a file of its own


class CheckpointError(BoresightError):
    """A checkpoint is damaged, or does not belong to the model that was loaded."""


@dataclass(frozen=True)
class LoopState:
    """What the loop carries from step to step besides the policy.

    Attributes:
        step: steps done, the index of the next.
        multiplier: lambda for the next step, with its rule.
        first_discrepancy: the first step's mean |probability difference|; None before it.
        tolerance: c, as given, or fixed by the first step and None before it.
        scales: the target's calibrated scales, by checkpoint name; empty when it has none.
        surge: what the detector of the length-triggered schedule has seen of the response lengths.
        tolerance_floor: the first step's gap without quantization; None where the tolerance does not ask for it.
        critic: the critic's weights, moments and reference discount; empty where there is none, and before a step.
        held: the checkpoint-format tensors that the engine held in the last step; empty before one.
    """

    step: int
    multiplier: AnyMultiplier
    first_discrepancy: float | None
    tolerance: float | None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    surge: LengthSurge = field(default_factory=LengthSurge)
    tolerance_floor: float | None = None
    critic: Mapping[str, Tensor] = field(default_factory=dict)
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON has it."""
        return asdict(replace(self, scales={}, critic={}, held={}))


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, which nothing changes any more.

    Attributes:
        state: of the loop; its tensors are made anew by every step and never written to.
        files: file name to tensors, on the CPU.
        base: digest of the frozen weights that the masters are a change of; None where they are the weights.
    """

    state: LoopState
    files: Mapping[str, Mapping[str, Tensor]]
    base: str | None


class CheckpointWriter:
    """Writes a run's checkpoints behind its training, one at a time, and keeps the newest.

    Use it as a context manager: leaving the block waits for the last one. What a write failed with is raised by the
    next `save`, by `wait`, or on leaving the block.

    Holds a second copy of masters and moments in memory, 12 bytes per parameter, from the first checkpoint on: pages
    that are there already are copied into ten times faster than new ones.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Make a writer.

        Args:
            folder: where checkpoints lie.
            keep: how many of the newest to keep.
        """
        self.folder = folder
        self.keep = keep
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, policy: Policy, state: LoopState) -> None:
        """Take a snapshot and have the first rank write it; waits for the one before.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        snapshot = take_snapshot(policy, state, self._copies)
        if policy.world.first:
            self._pending = self._thread.submit(write_checkpoint, self.folder, snapshot, keep=self.keep)

    def wait(self) -> None:
        """Return when what was saved is on disk.

        Raises:
            StorageError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:  # else the error that ends the run is the one to tell
            self.wait()


@torch.no_grad()
def take_snapshot(policy: Policy, state: LoopState, copies: dict[str, Tensor] | None = None) -> Snapshot:
    """Copy what the next step will change; on other ranks than the first, help to gather it.

    Args:
        policy: masters and moments.
        state: of the loop, after a step.
        copies: CPU tensors of an earlier snapshot that is no longer needed, to copy into; new ones are added.
    """
    copies = {} if copies is None else copies

    def copied(name: str, tensor: Tensor) -> Tensor:
        tensor = whole(tensor)
        if not policy.world.first:
            return torch.empty(0)
        if name not in copies:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copies[name].copy_(tensor)

    moments = policy.optimizer.state
    files: dict[str, Mapping[str, Tensor]] = {
        "masters": {name: copied(name, master) for name, master in policy.masters.items()},
        "optimizer": {
            f"{name}/{moment}": copied(f"{name}/{moment}", moments[master][moment])
            for name, master in policy.masters.items()
            for moment in MOMENTS
            if master in moments
        },
        "random": random_state(),
        **{name: {key: value.cpu() for key, value in getattr(state, name).items()} for name in APART},
    }
    return Snapshot(state, files, policy.learned.base)


def write_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write `folder/checkpoint-<step>` so that it is there whole or not at all, then remove older ones.

    Checkpoints of later steps are removed too: the run went back behind them, because they were damaged.

    Args:
        folder: where checkpoints lie.
        snapshot: what to write.
        keep: how many of the newest to keep, this one included.

    Raises:
        StorageError: the system refused; the checkpoints that were there are untouched.
    """
    out = folder / f"{PREFIX}{snapshot.state.step:06d}"
    partial = folder / f".{out.name}.partial"
    try:
        with writing(out):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in snapshot.files.items():
                metadata = {"base": snapshot.base} if name == "masters" and snapshot.base else None
                whole = {key: _whole(value) for key, value in tensors.items()}
                save_file(whole, partial / f"{name}.safetensors", metadata=metadata)
            (partial / "state.json").write_text(json.dumps(snapshot.state.numbers(), indent=2) + "\n")
            manifest = {path.name: file_fingerprint(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        publish(partial, out)
        with writing(folder):
            for other in (*_steps_before(out)[keep - 1 :], *_steps_after(out), *folder.glob(f".{PREFIX}*")):
                remove(other)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
        raise
    return out


def save_checkpoint(folder: Path, policy: Policy, state: LoopState, *, keep: int = 2) -> Path:
    """Write `folder/checkpoint-<step>` now, and return it."""
    return write_checkpoint(folder, take_snapshot(policy, state), keep=keep)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None when they are what was written."""
    try:
        manifest: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_fingerprint(path) != expected:
            return f"{name} is damaged (its digest is not the manifest's)"
    return None


def latest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest whole checkpoint, or None where there has been none.

    Args:
        folder: where checkpoints lie.
        warn: told of each damaged one that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    found: list[str] = []
    for checkpoint in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        found.append(f"{checkpoint}: {wrong}")
        warn(f"{found[-1]}; going back to the one before")
    if found:
        raise CheckpointError(
            f"no checkpoint is whole ({'; '.join(found)}); restore one, or remove {folder} to train from the start"
        )
    return None


@torch.no_grad()
def load_checkpoint(folder: Path, policy: Policy) -> LoopState:
    """Put a checkpoint's masters, moments and generators in place and return the loop's state.

    Raises:
        CheckpointError: its files are damaged, or not a checkpoint's, or its masters are adapters of other frozen
            weights than the policy's.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise CheckpointError(f"{folder}: {wrong}")
    try:
        return _put_in_place(folder, policy)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # whole, and of something else
        raise CheckpointError(f"{folder}: not a checkpoint of this model: {type(error).__name__}: {error}") from error


def _put_in_place(folder: Path, policy: Policy) -> LoopState:
    with safe_open(folder / "masters.safetensors", "pt") as file:
        base = (file.metadata() or {}).get("base")
    if base != policy.learned.base:
        raise CheckpointError(
            f"{folder} was made over other frozen weights than those that were loaded; restore the model that the run "
            f"began with, or start a new run"
        )
    for name, master in load_file(folder / "masters.safetensors").items():
        place(policy.masters[name], master)
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("/")
        master = policy.masters[name]
        moments = policy.optimizer.state[master]
        moments[moment] = value.to(policy.device) if moment == "step" else divided(value, master)
    restore_random_state(load_file(folder / "random.safetensors"))
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Any] = {name: load_file(folder / f"{name}.safetensors") for name in APART}
    records: dict[str, Any] = {"multiplier": restored(state["multiplier"]), "surge": LengthSurge(**state["surge"])}
    return LoopState(**state | records | tensors)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: safetensors refuses a view, such as one expert of a fused matrix."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _steps_before(checkpoint: Path) -> list[Path]:
    """The checkpoints of earlier steps, newest first."""
    return sorted((c for c in checkpoint.parent.glob(f"{PREFIX}*") if c.name < checkpoint.name), reverse=True)


def _steps_after(checkpoint: Path) -> list[Path]:
    return [c for c in checkpoint.parent.glob(f"{PREFIX}*") if c.name > checkpoint.name]
