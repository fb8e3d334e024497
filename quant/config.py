"""Torch-free description of a quantization target, read from one small TOML file.

A target file is a thin layer over a compressed-tensors scheme: `[weights]` and `[input_activations]` hold
QuantizationArgs fields verbatim, `[needs]` says what its kernels run on. What the scheme means in tensors is
`quant.target`; whether this machine can run it is `quant.hardware`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from quant.errors import BoresightError
from quant.tables import ParseError, describe, parse_toml, shown

TARGETS_DIR = Path(__file__).parent.parent / "configs" / "targets"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = {"con", "prn", "aux", "nul"} | {f"{device}{number}" for device in ("com", "lpt") for number in range(10)}


class Frozen(BaseModel):
    """Base of every config table: immutable; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _folder_name(name: str) -> str:
    if not FOLDER_NAME.fullmatch(name) or name.endswith(".") or name.partition(".")[0].lower() in RESERVED:
        raise ValueError(
            f"must be the name of a folder: up to 100 letters, digits, '.', '_' and '-', beginning with a letter or "
            f"digit, not ending with '.', and no device of Windows', got {shown(name)}"
        )
    return name


# a name that becomes a folder's: it cannot lead out of its parent, and every system can have it
FolderName = Annotated[str, AfterValidator(_folder_name)]


class QuantArgs(Frozen):
    """How a weight or an activation is quantized; names and meanings are compressed-tensors' QuantizationArgs."""

    num_bits: Literal[4, 8]
    type: Literal["int", "float"]
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block", "token"]
    symmetric: bool = True
    group_size: int | None = Field(None, ge=16)
    block_structure: tuple[PositiveInt, PositiveInt] | None = None
    dynamic: bool | Literal["local"] = False
    scale_dtype: Literal["torch.uint8", "torch.float8_e4m3fn"] | None = None

    @model_validator(mode="after")
    def _granularity(self) -> QuantArgs:
        if (self.group_size is not None) != (self.strategy in ("group", "tensor_group")):
            raise ValueError(f"group_size goes with strategy 'group' or 'tensor_group', strategy is {self.strategy!r}")
        if (self.block_structure is not None) != (self.strategy == "block"):
            raise ValueError(f"block_structure goes with strategy 'block', strategy is {self.strategy!r}")
        if self.type == "int" and self.group_size is not None and self.group_size % 32:
            raise ValueError(f"group_size must be a multiple of 32 (the kernels' granularity), got {self.group_size}")
        if self.type == "float" and not self.symmetric:
            raise ValueError("a floating point type is symmetric")
        return self


class Needs(Frozen):
    """What the target's kernels run on in vLLM; a device that is left out has no kernel for it.

    Attributes:
        cpu: instruction sets, as /proc/cpuinfo names them.
        cuda: least compute capability (major, minor).
    """

    cpu: tuple[str, ...] | None = None
    cuda: tuple[int, int] | None = None


class TargetError(BoresightError, ValueError):
    """The quantization target cannot be used: unknown, malformed, or not for this model."""


class TargetSpec(Frozen):
    """One deployment target: which modules are quantized, how, and what that needs.

    Attributes:
        ignore: modules kept in BF16: names, or `re:` patterns, or class names.
        keep_first_layers, keep_last_layers: decoder layers at either end kept in BF16 as a whole.
        kv_cache: "fp8" stores keys and values as FP8 with one static scale each per layer.
        format: checkpoint format, where vLLM wants another than the one compressed-tensors infers from the scheme.
    """

    name: str
    description: str
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head", r"re:.*\.mlp\.gate$")
    keep_first_layers: int = Field(0, ge=0)
    keep_last_layers: int = Field(0, ge=0)
    weights: QuantArgs
    input_activations: QuantArgs | None = None
    kv_cache: Literal["bf16", "fp8"] = "bf16"
    format: Literal["pack-quantized"] | None = None
    needs: Needs

    @field_validator("targets", "ignore")
    @classmethod
    def _patterns(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                re.compile(name.removeprefix("re:"))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{shown(name)} is not a regular expression: {error}") from error
        return names

    @model_validator(mode="after")
    def _roles(self) -> TargetSpec:
        if self.weights.dynamic or self.weights.strategy == "token":
            raise ValueError("weights are static: their scales are in the checkpoint")
        inputs = self.input_activations
        if inputs is not None and inputs.strategy in ("channel", "block"):
            raise ValueError(f"input_activations.strategy {inputs.strategy!r} is for weights")
        if inputs is not None and inputs.dynamic is False and (inputs.strategy != "tensor" or not inputs.symmetric):
            raise ValueError(
                f"static input_activations are calibrated symmetrically, with strategy 'tensor', got strategy "
                f"{inputs.strategy!r} and symmetric {inputs.symmetric}; make them dynamic"
            )
        return self

    @property
    def width_multiple(self) -> int:
        """What the input widths of quantized matrices must be multiples of: the scheme's group, the kernels' tile."""
        group = self.weights.group_size or (self.weights.block_structure or (1, 1))[1]
        return max(group, 32 if self.weights.num_bits == 4 else 1)

    @property
    def height_multiple(self) -> int:
        """What the output rows of quantized matrices must be multiples of."""
        return (self.weights.block_structure or (32 if self.weights.num_bits == 4 else 1, 1))[0]

    @property
    def read_back(self) -> bool:
        """Whether a live engine's weights can be read back exactly through its kernels (`train.vllm_worker`): where
        activations stay BF16, are scaled per token under one weight scale per row, or in groups under one per block."""
        inputs, weights = self.input_activations, self.weights
        if inputs is None:
            return True
        if not (inputs.dynamic is True and inputs.symmetric and inputs.num_bits == 8):
            return False
        if inputs.strategy == "group":
            return weights.strategy == "block"
        return inputs.strategy == "token" and (
            weights.strategy == "channel" or (weights.num_bits == 4 and inputs.type == "int")
        )

    def keeps(self, module: str) -> bool:
        """Whether `ignore` keeps this module, by its name, in BF16."""
        return any(
            re.match(name.removeprefix("re:"), module) is not None if name.startswith("re:") else name == module
            for name in self.ignore
        )

    @property
    def calibrated(self) -> bool:
        """Whether the checkpoint holds scales that only data can give: static activations, or an FP8 KV cache."""
        return self.kv_cache == "fp8" or (
            self.input_activations is not None and self.input_activations.dynamic is not True
        )

    @classmethod
    def load(cls, name_or_path: str) -> TargetSpec:
        """Read a shipped target by name (`int4-g128`) or a user's own by path (`my/target.toml`).

        Raises:
            TargetError: no such target, not TOML, or a field is wrong; the message names the file.
        """
        is_path = name_or_path.endswith(".toml")
        path = Path(name_or_path) if is_path else TARGETS_DIR / f"{name_or_path}.toml"
        if not (os.path.isfile(path) if is_path else name_or_path in shipped()):
            raise TargetError(
                f"no quantization target {shown(name_or_path)}; known: {', '.join(shipped())}, or a path to a "
                f".toml file"
            )
        try:
            return cls.model_validate(parse_toml(path.read_bytes()))
        except ParseError as error:
            raise TargetError(f"{path}: not valid TOML: {error}") from error
        except ValidationError as error:
            raise TargetError(f"{path}: {describe(error, cls)}") from error


def shipped() -> list[str]:
    """Names of the targets in configs/targets, sorted."""
    return sorted(path.stem for path in TARGETS_DIR.glob("*.toml"))


class QuantConfig(Frozen):
    """The `[quant]` table: a target, and what this run adds to it."""

    target: str = Field("int4-g128", description="a file name in configs/targets, or a path to a target file")
    kv_cache: Literal["bf16", "fp8"] | None = Field(None, description="overrides the target's kv_cache")
    ignore: tuple[str, ...] = Field((), description="more modules to keep in BF16: names or re: patterns")
    recipe: Literal["gptq", "awq", "smoothquant"] | None = Field(
        None, description="export by a calibrated recipe of llm-compressor instead of round-to-nearest"
    )
    recipe_sequences: int = Field(128, ge=1, description="rollouts that the recipe calibrates on")
    calibrate_every: int = Field(
        20, ge=1, description="steps between refreshes of static scales, if the target has any"
    )

    def spec(self) -> TargetSpec:
        """The target with this run's additions.

        Raises:
            TargetError: see `TargetSpec.load`; or an `ignore` pattern that does not compile.
        """
        spec = TargetSpec.load(self.target)
        changes = {"ignore": (*spec.ignore, *self.ignore), "kv_cache": self.kv_cache or spec.kv_cache}
        try:
            return TargetSpec.model_validate(spec.model_dump() | changes)
        except ValidationError as error:
            raise TargetError(f"ignore: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
