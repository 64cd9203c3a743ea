"""The model card: what Hugging Face reads, what a stranger pastes, and what must not be in it."""

import re

import yaml
from tiny import random_adapter, tiny_klein

from danceopd.recipe.recipe import Recipe
from danceopd.run.card import load_snippet, write_card

RECIPE = {
    "base": "black-forest-labs/FLUX.2-klein-base-4B",
    "teachers": [
        {"name": "draw", "adapter": "base", "capability": "generation"},
        {"name": "edit", "adapter": "/home/me/secret/my-edit-lora", "capability": "editing", "scale": 0.8},
    ],
    "output": "/home/me/secret/student",
    "steps": 300,
    "call": {"height": 512, "width": 512, "num_inference_steps": 4},
}


def test_a_whole_card(tmp_path):
    scores = {
        "student": {"generation": 0.934567, "editing": 9.1},
        "edit": {"editing": 9.25},
        "blend": {"generation": None},
    }
    hashes = {"base": "b" * 64, "edit": "e" * 64, "student": "5" * 64}
    (tmp_path / "samples").mkdir()
    grid = tmp_path / "samples" / "step-300.png"
    card = write_card(tmp_path, RECIPE, scores, hashes, grid=grid).read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == RECIPE["base"] and front["library_name"] == "diffusers"
    assert front["base_model_relation"] == "adapter"
    assert {"lora", "danceopd", "text-to-image", "image-to-image"} <= set(front["tags"])
    assert "/home/me" not in card and "my-edit-lora" in card
    assert "| **student** | 0.935 | 9.1 |" in card and "| edit | – | 9.25 |" in card and "| blend | – | – |" in card
    assert all(value in card for value in hashes.values())
    assert "](samples/step-300.png)" in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
    assert recipe["steps"] == 300 and recipe["teachers"][1]["scale"] == 0.8
    assert 'from_pretrained("black-forest-labs/FLUX.2-klein-base-4B")' in card and "num_inference_steps=4" in card


def test_a_card_without_scores_or_grid_and_of_a_fused_pipeline(tmp_path):
    card = write_card(tmp_path, RECIPE, fused=True).read_text()
    assert "## Scores" not in card and "![" not in card and "load_lora_weights" not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert "lora" not in front["tags"] and front["base_model_relation"] == "merge"


def test_the_card_of_a_recipe(tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (tmp_path / "base").mkdir()
    recipe = Recipe(base=str(tmp_path / "base"), generation="base", editing=str(adapter), output=tmp_path / "out")
    card = write_card(tmp_path / "out", recipe).read_text()
    assert str(tmp_path) not in card and "| editing | `lora` | editing | 1 |" in card


def test_the_snippet_runs_as_it_stands(tmp_path):
    """Pasted with its two placeholder paths filled in, it draws and it edits."""
    from danceopd.adapters.write import write_adapter

    pipe = tiny_klein(tmp_path / "base")
    write_adapter(random_adapter(pipe.transformer), tmp_path / "student")
    call = {"height": 64, "width": 64, "steps": 1, "max_sequence_length": 16}
    code = load_snippet("base", call).replace("path/to/base", str(tmp_path / "base"))
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "student")), found)  # noqa: S102
    assert found["drawn"].size == found["edited"].size == (64, 64)
    assert found["pipe"].get_active_adapters() == ["default_0"]
    assert len([line for line in code.splitlines() if line][:3]) == 3
