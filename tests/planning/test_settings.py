"""`auto` on cards of every size, advice that fits when it is followed, and settings that a run keeps."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from header_only import MODELS, header_only, header_only_lora, sparse
from PIL import Image
from tiny_merge import tiny_recipe

from danceopd.engine.teachers import check_teachers
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.models.base import base_folder
from danceopd.plan import plan
from danceopd.planning.cards import CARDS, Card, card_named
from danceopd.planning.outline import outline
from danceopd.planning.settings import settle
from danceopd.recipe.recipe import Recipe

MERGE = import_module("danceopd.merge")  # the package's attribute of that name is its function


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model of true size with two LoRAs, prompts, and edits of 1024-pixel sources."""
    folder = tmp_path_factory.mktemp("large")
    for name in MODELS:
        header_only(name, folder)
        for kind in ("generation", "editing"):
            header_only_lora(name, folder / "loras" / name / f"{kind}.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    Image.new("L", (1024, 1024)).save(folder / "source.png")
    (folder / "edits.csv").write_text("prompt,image\nmake it red,source.png\nmake it blue,source.png\n")
    return folder


def recipe(large: Path, name: str, output: Path, **over: Any) -> Recipe:
    """A merge of one prompt-driven and one editing LoRA at the model's true size."""
    edits = MODELS[name].family not in ("sd3", "qwen-image", "krea2", "hidream", "wan")
    second = {"name": "e", "capability": "editing" if edits else "generation"}
    loras = large / "loras" / name
    fields: dict[str, Any] = {
        "base": str(large / name), "output": output, "steps": 1000,
        "teachers": [{"name": "g", "capability": "generation", "adapter": str(loras / "generation.safetensors")},
                     {**second, "adapter": str(loras / "editing.safetensors")}],
        "data": {"generation": str(large / "prompts.txt"), "editing": str(large / "edits.csv")},
    }  # fmt: skip
    return Recipe(**{**fields, **over})


@pytest.mark.parametrize(
    ("name", "gpu", "most"),
    [("klein-4b", "24GB", 22.0), ("flux1-dev", "48GB", 46.0), ("qwen-image", "80GB", 80.0), ("z-image", "48GB", 46.0),
     ("sd3.5-medium", "24GB", 22.0)],
)  # fmt: skip
def test_a_model_fits_the_card_it_should(large: Path, tmp_path: Path, name: str, gpu: str, most: float) -> None:
    """1024 pixels, batch 8, rank 64, the export included, nothing set."""
    facts = plan(recipe(large, name, tmp_path / "run"), tflops=100.0, gpu=gpu)
    assert facts["refused"] is None and facts["settings"]["dtype"] == "bf16"
    needed = {phase: peak for phase, peak in facts["peak"].items() if phase != "trial"}
    assert max(needed.values()) <= most * 1e9, needed
    assert all(needed.values())


@pytest.mark.parametrize(
    ("name", "gpu", "most", "how"),
    [("flux1-dev", "24GB", 24.0, {"base_dtype": "nf4"}), ("qwen-image", "48GB", 46.0, {"base_dtype": "nf4"}),
     ("qwen-image", "48GB", 46.0, {"base_dtype": "int8"}), ("flux1-dev", "24GB", 24.0, {"offload": "blocks"}),
     ("qwen-image", "24GB", 24.0, {"offload": "blocks"})],
)  # fmt: skip
def test_a_model_fits_a_smaller_card_quantised_or_in_shares(
    large: Path, tmp_path: Path, name: str, gpu: str, most: float, how: dict[str, str]
) -> None:
    """The export included, which is compared with the base in full precision; the copies count in the time."""
    facts = plan(recipe(large, name, tmp_path / "run", **how), tflops=100.0, gpu=gpu)
    assert facts["refused"] is None and facts["settings"]["rollout.merged"] is False
    assert max(peak for phase, peak in facts["peak"].items() if phase != "trial") <= most * 1e9
    parts = {part["part"]: part["bytes"] for part in facts["memory"]}
    if "base_dtype" in how:
        share = parts["backbone"] / (2 * facts["parameters"])
        assert share == pytest.approx({"nf4": 0.26, "int8": 0.5}[how["base_dtype"]], abs=0.01)
        assert parts["the base as it is stored, to compare the export"] < facts["parameters"] / 4
    else:
        assert facts["settings"]["gradient_checkpointing"] is True
        assert parts["backbone, two blocks at a time"] < facts["parameters"] / 4
        assert facts["seconds"]["copies of the base"] > 10
        assert facts["total_seconds"] == pytest.approx(1000 * sum(facts["seconds"].values()))


def test_a_larger_card_is_never_slower(large: Path, tmp_path: Path) -> None:
    made, last = recipe(large, "klein-4b", tmp_path / "run"), None
    for gpu in ("24GB", "48GB", "80GB", "h200"):
        facts = plan(made, tflops=100.0, gpu=gpu)
        seconds = facts["total_seconds"]
        assert last is None or seconds <= last
        last = seconds
    assert facts["settings"] == {
        "dtype": "bf16", "micro_batch": 2, "gradient_checkpointing": False, "rollout.merged": True
    }  # fmt: skip


def test_advice_fits_when_it_is_followed(large: Path, tmp_path: Path) -> None:
    rigid = {"micro_batch": 8, "gradient_checkpointing": False, "rollout": {"merged": True}}
    made = recipe(large, "klein-4b", tmp_path / "run", **rigid)
    said = plan(made, tflops=100.0, gpu="24GB")["refused"]
    assert said and "24.0 GB" in said and "more time" in said and len(said) <= 400
    followed = {}
    for key, value in re.findall(r"(micro_batch|gradient_checkpointing|rollout\.merged): (\w+)", said):
        followed[key] = json.loads(value)
    assert 1 <= len(followed) <= 3
    facts = plan(made.replaced(followed), tflops=100.0, gpu="24GB")
    assert facts["refused"] is None
    smaller = plan(recipe(large, "klein-4b", tmp_path / "run"), tflops=100.0, gpu="12GB")["refused"]
    assert smaller and "base_dtype: nf4 (" in smaller
    larger = plan(recipe(large, "qwen-image", tmp_path / "run"), tflops=100.0, gpu="24GB")["refused"]
    assert larger and "offload: blocks (" in larger
    written = plan(recipe(large, "qwen-image", tmp_path / "run", **rigid), tflops=100.0, gpu="24GB")["refused"]
    assert written and "offload: blocks, rollout.merged: false, gradient_checkpointing: true (" in written
    none = plan(recipe(large, "qwen-image", tmp_path / "run"), tflops=100.0, gpu="12GB")["refused"]
    assert none and "take a card of" in none


def test_a_run_that_was_merged_goes_on_with_an_offloaded_base(large: Path, tmp_path: Path) -> None:
    """What it kept of `auto` and an offloaded base cannot have is settled anew."""
    made = recipe(large, "klein-4b", tmp_path / "run", offload="blocks")
    folder = base_folder(made.base)
    run = outline(made, folder, check_teachers(made.teachers, folder, values=False))
    kept = {"dtype": "bf16", "micro_batch": 1, "gradient_checkpointing": False, "rollout.merged": True}
    settled = settle(made, run, card_named("24GB"), kept)
    assert settled.rollout.merged is False and settled.gradient_checkpointing is True and settled.micro_batch == 1


def test_a_base_in_fp32_stays_so_on_a_gpu_and_a_cpu_computes_in_fp32(large: Path, tmp_path: Path) -> None:
    header_only("klein-4b", large / "fp32", dtype="F32")
    made = recipe(large, "klein-4b", tmp_path / "run", base=str(large / "fp32" / "klein-4b"))
    assert plan(made, tflops=1.0, gpu="80GB")["settings"]["dtype"] == "fp32"
    here = recipe(large, "klein-4b", tmp_path / "run", device="cpu")
    assert plan(here, tflops=1.0)["settings"]["dtype"] == "fp32"


def test_a_file_larger_than_memory(large: Path, tmp_path: Path) -> None:
    """One file of a terabyte: headers are read, and nothing is mapped."""
    place = header_only("klein-4b", tmp_path / "large")
    sparse(place / "text_encoder" / "model.safetensors", {"w": (2**29, 1024)})
    made = recipe(large, "klein-4b", tmp_path / "run", base=str(place))
    assert plan(made, tflops=1.0, gpu="80GB")["peak"]["encoding"] > 2**40


def test_cards_by_name() -> None:
    assert card_named("24GB").memory == 24e9 and card_named("24 GiB").memory == 24 * 2**30
    for text in ("4090", "RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090"):
        assert card_named(text).memory == CARDS["4090"][0] * 1e9
    assert card_named("a100-40gb").memory < card_named("A100 80GB").memory == card_named("a100").memory
    assert card_named("H100-SXM5-80GB") == card_named("h100") and not card_named("T4").bf16
    for text, known in {
        "NVIDIA A100-SXM4-40GB": "a100-40gb", "A100-PCIE-40GB": "a100-40gb", "Tesla V100-SXM2-16GB": "v100-16gb",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA RTX 6000 Ada Generation": "6000-ada", "RTX 6000": "6000-ada",
    }.items():  # as torch says them
        assert card_named(text).memory == int(CARDS[known][0] * 1e9), text
    for text in ("", "24", "0GB", "-1GB", "nanGB", "5090ti super", "2x4090", "GB"):
        with pytest.raises(UserError, match="give its memory, such as 24GB, or its name"):
            card_named(text)


def test_a_run_keeps_its_settings_and_says_them_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's kind: everything fits on a CPU, in fp32. A run that began with other settings keeps those."""
    made = tiny_recipe(models, tmp_path / "run", steps=2)
    merge(made)
    said = capsys.readouterr().err
    assert said.count("settings: dtype fp32, micro_batch all, gradient_checkpointing false, rollout.merged true") == 1
    assert "learning rate" not in said
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "micro_batch: null" in text
    assert "auto" not in text.replace("kernels: auto", "").replace("device: auto", "").replace("cuda_graphs: auto", "")
    other = tmp_path / "other"
    less = {"validation": {"every": 0}, "monitor": {"every": 0}, "optimizer": {"schedule": "cosine"}, "save_every": 1}
    merge(tiny_recipe(models, other, steps=1, rollout={"steps": 2, "merged": False}, micro_batch=1, **less))
    merge(tiny_recipe(models, other, steps=2, rollout={"steps": 2}, **less))
    longer = "optimizer.schedule cosine ends at step 2 now, not at 1: the learning rate rises where the run goes on"
    assert longer in capsys.readouterr().err
    kept = Recipe.from_yaml(other / "recipe.yaml")
    assert kept.rollout.merged is False and kept.micro_batch == 1 and kept.steps == 2


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MERGE, "card_here", lambda device: Card("cpu", 10_000, False))
    monkeypatch.setattr(MERGE, "open_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=r"the merge needs about .* and cpu has 10.0 kB"):
        merge(tiny_recipe(models, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
