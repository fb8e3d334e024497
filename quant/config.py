"""Torch-free description of a quantization target, read from one small TOML file.

A target file is a thin layer over a compressed-tensors scheme: `[weights]` holds QuantizationArgs fields verbatim.
What the scheme means in tensors is `quant.target`; whether this machine can run it is `quant.hardware`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quant.errors import BoresightError

TARGETS_DIR = Path(__file__).parent.parent / "configs" / "targets"


class Frozen(BaseModel):
    """Base of every config table: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class WeightArgs(Frozen):
    """How one weight matrix is quantized; field names are compressed-tensors' QuantizationArgs."""

    num_bits: Literal[4] = 4
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["group"] = "group"
    group_size: int = Field(128, ge=32)

    @model_validator(mode="after")
    def _kernel_granularity(self) -> WeightArgs:
        if self.group_size % 32:
            raise ValueError(f"group_size must be a multiple of 32 (the kernels' granularity), got {self.group_size}")
        return self


class TargetError(BoresightError, ValueError):
    """The quantization target cannot be used: unknown, malformed, or not for this model."""


class TargetSpec(Frozen):
    """One deployment target: which modules are quantized, how, and in which checkpoint format."""

    name: str
    description: str
    format: Literal["pack-quantized"] = "pack-quantized"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    weights: WeightArgs

    @classmethod
    def load(cls, name_or_path: str) -> TargetSpec:
        """Read a shipped target by name (`int4-g128`) or a user's own by path (`my/target.toml`).

        Raises:
            TargetError: no such target, not TOML, or a field is wrong; the message names the file.
        """
        is_path = name_or_path.endswith(".toml")
        path = Path(name_or_path) if is_path else TARGETS_DIR / f"{name_or_path}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in TARGETS_DIR.glob("*.toml")))
            raise TargetError(f"no quantization target {name_or_path!r}; known: {known}, or a path to a .toml file")
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TargetError(f"{path}: not valid TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise TargetError(f"{path}: {field}: {first['msg']}, got {first['input']!r}") from error


class QuantConfig(Frozen):
    """The `[quant]` table."""

    target: str = Field("int4-g128", description="a file name in configs/targets, or a path to a target file")
