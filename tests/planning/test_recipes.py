"""The recipes of the repository fit the cards that they are named after, on models of true size without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_hidream
import tiny_longcat
import yaml
from diffusers import HiDreamImagePipeline
from header_only import MODELS, header_only, header_only_lora
from PIL import Image

from danceopd.plan import plan
from danceopd.planning.cards import CARDS
from danceopd.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name, besides the LoRAs."""
    place = tmp_path_factory.mktemp("models")
    (place / "prompts.txt").write_text("a cat\na dog\n")
    Image.new("L", (1024, 1024)).save(place / "source.png")
    (place / "edits.csv").write_text("prompt,image\nmake it red,source.png\nmake it blue,source.png\n")
    return place


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_card(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # other tests of this process may have made the pictures of these two tiny
    monkeypatch.setattr(tiny_longcat.stock, "calculate_dimensions", tiny_longcat.true_dimensions)
    monkeypatch.setattr(HiDreamImagePipeline, "__init__", tiny_hidream.true_init)
    name, gpu = file.stem.rsplit("-", 1)
    base = header_only(name, folder)
    fields: dict[str, Any] = yaml.safe_load(file.read_text())
    for teacher in fields["teachers"]:
        header_only_lora(name, folder / teacher["adapter"])
    monkeypatch.chdir(folder)
    facts = plan(Recipe.from_yaml(file, base=str(base)), tflops=100.0, gpu=gpu)
    assert facts["refused"] is None
    written = {**fields, "rollout.merged": fields["rollout"]["merged"]}
    assert facts["settings"] == {key: written[key] for key in facts["settings"]}  # nothing is left to auto
    stated = (ROOT / "docs" / "hardware.md").read_text()
    worst = max(peak for phase, peak in facts["peak"].items() if phase != "trial")
    assert f"| [{file.name}](../recipes/{file.name}) |" in stated
    [line] = [line for line in stated.splitlines() if f"[{file.name}]" in line]
    assert f"| {worst / 1e9:.0f} GB |" in line
    times = re.findall(r"(\d+) h \(([\w-]+)\)", line)
    hours = 1000 * sum(facts["flops"].values()) / 1e12 / 3600
    assert times and all(int(told) == round(hours / CARDS[card][1]) for told, card in times)


def test_every_model_has_a_recipe() -> None:
    assert {file.stem.rsplit("-", 1)[0] for file in RECIPES} == set(MODELS)
