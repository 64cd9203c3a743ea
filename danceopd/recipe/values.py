"""Types of single values of a recipe whose checks pydantic does not have: what exists on disk, and the names of parts.

A part is built in, or a plug-in (danceopd/plugins): the name of an entry point, `module:name`, or in Python the object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, PlainValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from danceopd.common.messages import shown
from danceopd.common.parse import local_path
from danceopd.common.shipped import resolve
from danceopd.errors import UserError
from danceopd.plugins import KINDS, MODULE_NAME, check_name, name_of, plugin_names

ObjectiveWord = Literal["danceopd", "diffusionopd", "flowopd", "offpolicy", "supervised", "nft"]
LawWord = Literal["low-noise", "uniform", "mid", "high-noise", "paper"]
BlendMethod = Literal[
    "linear",
    "slerp",
    "task-arithmetic",
    "ties",
    "dare-linear",
    "dare-ties",
    "magnitude-prune",
    "breadcrumbs",
    "sce",
    "knots",
    "tsv",
    "iso-c",
]
"""The names of `blending.methods.METHODS`, which a recipe may say before torch is there."""
OBJECTIVES, LAWS, BLENDS = get_args(ObjectiveWord), get_args(LawWord), get_args(BlendMethod)

MICRO_BATCH = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2**14}, {"const": "auto"}, {"type": "null"}]}
"""Its JSON schema, which a plain validator does not say."""


def existing(value: Any, what: str, **how: Any) -> Any:
    """`shipped.resolve` as a validator; ValueError for what does not exist."""
    return _sentence(resolve, value, what, **how)


def _sentence(check: Callable[..., Any], *values: Any, **how: Any) -> Any:
    """What `check` returns; its UserError as a ValueError, to which pydantic adds the key."""
    try:
        return check(*values, **how)
    except UserError as error:
        raise ValueError(str(error)) from None


# -- places -------------------------------------------------------------------------------------------------


def _base(value: Any) -> Any:
    return existing(value, "base model", hub=True)


def _editing_base(value: Any) -> Any:
    return None if value is None else existing(value, "editing base", hub=True, shipped_names=False)


def _gguf(value: Any) -> Any:
    return existing(value, "GGUF file", shipped_names=False)


def _output(value: Any) -> Any:
    return _sentence(local_path, value, "output folder") if isinstance(value, str | Path) else value


def _micro_batch(value: Any) -> Any:
    if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**14):
        return value
    raise ValueError(f"{value!r} is neither auto nor a whole number from 1 to 16384; give one of them")


BaseName = Annotated[str, BeforeValidator(_base)]
EditingBase = Annotated[str | None, BeforeValidator(_editing_base)]
GgufFile = Annotated[str, BeforeValidator(_gguf)]
Output = Annotated[Path, BeforeValidator(_output)]
MicroBatch = Annotated[int | Literal["auto"] | None, PlainValidator(_micro_batch), WithJsonSchema(MICRO_BATCH)]


# -- names of parts -----------------------------------------------------------------------------------------


def _name_of(kind: str, value: Any) -> Any:
    """An object under its name; plain data as it is."""
    plain = value is None or isinstance(value, str | bool | int | float | list | tuple | Mapping)
    return value if plain else name_of(kind, value)


def part_name(kind: str, value: Any, builtin: tuple[str, ...] = ()) -> str:
    """The name of a part of a kind, or of an object; ValueError for what is no name of one."""
    name = _name_of(kind, value)
    if not isinstance(name, str):
        raise ValueError(f"{shown(value)} is no {kind}; name one")
    _sentence(check_name, kind, name, builtin)
    return name


def _named(kind: str, builtin: tuple[str, ...] = ()) -> BeforeValidator:
    """A validator as `part_name`; an unknown word is refused as one of a `Literal` is."""

    def validate(value: Any) -> str:
        name, known = _name_of(kind, value), [*builtin, *plugin_names(kind)]
        if not isinstance(name, str) or (":" not in name and name not in known):
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, [*known, "module:name"]))})
        return part_name(kind, name, builtin)

    return BeforeValidator(validate)


def _words(kind: str, builtin: tuple[str, ...] = ()) -> WithJsonSchema:
    """The JSON schema of a part's name: an editor completes the built-in ones."""
    own = {"type": "string", "pattern": MODULE_NAME, "$comment": f"or an entry point of group {KINDS[kind].group}"}
    return WithJsonSchema({"anyOf": [{"enum": list(builtin)}, own]} if builtin else own)


ObjectiveName = Annotated[str, _named("objective", OBJECTIVES), _words("objective", OBJECTIVES)]
LawName = Annotated[str, _named("query law", LAWS), _words("query law", LAWS)]
BlendName = Annotated[str, _named("blend method", BLENDS), _words("blend method", BLENDS)]
FieldName = Annotated[str, _named("teacher field"), _words("teacher field")]
FamilyName = Annotated[str, BeforeValidator(lambda value: _name_of("family", value))]
"""Of a family: checked with the recipe, since the list of those that are built in needs torch."""


def _callbacks(value: Any) -> Any:
    """Options by name, of a mapping, or of a list of names, objects and mappings."""
    if value is None:
        return {}
    given = value if isinstance(value, list | tuple) else [value]
    pairs = [pair for one in given for pair in (one.items() if isinstance(one, Mapping) else [(one, {})])]
    found: dict[str, dict[str, Any]] = {}
    for one, options in pairs:
        name = part_name("callback", one)
        if name in found:
            raise ValueError(f"{name} is named twice; name each once")
        if not isinstance(options, Mapping | None) and options is not True:
            raise ValueError(f"{name} has {shown(options)}; give a mapping of its options, or leave it empty")
        found[name] = dict(options) if isinstance(options, Mapping) else {}
    return found


Callbacks = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(_callbacks),
    WithJsonSchema(
        {"anyOf": [{"type": "object", "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}]}},
                   {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}]}
    ),
]  # fmt: skip
