"""The bench asks every kind of teacher, on every kind of base, as its recipe asks it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_flux1
import torch
from bench_cases import CALL, Suite, pixels
from PIL import Image
from tiny import random_adapter, tiny_klein

from danceopd.adapters.write import write_adapter
from danceopd.bench import run
from danceopd.bench.host import ModelHost
from danceopd.bench.run import bench
from danceopd.errors import UserError
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheap suite."""
    monkeypatch.setattr(run, "load_suite", lambda name, **options: Suite())


def student(root: Path, **fields) -> Path:
    """A run folder with a random student on `root/base`, and the recipe of these fields."""
    (root / "student").mkdir(exist_ok=True)
    recipe = Recipe(base=str(root / "base"), **fields)
    (root / "student" / "recipe.yaml").write_text(recipe.to_yaml())
    return root / "student"


def test_a_whole_guided_teacher_is_drawn_as_the_stock_pipeline_draws_it(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With guidance in its own capability only; its weights are loaded once, whatever the batch."""
    loads, own = [], ModelHost._backbone_of
    monkeypatch.setattr(ModelHost, "_backbone_of", lambda *given: loads.append(given[1].name) or own(*given))
    pipe = tiny_klein(tmp_path / "base")
    (tmp_path / "base" / "danceopd.json").write_text(json.dumps(CALL))
    write_adapter(random_adapter(pipe.transformer, seed=1), tmp_path / "student")
    with torch.no_grad():
        for path, (a, b) in random_adapter(pipe.transformer, seed=2).tensors.items():
            pipe.transformer.get_submodule(path).weight += b @ a
    pipe.transformer.save_pretrained(tmp_path / "tuned")
    teachers = (
        {"name": "draws", "adapter": "base", "capability": "generation"},
        {"name": "edits", "adapter": str(tmp_path / "tuned"), "capability": "editing", "guidance": 3.0},
    )
    folder = student(tmp_path, teachers=teachers)
    result = bench(folder, "dots", limit=2, output=tmp_path / "out", batch=1)
    assert loads == ["tuned"]
    assert "edits is a full model" in caplog.text  # why the table has no blend
    assert [m["name"] for m in result.scores["models"]] == ["base", "draws", "edits", "student"]
    for row in (r for r in result.rows if r["model"] == "edits"):
        stock = {**CALL, "guidance_scale": 3.0 if row["capability"] == "editing" else 1.0}
        more = {"image": Image.open(result.folder / row["source"])} if row["capability"] == "editing" else {}
        generator = torch.Generator().manual_seed(row["seed"])
        picture = np.asarray(pipe(prompt=row["prompt"], generator=generator, **stock, **more).images[0]).astype(int)
        assert np.abs(pixels(result.folder / row["image"]) - picture).max() <= 2
    with pytest.raises(UserError, match="'edits' is a full model, which has no LoRA to blend; extract one with"):
        bench(folder, "dots", ["blend"], limit=1, output=tmp_path / "other")


def test_a_base_with_two_pipeline_classes_draws_and_edits(tmp_path: Path) -> None:
    tiny = tiny_flux1.TINY
    pipe = tiny.build(tmp_path / "base")
    call = {"num_inference_steps" if key == "steps" else key: value for key, value in tiny.call.items()}
    (tmp_path / "base" / "danceopd.json").write_text(json.dumps(call))
    targets = FAMILIES[tiny.family].lora_targets
    for seed, name in enumerate(("draws", "edits", "student")):
        write_adapter(random_adapter(pipe.transformer, seed=seed, targets=targets), tmp_path / name)
    folder = student(tmp_path, generation=str(tmp_path / "draws"), editing=str(tmp_path / "edits"))
    result = bench(folder, "dots", ["base"], limit=2, output=tmp_path / "out")
    editing = tiny.editing(pipe)
    for row in (r for r in result.rows if r["model"] == "base"):
        edits = row["capability"] == "editing"
        more = {"image": Image.open(result.folder / row["source"]), "_auto_resize": False} if edits else {}
        more |= {"max_area": call["height"] * call["width"]} if edits else {}
        generator = torch.Generator().manual_seed(row["seed"])
        drawn = (editing if edits else pipe)(prompt=row["prompt"], generator=generator, **call, **more).images[0]
        assert np.abs(pixels(result.folder / row["image"]) - np.asarray(drawn).astype(int)).max() <= 2
