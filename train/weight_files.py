"""Weights on their way to servers: a folder of safetensors that all of them read, and a marker that says it is whole.

Files, because every server needs the same checkpoint-format tensors: they are written once, whatever the number of
servers, their GPUs and their nodes, and each reads what it needs. Not flushed to disk: they live as long as one sync.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from quant.errors import BoresightError
from quant.export import read_tensors, write_shards
from quant.storage import writing

MARKER = "complete.json"  # file name to bytes; written last


class WeightFilesError(BoresightError):
    """A folder of weights is not there, not whole, or not this server's to read."""


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a new folder, then its marker.

    Raises:
        StorageError: the system refuses.
    """
    with writing(folder):
        folder.mkdir(parents=True)
        write_shards(tensors.items(), folder)
        partial = folder / f".{MARKER}.partial"
        partial.write_text(json.dumps(_sizes(folder)))
        partial.rename(folder / MARKER)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream the tensors of a whole folder; what is wrong with it is known before the first.

    Raises:
        WeightFilesError: no marker, or files of other sizes than it says.
    """
    try:
        promised = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise WeightFilesError(
            f"{folder} has no readable {MARKER}: it is not whole, or this server does not share that folder with the "
            f"trainer (train.rollout.servers.sync_dir must be one that all servers can read)"
        ) from error
    found = _sizes(folder)
    if found != promised:
        raise WeightFilesError(f"{folder} holds {found}, its {MARKER} promises {promised}")
    return read_tensors(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
