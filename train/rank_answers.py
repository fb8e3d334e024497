"""What every rank of a server says to one question, as files in a folder that server and trainer share.

vLLM asks all replicas behind a server (`--data-parallel-size`) and passes on what the first says. A file for each rank
leaves none out, and needs no collective among replicas that may be in the middle of a step.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from quant.errors import BoresightError

PATIENCE_SECONDS = 10.0  # for a network file system to show what was written
POLL_SECONDS = 0.05


class RankAnswersError(BoresightError):
    """A rank could not say anything, or not all have."""


def say(folder: Path, rank: str, said: Any) -> None:
    """Write a rank's answer, whole or not at all.

    Raises:
        RankAnswersError: the folder is not there, or not this server's to write.
    """
    partial = folder / f".{rank}.partial"
    try:
        partial.write_text(json.dumps(said))
        partial.rename(folder / f"{rank}.json")
    except OSError as error:
        raise RankAnswersError(
            f"{folder} cannot be written ({error.strerror}): this server does not share that folder with the trainer "
            f"(train.rollout.servers.sync_dir must be one that all servers can read and write)"
        ) from error


def said(folder: Path, ranks: int) -> list[Any]:
    """The answers of that many ranks, in the order of their names.

    Raises:
        RankAnswersError: there are fewer, or more.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(found := sorted(folder.glob("*.json"))) < ranks and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if len(found) != ranks:
        raise RankAnswersError(f"{len(found)} ranks of {ranks} answered: {[path.stem for path in found]}")
    return [json.loads(path.read_text()) for path in found]
