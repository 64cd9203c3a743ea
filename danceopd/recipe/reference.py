"""The reference of the recipe, made from its models: a JSON schema for editors, and the page docs/recipe.md.

A field's default, limits, docstring and `examples` are all there is to write; `python -m danceopd.recipe.reference`
writes both files anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from danceopd.common.files import write_atomic
from danceopd.plugins import KINDS, MODULE_NAME, plugin_names
from danceopd.recipe.checks import CALL_MOST
from danceopd.recipe.recipe import CAPABILITIES, Recipe

ROOT = Path(__file__).parents[2]
SCHEMA, PAGE = ROOT / "danceopd" / "recipe" / "recipe.schema.json", ROOT / "docs" / "recipe.md"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
INTRO = """# The recipe: every key

<!-- Made from the models in danceopd/recipe/ by `python -m danceopd.recipe.reference`: change a field's docstring,
default or examples there, and run that again. -->

A recipe is a YAML file. `danceopd merge recipe.yaml` runs it, `danceopd plan recipe.yaml` checks it. Only the two
teachers are needed; every other key has a default. An unknown key is refused, with the nearest one that exists.
[first-merge.md](first-merge.md) writes a first recipe, [choosing.md](choosing.md) says how to choose the numbers.

Any key can be given on the command line, too: `danceopd merge recipe.yaml --set optimizer.lr=1e-4 --set batch=4`.

An editor with the YAML language server (VS Code, Neovim, Zed, …) completes and checks keys as you type, when the
recipe's first line names the schema, which `danceopd schema -o recipe.schema.json` writes:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```
"""


def schema(installed: bool = False) -> dict[str, Any]:
    """The JSON schema of a recipe as it may be written: with its short forms, without the old names of keys.

    `installed`: the plug-ins of installed packages are among the names of parts.
    """
    found = Recipe.model_json_schema()
    properties, models = found["properties"], found["$defs"]
    for capability in CAPABILITIES:
        properties[capability] = {
            "type": "string",
            "description": f"Adapter of a teacher with the name {capability}; with it leave out `teachers`.",
            "examples": [f"./{capability}-lora"],
        }
    properties["call"] |= {"properties": dict(_call()), "additionalProperties": False}
    properties["data"]["anyOf"] = [{"$ref": properties["data"].pop("$ref")}, {"const": "auto"}]
    accept = models["Teacher"]["properties"]["accept"]
    accept["anyOf"] = [{"type": accept.pop("type"), "items": accept["items"]}, accept.pop("items")]
    for gate in ("evidence", "consensus", "skills"):
        models["Gates"]["properties"][gate]["anyOf"].append({"type": "boolean"})
    if installed:
        _add_plugins(found)
    return {"$schema": DIALECT, **_tidied(found)}


def _add_plugins(part: Any) -> None:
    """Beside each pattern of module:name the names of the entry points that its comment speaks of, in place."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _add_plugins(value)
    for option in part.get("anyOf", ()) if isinstance(part, dict) else ():
        if option.get("pattern") == MODULE_NAME:
            kind = next(kind for kind, how in KINDS.items() if option["$comment"].endswith(how.group))
            part["anyOf"] = [*part["anyOf"], *([{"enum": names}] if (names := plugin_names(kind)) else [])]


def markdown() -> str:
    """The text of docs/recipe.md."""
    found = schema()
    paths = _paths(found)
    headings = {name: ", ".join(f"`{path}`" for path in places) for name, places in paths.items()}
    parts = [INTRO, "## Top level\n", _table(found, headings, found["$defs"])]
    for name in paths:
        about = found["$defs"][name]
        parts += [f"## {headings[name]}\n", about["description"] + "\n", _table(about, headings, found["$defs"])]
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", "\n".join(parts))


def _call() -> Iterator[tuple[str, dict[str, Any]]]:
    for key, most in CALL_MOST.items():
        kind = "number" if key == "guidance_scale" else "integer"
        yield key, {"type": kind, "exclusiveMinimum": 0, "maximum": most}


def _tidied(part: Any) -> Any:
    """Without titles that repeat a key, and with each paragraph of a docstring on one line."""
    if isinstance(part, list):
        return [_tidied(item) for item in part]
    if not isinstance(part, dict):
        return part
    found = {key: _tidied(value) for key, value in part.items() if key != "title" or not isinstance(value, str)}
    if isinstance(text := found.get("description"), str):
        found["description"] = "\n\n".join(" ".join(piece.split()) for piece in text.split("\n\n"))
    return found


def _paths(found: dict[str, Any]) -> dict[str, list[str]]:
    """The models that a recipe is made of, in its order, and the keys that each is found under."""
    places: dict[str, list[str]] = {}

    def visit(part: dict[str, Any], path: str) -> None:
        for key, value in part.get("properties", {}).items():
            for name in _models(value):
                places.setdefault(name, []).append(place := f"{path}{key}")
                visit(found["$defs"][name], f"{place}.")

    visit(found, "")
    return places


def _models(value: Any) -> list[str]:
    """Names of the models that a property may hold."""
    return list(dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps(value))))


def _table(part: dict[str, Any], headings: dict[str, str], models: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning | example |", "|---|---|---|---|---|"]
    for key, value in part["properties"].items():
        default = "required" if key in part.get("required", ()) else _default(value, headings)
        meaning = value.get("description") or models[_models(value)[0]]["description"].partition("\n")[0]
        cells = (f"`{key}`", _kind(value, headings), default, meaning, _example(key, value))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(value: dict[str, Any], headings: dict[str, str]) -> str:
    if "default" not in value or (_models(value) and value["default"]):
        return ""
    return f"`{_yaml(value['default'])}`"


def _example(key: str, value: dict[str, Any]) -> str:
    """The example of a field; without one, another choice than the default, or the default itself."""
    if _models(value) and "examples" not in value:
        return ""
    return f"`{_yaml({key: example_of(value)})[1:-1]}`"


def example_of(value: dict[str, Any]) -> Any:
    """A value that a property may take; None where nothing says one."""
    if value.get("examples"):
        return value["examples"][0]
    choices = [one for option in (value, *value.get("anyOf", ())) for one in option.get("enum", ())]
    default = value.get("default")
    other = [one for one in choices if one not in (default, None)]
    if other:
        return other[0]
    return not default if value.get("type") == "boolean" else default


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _kind(value: dict[str, Any], headings: dict[str, str]) -> str:
    """The type of a property in words."""
    if "anyOf" in value:
        return ", or ".join(dict.fromkeys(_kind(option, headings) for option in value["anyOf"]))
    if "$ref" in value:
        heading = headings[_models(value)[0]]
        return f"[mapping](#{slug(heading)})"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{_yaml(one)}`" for one in value.get("enum", [value.get("const")]))
    kind = value.get("type")
    if kind == "array":
        if "prefixItems" in value:
            return "pair: [" + "; ".join(_kind(item, headings) for item in value["prefixItems"]) + "]"
        return f"list of: {_kind(value['items'], headings)}"
    if kind == "object":
        of = value.get("additionalProperties")
        if isinstance(of, dict):
            return f"mapping of names to: {_kind(of, headings)}"
        return "mapping of: " + ", ".join(f"`{k}`" for k in value["properties"]) if "properties" in value else "mapping"
    if value.get("pattern") == MODULE_NAME:
        return "`module:name`"
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    return words.get(str(kind), str(kind)) + _limits(value)


def _limits(value: dict[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{word} {_number(value[key])}" for key, word in words.items() if key in value]
    return f", {', '.join(said)}" if said else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and value < 2**60 else f"{value:.4g}"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def files() -> dict[Path, str]:
    """What the two files must hold."""
    return {SCHEMA: json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", PAGE: markdown()}


if __name__ == "__main__":
    for path, text in files().items():
        write_atomic(path, text.encode())
