"""The reference of the recipe: whole, up to date, and true: what it shows and what is shipped fits the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from danceopd.recipe import reference
from danceopd.recipe.nft import NFT, Reward  # noqa: F401  # their fields, too, have docstrings
from danceopd.recipe.parts import Part
from danceopd.recipe.recipe import Recipe

ROOT = reference.ROOT
SCHEMA = reference.schema()
KINDS = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict,
         "null": type(None)}  # fmt: skip
SHIPPED = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "checkpoints").glob("*.yaml")])
AGAIN = "run `python -m danceopd.recipe.reference`, and keep what it writes"


def faults(value: Any, rule: dict[str, Any], where: str = "recipe") -> list[str]:
    """What a JSON schema, of the words that ours uses, finds wrong in a value."""
    if "$ref" in rule:
        rule = SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule:
        return min((faults(value, option, where) for option in rule["anyOf"]), key=len)
    if "enum" in rule or "const" in rule:
        choices = rule.get("enum", [rule.get("const")])
        same = [one for one in choices if one == value and isinstance(one, bool) == isinstance(value, bool)]
        return [] if same else [f"{where} is {value!r}"]
    kind = KINDS[rule["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return [f"{where} is {value!r}, no {rule['type']}"]
    if isinstance(value, dict):
        known, other = rule.get("properties", {}), rule.get("additionalProperties", True)
        found = [f"{where} has no {key}" for key in rule.get("required", ()) if key not in value]
        for key, item in value.items():
            if key in known or isinstance(other, dict):
                found += faults(item, known.get(key, other), f"{where}.{key}")
            elif not other:
                found.append(f"{where}.{key} is unknown")
        return found
    if isinstance(value, list):
        rules = rule.get("prefixItems") or [rule["items"]] * len(value)
        enough = rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value))
        return [f"{where} has {len(value)}"] * (not enough) + [f for v, r in zip(value, rules) for f in faults(v, r)]
    if isinstance(value, str):
        return [] if re.search(rule.get("pattern", ""), value) else [f"{where} is {value!r}"]
    if isinstance(value, bool | None):
        return []
    bounds = {"minimum": float.__ge__, "exclusiveMinimum": float.__gt__, "maximum": float.__le__,
              "exclusiveMaximum": float.__lt__}  # fmt: skip
    kept = all(within(float(value), float(rule[key])) for key, within in bounds.items() if key in rule)
    return [] if kept else [f"{where} is {value}"]


def models(kind: type[Part] = Part) -> Iterator[type[Part]]:
    """Every part of a recipe."""
    for part in kind.__subclasses__():
        if part.__module__.startswith("danceopd."):
            yield part
        yield from models(part)


def snippets() -> Iterator[tuple[str, Any]]:
    """Every piece of YAML in the pages."""
    for page in sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield f"{page.name}: {text.strip().splitlines()[0][:40]}", yaml.safe_load(text)


@pytest.mark.parametrize("path", [reference.SCHEMA, reference.PAGE], ids=lambda path: path.name)
def test_both_files_are_of_today(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.files()[path], AGAIN


def test_every_key_says_what_it_means_and_shows_an_example() -> None:
    bare = [f"{m.__name__}.{key}" for m in models() for key, field in m.model_fields.items() if not field.description]
    assert bare == [], "write a docstring below the field"
    described = {name: part for name, part in SCHEMA["$defs"].items() if "properties" in part} | {"Recipe": SCHEMA}
    for name, part in described.items():
        for key, value in part["properties"].items():
            if "$ref" not in value:
                example = reference.example_of(value)
                assert example not in (None, {}, []), f"{name}.{key}: give Field(..., examples=[...])"
                assert faults(example, value) == [], f"{name}.{key}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_name_the_schema_and_fit_it(path: Path) -> None:
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found and (path.parent / found[1]).resolve() == reference.SCHEMA
    assert faults(yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMA) == []


def test_what_the_pages_show_fits_the_schema() -> None:
    shown = list(snippets())
    assert len(shown) > 30
    assert [f"{where}: {fault}" for where, data in shown if data for fault in faults(data, SCHEMA)] == []


def test_a_whole_recipe_fits_the_schema(files: dict) -> None:
    assert faults(json.loads(json.dumps(Recipe(**files).resolved())), SCHEMA) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stepz": 3}, "recipe.stepz is unknown"),
        ({"steps": 0}, "recipe.steps is 0"),
        ({"objective": "dansopd"}, "recipe.objective is 'dansopd'"),
        ({"dtype": "float"}, "recipe.dtype is 'float'"),
        ({"call": {"steps": 4}}, "recipe.call.steps is unknown"),
        ({"teachers": [{"adapter": "x"}]}, "recipe has no name"),
        ({"gates": {"evidence": "yes"}}, "recipe.gates.evidence is 'yes', no object"),
        ({"micro_batch": "all"}, "recipe.micro_batch is 'all', no integer"),
    ],
)
def test_the_schema_refuses(wrong: dict, said: str) -> None:
    assert said in faults(wrong, SCHEMA)


def test_every_anchor_of_the_page_is_one_of_its_headings() -> None:
    text = reference.PAGE.read_text(encoding="utf-8")
    anchors = {reference.slug(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= anchors
