"""Where a model comes from: a hub id, a folder, or a server that someone else runs.

Left out: revisions of a hub id (download the one you mean and name its folder), and any key on a command line: the key
of an endpoint is read from the environment, where it is used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from quant.errors import BoresightError
from quant.server_process import KEY_VARIABLE
from quant.tables import shown

ALLOWED = (
    "a hub id (owner/name), a model folder, or the URL of an endpoint (http://host:port/v1, or .../v1#served-name)"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# Of a hub repository: no code, no other formats of the same weights, no folders in it.
NEEDED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
NOT_NEEDED = ("*/*", "consolidated*")


class SourceError(BoresightError):
    """The model cannot be found where it is said to be."""


@dataclass(frozen=True)
class ModelSource:
    """One model, as the user named it.

    Attributes:
        given: the user's words.
        kind: what they mean.
        location: the hub id, the folder's path, or the endpoint's URL up to /v1.
        served_name: the name to ask an endpoint for; None: it serves only one.
    """

    given: str
    kind: Literal["hub", "folder", "endpoint"]
    location: str
    served_name: str | None = None

    @classmethod
    def parse(cls, given: str) -> ModelSource:
        """Tell the three apart. A folder that exists is a folder, whatever else its name could mean.

        Raises:
            SourceError: it is none of the three, or a URL that is not an endpoint's.
        """
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
            return cls._endpoint(given)
        path = os.path.expanduser(given)  # os.path: a name that is too long, or has a NUL, is just not there
        if os.path.isdir(path):
            return cls(given, "folder", str(Path(path)))
        if os.path.exists(path):
            raise SourceError(f"model {shown(given)}: a file, not a folder; allowed: {ALLOWED}")
        if HUB_ID.fullmatch(given):
            return cls(given, "hub", given)
        raise SourceError(f"model {shown(given)}: no such folder, and no hub id; allowed: {ALLOWED}")

    @classmethod
    def _endpoint(cls, given: str) -> ModelSource:
        try:
            url = urlsplit(given)
            _ = url.port  # read lazily, and a port of letters is found only then
        except ValueError as error:
            raise SourceError(f"model {shown(given)}: no URL: {error}; allowed: {ALLOWED}") from error
        if url.username is not None or url.password is not None:
            raise SourceError(f"model: a URL with a user or a password in it; give the key in {KEY_VARIABLE}")
        whole = url.scheme in ("http", "https") and url.hostname and url.path.rstrip("/").endswith("/v1")
        if not whole or url.query:
            raise SourceError(f"model {shown(given)}: not the URL of an endpoint; allowed: {ALLOWED}")
        location = f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"
        return cls(given, "endpoint", location, url.fragment or None)

    def folder(self) -> Path:
        """The model's folder, downloaded where it comes from the hub.

        Raises:
            SourceError: an endpoint has none; the hub has no such model or cannot be reached; or a file is missing.
        """
        if self.kind == "endpoint":
            raise SourceError(f"model {self.given!r}: an endpoint does not show its files; a folder or a hub id does")
        folder = self._download() if self.kind == "hub" else Path(self.location)
        missing = [
            what
            for what, there in (
                ("config.json", (folder / "config.json").is_file()),
                ("*.safetensors", any(path.is_file() for path in folder.glob("*.safetensors"))),
                (f"tokenizer ({', '.join(TOKENIZERS)})", any((folder / name).is_file() for name in TOKENIZERS)),
            )
            if not there
        ]
        if missing:
            raise SourceError(f"model {self.given!r}: {folder} has no {', no '.join(missing)}")
        return folder

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return Path(snapshot_download(self.location, allow_patterns=list(NEEDED), ignore_patterns=list(NOT_NEEDED)))
        except GatedRepoError as error:
            why = "its owner asks for consent first, and this machine's hub token has none"
            raise SourceError(f"model {self.given!r}: {why}") from error
        except RepositoryNotFoundError as error:
            raise SourceError(f"model {self.given!r}: no such folder here, and no such model on the hub") from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            where = "no such folder here, and the hub cannot give it"
            raise SourceError(f"model {self.given!r}: {where}: {type(error).__name__}: {reason}") from error
