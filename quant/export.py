"""Write the deployed checkpoint: a compressed-tensors folder that vLLM and transformers load unchanged; a manifest.

The folder appears under its name only when it is complete and proven: written beside, read back from disk, every
tensor's digest compared with those last synced into the rollout engine, then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.storage import publish as publish_folder
from quant.storage import sync_to_disk, writing
from quant.target import Target
from quant.verify import VerificationError, digests, file_digest, require_same

MANIFEST = "manifest.json"
SHARD_BYTES = 4 << 30
MODEL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip


def export(
    weights: Iterable[tuple[str, Tensor]],
    target: Target,
    *,
    model_dir: Path,
    out: Path,
    source_step: int,
    scales: Mapping[str, Tensor] | None = None,
    synced: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compress a model's BF16 tensors with `target` and write a servable folder.

    Args:
        weights: (name, BF16 tensor) pairs of the model's state dict.
        target: the target the rollout engine was synced with.
        model_dir: folder whose config.json and tokenizer the export takes.
        out: the folder to make; replaced if it exists.
        source_step: training step the weights come from.
        scales: the target's calibrated scales, if it has any.
        synced: digests of the tensors last synced into the rollout engine; None for an export before training.

    Returns:
        The manifest: target, scheme, source step, SHA-256 per tensor and per file.

    Raises:
        VerificationError: a tensor on disk is not the one that was last synced; nothing is left under `out`'s name.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(out):
        partial.mkdir(parents=True)
        write_shards(target.compress(weights, scales), partial)
    found = digests(read_tensors(partial))
    if synced is not None:
        require_same(synced, found, f"export of step {source_step} against the last sync")
    manifest = {"source_step": source_step, "tensors": found}
    return publish(partial, out, target, model_dir=model_dir, manifest=manifest)


def publish(
    partial: Path, out: Path, target: Target, *, model_dir: Path, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a folder that holds the packed tensors a servable model, and give it its name.

    Args:
        partial: the folder, beside `out`.
        out: its name when it is complete; replaced if it exists.
        target: what the tensors are.
        model_dir: folder whose config.json and tokenizer it takes.
        manifest: what only the maker knows; the target and the files' SHA-256 are added.

    Returns:
        The whole manifest, as written.
    """
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = target.quantization_config()
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in MODEL_FILES:
        if (model_dir / name).is_file():
            shutil.copy2(model_dir / name, partial / name)
    whole = {
        "target": target.spec.name,
        "scheme": target.spec.model_dump(mode="json"),
        **manifest,
        "files": {path.name: file_digest(path) for path in sorted(partial.iterdir())},
    }
    (partial / MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
    publish_folder(partial, out)
    return whole


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream the tensors of a checkpoint folder, or of one safetensors file, from disk, one at a time."""
    for part in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with safe_open(part, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; it has its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        save_file(dict(tensors), partial)
        sync_to_disk(partial)
        partial.rename(path)


def verify_export(folder: Path) -> dict[str, Any]:
    """Check an export folder against its own manifest, byte by byte.

    Returns:
        The manifest.

    Raises:
        VerificationError: the manifest cannot be read, or a file is missing, added or changed; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise VerificationError(f"{folder / MANIFEST} is missing or damaged") from error
    files = {path.name: file_digest(path) for path in folder.iterdir() if path.name != MANIFEST}
    require_same(manifest["files"], files, f"export {folder}", "files")
    require_same(manifest["tensors"], digests(read_tensors(folder)), f"export {folder}")
    return manifest


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write safetensors of at most SHARD_BYTES each, and the index when there are several."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards) + 1}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in names.items():
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    weight_map = {tensor: names[i] for i, held in enumerate(shards, 1) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
