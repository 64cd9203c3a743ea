"""Error messages: a pydantic error or a YAML file goes in, one sentence comes out: what, where, how to mend it.

pydantic reports a list of records; a user gets the first one in words. For unknown keys and misspelt choices the
closest known word is named. YAML is read strictly: duplicate keys, which YAML itself drops in silence, are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from danceopd.common.parse import YAML_BYTES, parse_yaml, read_text
from danceopd.errors import UserError


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """"; did you mean 'x'?" for the closest known word, or "; known: a, b, c" when none is close."""
    known = list(known)
    folded = {k.lower().replace("_", "-"): k for k in known}
    given = str(word).lower().replace("_", "-")
    initials = "".join(part[:1] for part in given.split("-"))  # learning_rate: lr
    close = get_close_matches(given, list(folded), n=1, cutoff=0.5) or [k for k in folded if k == initials]
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def explain_validation_error(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """The first error of a pydantic model as one sentence; an unknown key is named before its consequences."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    key = ".".join(f"{part}" for part in fault["loc"])
    kind, value, context = fault["type"], fault.get("input"), fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key!r} in {where}{did_you_mean(fault['loc'][-1], _fields(model, fault['loc'][:-1]))}"
    if kind == "missing":
        return f"{key} is missing in {where}; add it"
    if kind == "literal_error":
        found = re.findall(r"'([^']*)'|(True|False)", str(context["expected"]))
        allowed = [word or truth.lower() for word, truth in found]
        if value in ("true", "false") and value in allowed:
            return f"{key} is the word {value!r} in {where}; write it without quotes"
        return f"{key} is {shown(value)} in {where}{did_you_mean(value, allowed)}"
    if kind == "boolean":
        key = f"{key}.{context['key']}" if key else context["key"]
        return (
            f"{key} is the boolean {str(context['value']).lower()} in {where} (YAML reads a bare no, off, yes "
            "or on as one); give a value of its kind, words in quotes"
        )
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{context['error']} (in {where})"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key or 'the recipe'} is {shown(value)} in {where}; it must be a mapping of keys to values"
    need = _NEEDS.get(kind) or re.sub(r"^\w+ should (be |have |match )?", "", str(fault["msg"]))
    return f"{key} is {shown(value)} in {where}; it must be {need[0].lower() + need[1:]}"


_NEEDS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "a word (in quotes where YAML would read something else)",
    "tuple_type": "a list",
    "too_long": "a pair of numbers",
    "string_pattern_mismatch": "letters, digits, - and _ only",
    "path_type": "a path",
}


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; UserError that names the file and, where there is one, the line.

    `what` is how messages name the file's content, such as "recipe".
    """
    text = read_text(path, what, YAML_BYTES)
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = line = ""
        if mark is not None:
            where = f", line {mark.line + 1}"
            line = "".join(f" in {shown(one.strip())}" for one in text.splitlines()[mark.line : mark.line + 1])
        raise UserError(f"{what} {path}{where} is not valid YAML: {problem}{line}; mend that line") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{what} {path} holds {shown(data)}; it must be a mapping of keys to values")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"{what} {path} has the key {key!r}, which is not a word; mend it")
    return data


_short = Repr()
_short.maxstring = _short.maxother = 60


def shown(value: Any) -> str:
    """`repr(value)` in at most 60 characters, however large the value is."""
    text = _short.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at `loc` inside a model."""
    here: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part)
        here = next(_models(field.annotation), None) if field else None
        if here is None:
            return []
    return list(here.model_fields)


def _models(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def few(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are: "a, b, c and 4 more"; long names are cut in the middle."""
    names = [name if len(name) <= 100 else f"{name[:60]}...{name[-30:]}" for name in sorted(names)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def clipped(text: str, most: int) -> str:
    """`text`, with "…" for its middle where it is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[len(text) - half :]}"
