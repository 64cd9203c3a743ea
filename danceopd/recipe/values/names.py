"""Types of values that name a part: built in, or a plug-in (danceopd/plugins).

That is the name of an entry point, `module:name`, or in Python the object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from danceopd.common.messages import shown
from danceopd.plugins import KINDS, MODULE_NAME, check_name, name_of, plugin_names
from danceopd.recipe.values.places import sentence_of

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
    "regmean",
    "regmean++",
    "ssr",
]
"""The names of `blending.methods.METHODS`, which a recipe may say before torch is there."""
OBJECTIVES, LAWS, BLENDS = get_args(ObjectiveWord), get_args(LawWord), get_args(BlendMethod)


def _name_of(kind: str, value: Any) -> Any:
    """An object under its name; plain data as it is."""
    plain = value is None or isinstance(value, str | bool | int | float | list | tuple | Mapping)
    return value if plain else name_of(kind, value)


def part_name(kind: str, value: Any, builtin: tuple[str, ...] = ()) -> str:
    """The name of a part of a kind, or of an object; ValueError for what is no name of one."""
    name = _name_of(kind, value)
    if not isinstance(name, str):
        raise ValueError(f"{shown(value)} is no {kind}; name one")
    sentence_of(check_name, kind, name, builtin)
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


def options_by_name(value: Any, check: Callable[[Any], str]) -> dict[str, dict[str, Any]]:
    """Options by name, of a mapping, or of a list of names, objects and mappings; `check` returns a name, or raises."""
    if value is None:
        return {}
    given = value if isinstance(value, list | tuple) else [value]
    pairs = [pair for one in given for pair in (one.items() if isinstance(one, Mapping) else [(one, {})])]
    found: dict[str, dict[str, Any]] = {}
    for one, options in pairs:
        name = check(one)
        if name in found:
            raise ValueError(f"{name} is named twice; name each once")
        if not isinstance(options, Mapping | None) and options is not True:
            raise ValueError(f"{name} has {shown(options)}; give a mapping of its options, or leave it empty")
        found[name] = dict(options) if isinstance(options, Mapping) else {}
    return found


Callbacks = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(lambda value: options_by_name(value, lambda one: part_name("callback", one))),
    WithJsonSchema(
        {"anyOf": [{"type": "object", "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}]}},
                   {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}]}
    ),
]  # fmt: skip
