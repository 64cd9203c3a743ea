"""`data: auto` on a tiny pipeline: sources drawn as the stock pipeline draws them, once, and learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from tiny_merge import run, tiny_models, tiny_recipe

from danceopd.adapters.load import load_student
from danceopd.data.bank.rows import BankEdits, BankPrompts, Setting
from danceopd.data.dataset import open_datasets
from danceopd.drawing import draw_sources
from danceopd.engine.teachers import check_teachers
from danceopd.errors import UserError
from danceopd.plan import plan
from danceopd.planning.sources import drawer, wanted_sources
from danceopd.recipe.recipe import Recipe

CALL = {"height": 96, "width": 64, "num_inference_steps": 3, "max_sequence_length": 64}


def auto(models: Path, output: Path, **fields: Any) -> Recipe:
    return tiny_recipe(models, output, **{"call": CALL, "data": {"rows": 10}, "steps": 2, "save_every": 1, **fields})


def near(one: Image.Image, other: Image.Image) -> bool:
    """Whether no pixel differs by more than one of 255, as other batches round."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(models: Path) -> tuple[Recipe, dict, dict]:
    """A merge that was killed after its first update and ended; what was planned and drawn before that."""
    recipe = auto(models, models / "student")
    planned = plan(recipe, tflops=1.0)
    assert run(recipe, kill=1) == [1]
    record = json.loads((models / "student/cache/sources/sources.json").read_text())
    assert run(recipe) == [2]
    return recipe, planned, record


def test_the_bank_is_the_data_of_a_base_whose_recipe_names_none(models: Path) -> None:
    datasets = open_datasets(auto(models, models / "student"))
    prompts, edits = datasets["generation"].data, datasets["editing"].data
    assert isinstance(prompts, BankPrompts) and isinstance(edits, BankEdits) and edits.sizes(0) == [(64, 96)]
    assert Setting.of(auto(models, models / "student")).languages == ("en", "zh")  # Qwen3 reads both


def test_what_was_planned_is_drawn_and_kept(merged: tuple[Recipe, dict, dict]) -> None:
    recipe, planned, record = merged
    folder = recipe.output / "cache" / "sources"
    wanted = wanted_sources(recipe, open_datasets(recipe))
    assert {path.name for path in wanted} == set(record["pictures"]) == {path.name for path in folder.glob("*.png")}
    assert planned["sources"]["pictures"] == len(wanted)
    assert planned["sources"]["forwards"] == len(wanted) * 3 * 2  # guided, as the stock pipeline is
    assert planned["total_seconds"] > planned["sources"]["seconds"] > 0
    assert any("edits that ship" in note and "teacher generation draws" in note for note in planned["notes"])
    assert record["drawn"]["by"] == "generation" and record["drawn"]["guidance"] == 4.0
    assert json.loads((folder / "sources.json").read_text()) == record  # going on drew nothing
    assert plan(recipe, tflops=1.0)["sources"]["pictures"] == 0


def test_a_source_is_what_the_stock_pipeline_draws(merged: tuple[Recipe, dict, dict], models: Path) -> None:
    recipe, _, record = merged
    stock = load_student(models / "draws", base=models / "base")
    for name, about in list(record["pictures"].items())[:2]:
        generator = torch.Generator().manual_seed(about["seed"])
        wanted = stock(prompt=about["prompt"], generator=generator, guidance_scale=4.0, **CALL).images[0]
        found = Image.open(recipe.output / "cache" / "sources" / name)
        assert near(found, wanted)


def test_a_lost_picture_is_drawn_again_and_a_changed_one_refused(
    merged: tuple[Recipe, dict, dict], models: Path, tmp_path: Path
) -> None:
    recipe, _, record = merged
    lost, changed = sorted((recipe.output / "cache" / "sources").glob("*.png"))[:2]
    before = Image.open(lost).copy()
    lost.unlink()
    seen: list[tuple[int, int]] = []
    teachers = check_teachers(recipe.teachers, models / "base")
    settled = recipe.replaced({"dtype": "fp32", "rollout.merged": True})

    def draw() -> None:
        draw_sources(settled, models / "base", teachers, open_datasets(recipe), torch.device("cpu"),
                     lambda done, total, note: seen.append((done, total)))  # fmt: skip

    draw()
    assert near(Image.open(lost), before) and seen[-1] == (len(record["pictures"]),) * 2
    kept = changed.read_bytes()
    changed.write_bytes(lost.read_bytes())
    with pytest.raises(UserError, match="is no longer what was drawn; delete it"):
        draw()
    changed.write_bytes(kept)


def test_who_draws() -> None:
    def teachers(*adapters: str) -> tuple[Any, ...]:
        named = [{"name": f"t{i}", "adapter": a, "capability": c} for i, (a, c) in enumerate(map(str.split, adapters))]
        return Recipe(teachers=[*named, {"name": "z", "adapter": "editing", "capability": "editing"}]).teachers

    assert drawer(teachers("base generation", "generation generation")).name == "t1"
    assert drawer(teachers("base generation")).name == "t0"
    assert drawer(teachers("local-edit editing")).name == "base"


def test_what_has_no_finished_pictures_is_refused_where_they_are_learnt_from(models: Path) -> None:
    with pytest.raises(UserError, match="auto, which has no finished pictures, and objective supervised"):
        open_datasets(auto(models, models / "other", objective="supervised"))
