"""Types of values that say where something is, and of the rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator, WithJsonSchema

from danceopd.common.parse import local_path
from danceopd.common.shipped import resolve
from danceopd.errors import UserError

MICRO_BATCH = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2**14}, {"const": "auto"}, {"type": "null"}]}
"""Its JSON schema, which a plain validator does not say."""


def existing(value: Any, what: str, **how: Any) -> Any:
    """`shipped.resolve` as a validator; ValueError for what does not exist."""
    return sentence_of(resolve, value, what, **how)


def sentence_of(check: Callable[..., Any], *values: Any, **how: Any) -> Any:
    """What `check` returns; its UserError as a ValueError, to which pydantic adds the key."""
    try:
        return check(*values, **how)
    except UserError as error:
        raise ValueError(str(error)) from None


def _base(value: Any) -> Any:
    return existing(value, "base model", hub=True)


def _editing_base(value: Any) -> Any:
    return None if value is None else existing(value, "editing base", hub=True, shipped_names=False)


def _gguf(value: Any) -> Any:
    return existing(value, "GGUF file", shipped_names=False)


def _output(value: Any) -> Any:
    return sentence_of(local_path, value, "output folder") if isinstance(value, str | Path) else value


def _micro_batch(value: Any) -> Any:
    if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**14):
        return value
    raise ValueError(f"{value!r} is neither auto nor a whole number from 1 to 16384; give one of them")


BaseName = Annotated[str, BeforeValidator(_base)]
EditingBase = Annotated[str | None, BeforeValidator(_editing_base)]
GgufFile = Annotated[str, BeforeValidator(_gguf)]
Output = Annotated[Path, BeforeValidator(_output)]
MicroBatch = Annotated[int | Literal["auto"] | None, PlainValidator(_micro_batch), WithJsonSchema(MICRO_BATCH)]
