"""docs/bring-your-own-model.md is true: its recipes are valid, its tables complete, its code and file names real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tinies import MODULAR, TINYS

import danceopd
from danceopd.pipelines.registry import FAMILIES

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "bring-your-own-model.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
EXAMPLE = re.search(r"```python\n(def _dummy_prompt.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: yaml.safe_load(text)["output"])
def test_the_recipes_are_valid(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"\./([\w-]+)", text):
        (tmp_path / folder).mkdir()
    for file in re.findall(r"[\w-]+\.(?:txt|jsonl)", text):
        (tmp_path / file).touch()
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = danceopd.Recipe.from_yaml("recipe.yaml")
    assert len(recipe.teachers) == 2 and re.fullmatch(r"[\w-]+/[\w.-]+", recipe.base)


def test_every_family_has_its_line_and_its_recipe():
    assert len(RECIPES) == len(FAMILIES) - len(MODULAR)
    for family in FAMILIES.values():
        (line,) = [row for row in GUIDE.splitlines() if row.startswith(f"| `{family.name}` ")]
        assert all(f"`{c}`" in line for c in (family.generation, *family.other_editing))
        assert ("guidance_scale" in line) == ("guidance_scale" in family.call)
        said = re.search(r"`(pipelines/families/\w+\.py)`, (\d+) \|$", line)
        source = (ROOT / said[1]).read_text()
        assert f'"{family.name}"' in source and abs(len(source.splitlines()) - int(said[2])) <= 10  # counted
    assert {tiny.family for tiny in TINYS + MODULAR} == set(FAMILIES)


def test_adding_a_family_is_shown_as_it_is_in_under_40_lines():
    assert EXAMPLE is not None and len(EXAMPLE[1].splitlines()) < 40
    source = (ROOT / "pipelines" / "families" / "sd3.py").read_text(encoding="utf-8")
    for part in re.split(r"\n\n(?=def |SD3)", EXAMPLE[1]):
        assert part.strip() in source
    assert 'TINY = Tiny("sd3", tiny_sd3, None, CALL, silent=SILENT)' in (
        ROOT / "tests" / "helpers" / "tiny_sd3.py"
    ).read_text()


def test_its_files_exist():
    files = re.findall(r"((?:pipelines|tests)/[\w/<>]+\.py)", GUIDE)
    assert len(set(files)) >= 8
    for file in files:
        assert (ROOT / file.replace("<family>", "sd3")).is_file(), file
