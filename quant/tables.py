"""Files from the user, TOML and JSON: parsed, `--set` laid over them, and what is wrong with them in one line.

Parsers refuse a file in more ways than their own errors say: text that is not UTF-8, numbers of a thousand digits,
tables nested deeper than the interpreter's stack. Here they are all one error.
"""

from __future__ import annotations

import difflib
import json
import reprlib
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from quant.errors import BoresightError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
LONGEST_TOML = 1 << 20
LARGEST_INTEGER = 2**63 - 1  # TOML's; beyond it, arithmetic in tensors overflows where nobody expects it


class OverrideError(BoresightError, ValueError):
    """A `--set` that cannot be applied."""


class ParseError(BoresightError, ValueError):
    """A text is not TOML or not JSON; the caller names the file."""


def parse_toml(text: bytes | str) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ParseError: it is none, is not UTF-8, is nested too deep, holds an integer of more than 64 bits, or is too long
            to be a table of settings.
    """
    if len(text) > LONGEST_TOML:
        raise ParseError(f"{len(text):,} bytes; a file of settings has at most {LONGEST_TOML:,}")
    try:
        table = tomllib.loads(text if isinstance(text, str) else text.decode())
        _check_integers(table)
    except RecursionError as error:
        raise ParseError("nested too deep") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and an integer of thousands of digits
        raise ParseError(str(error)) from error
    return table


def parse_json(text: bytes | str) -> Any:
    """A JSON value; text in bytes may begin with a byte order mark.

    Raises:
        ParseError: it is none, is not text, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ParseError("nested too deep") from error
    except ValueError as error:
        raise ParseError(str(error)) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ParseError: it holds anything else, or cannot be read; the caller names the file.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ParseError(f"cannot be read: {error.strerror}") from error
    except ParseError as error:
        raise ParseError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ParseError(f"holds {type(value).__name__}, not an object")
    return value


def shown(value: object) -> str:
    """A value from the user as an error repeats it: as Python writes it, cut in the middle where it is long."""
    return _short.repr(value)


def _check_integers(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_integers(item)
    elif isinstance(value, int) and not -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
        raise ValueError(f"an integer of {value.bit_length()} bits, more than TOML's 64")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; the value is TOML (`5`, `true`, `"x"`, `[1, 2]`), `null`, or else a bare string.

    Raises:
        OverrideError: no `=`, or a parent that is not a table.
    """
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise OverrideError(f"--set {shown(override)}: expected key=value, such as train.steps=5")
    try:
        value = None if raw == "null" else parse_toml(f"v = {raw}")["v"]
    except ParseError:
        value = raw
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise OverrideError(f"--set {shown(override)}: {parent!r} is not a table")
    table[leaf] = value


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One clause per mistake in what should have been this model: field, what is allowed, what was given."""
    clauses: dict[str, str] = {}  # by field: a value that is none of a union's choices has an error for each
    for item in error.errors():
        field, keys = _place(model, item["loc"])
        message, given = item["msg"].removeprefix("Value error, "), f", got {shown(item['input'])}"
        if item["type"] == "extra_forbidden":
            clauses[field] = f"{field}: unknown key, {_nearest(str(item['loc'][-1]), keys)}"
        elif item["type"] in ("value_error", "missing"):
            # of the whole file: it names the field itself
            clauses[field] = f"{field}: {message}" if field else message
        elif field in clauses:
            clauses[field] = (
                f"{clauses[field].removesuffix(given)} or {message.removeprefix('Input should be ')}{given}"
            )
        else:
            clauses[field] = f"{field}: {message.partition(', unable to parse')[0]}{given}"
    return "; ".join(clauses.values())


def _place(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """A field as the file spells it, and the keys that the table around it may have.

    The location that pydantic tells names the choice of a union too (`tolerance.float`), which is in no file.
    """
    names: list[str] = []
    keys: list[str] = []
    annotation: Any = model
    for part in location:
        union = get_origin(annotation) in (Union, UnionType)
        choices = [choice for choice in get_args(annotation) if choice is not NoneType] if union else [annotation]
        if len(choices) > 1:
            annotation = None
            continue
        names.append(str(part))
        keys = []
        if isinstance(choices[0], type) and issubclass(choices[0], BaseModel):
            fields = choices[0].model_fields
            keys, annotation = sorted(fields), fields[part].annotation if part in fields else None
        else:  # a list of tables
            annotation = next(iter(get_args(choices[0])), None)
    return ".".join(names), keys


def _nearest(key: str, keys: list[str]) -> str:
    """What may have been meant."""
    near = difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(keys)}"
