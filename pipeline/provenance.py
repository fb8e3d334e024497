"""Where a run's numbers come from: code, versions, hardware, configuration, command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from quant.hardware import Device

PACKAGES = ("torch", "transformers", "vllm", "compressed-tensors", "llmcompressor", "lm-eval", "accelerate", "scipy")


def provenance(config_json: str, device: Device, *, trust_remote_code: bool) -> dict[str, Any]:
    """Everything needed to know what ran; no secret, no user name, no environment dump."""
    return {
        "boresight": importlib.metadata.version("boresight"),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "device": device.name,
            "kind": device.kind,
            "cores": psutil.cpu_count(logical=False),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "platform": platform.platform(),
        },
        "config_sha256": hashlib.sha256(config_json.encode()).hexdigest(),
        "trust_remote_code": trust_remote_code,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git() -> dict[str, Any]:
    """Commit of the source tree and whether it had changes; nulls outside a checkout."""
    root = Path(__file__).parent.parent

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
