"""What a merge would refuse late, a plan refuses first; a merge refuses it before its base is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from header_only import sparse
from tiny import random_image
from tiny_merge import tiny_recipe

from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.files import lock_file
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.plan import plan
from danceopd.planning.checks import check_output
from danceopd.recipe.recipe import Recipe

Change = Callable[[Path], dict[str, Any]]


def recipe(models: Path, output: Path, **over: Any) -> Recipe:
    return Recipe(**{**tiny_recipe(models, output).resolved(), **over})


def drawing(place: Path, *adapters: str, **fields: Any) -> dict[str, Any]:
    """Teachers that draw, by their folders' names."""
    kind = {"capability": "generation", **fields}
    return {"teachers": [{**kind, "name": f"t{i}", "adapter": str(place / a)} for i, a in enumerate(adapters)]}


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def quantised_config(place: Path) -> dict[str, Any]:
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(place / "base" / "transformer" / "config.json", quantization_config=how)
    return {}


def quantised_otherwise(place: Path) -> dict[str, Any]:
    how = {"quant_method": "quanto", "weights_dtype": "int4"}
    edit_json(place / "base" / "transformer" / "config.json", quantization_config=how)
    return {}


def quantised_numbers(place: Path) -> dict[str, Any]:
    sparse(place / "base" / "transformer" / "diffusion_pytorch_model.safetensors", {"w": (4, 4)}, "F8_E4M3")
    return {}


def quantised_encoder(place: Path) -> dict[str, Any]:
    edit_json(place / "base" / "text_encoder" / "config.json", quantization_config={"quant_method": "nopackage"})
    return {}


def other_tensors(place: Path) -> dict[str, Any]:
    edit_json(place / "base" / "transformer" / "config.json", num_layers=3)
    return {}


def no_encoder(place: Path) -> dict[str, Any]:
    shutil.rmtree(place / "base" / "text_encoder")
    return {}


def long_prompt(place: Path) -> dict[str, Any]:
    (place / "prompts.txt").write_text("a red circle\n" + "a red circle " * 40 + "\n")
    return {"data": {"generation": str(place / "prompts.txt"), "rows": 6}}


def long_negative(place: Path) -> dict[str, Any]:
    return drawing(place, "draws", "edits", guidance=2.0, negative="no cross " * 40)


def other_base(place: Path) -> dict[str, Any]:
    write_adapter(read_adapter(place / "draws"), place / "stranger", metadata={"base_sha256": "0" * 64})
    return drawing(place, "stranger", "edits")


def squeezed_target(place: Path) -> dict[str, Any]:
    random_image(0, 128, 64).save(place / "wide.png")
    (place / "p.csv").write_text("prompt,target\na red circle,wide.png\na blue square,wide.png\n")
    data = {"generation": str(place / "p.csv")}
    return {**drawing(place, "draws", "edits"), "objective": "supervised", "data": data}


def three_in_a_slerp(place: Path) -> dict[str, Any]:
    return {**drawing(place, "draws", "edits", "edits"), "student": {"rank": 8, "init_method": "slerp"}}


def contrast_of_one_prompt(place: Path) -> dict[str, Any]:
    (place / "prompts.txt").write_text("a red circle\na red circle\n")
    moved = {"t0": {"weight": 0.5, "reference": "prompt"}}
    return drawing(place, "draws", "edits", data=str(place / "prompts.txt")) | {"contrast": moved}



CASES: dict[Change, str] = {
    quantised_config: "was saved quantised to 4 bits, which diffusers loads on a GPU alone",
    quantised_otherwise: r"stored quantised \('quanto'\), and of such a base only",
    quantised_numbers: r"holds quantised weights \(F8_E4M3\)",
    quantised_encoder: "saved quantised by nopackage, which is not installed",
    other_tensors: "lacks .* of its .* tensors",
    no_encoder: "has no folder text_encoder",
    long_prompt: r"prompts.txt, line 2 has \d+ tokens and would be cut at 24",
    squeezed_target: "line 2: the target is 128x64 pixels and would be squeezed into 64x64",
    long_negative: r"the negative prompt of 't0' has \d+ tokens",
    other_base: "was trained on another base",
    three_in_a_slerp: "slerp blends 2 adapters and here are 3",
    contrast_of_one_prompt: "has reference prompt, and all rows of .* share one, so it would move nothing",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_refused_by_plan_and_by_merge_before_anything_is_loaded(
    models: Path, tmp_path: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models"
    shutil.copytree(models, place)
    loaded = lambda *_, **__: pytest.fail("the base was loaded")  # noqa: E731
    monkeypatch.setattr(import_module("danceopd.assembly"), "load_base", loaded)
    made = recipe(place, **{"output": place / "run", **change(place)})
    for command in (lambda: plan(made, tflops=1.0), lambda: merge(made)):
        with pytest.raises(UserError, match=CASES[change]) as refused:
            command()
        assert len(str(refused.value)) < 600
    assert not (place / "run" / "recipe.yaml").exists()


def test_an_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_output(tmp_path / "file" / "run")


def test_a_folder_that_is_in_use_and_a_run_of_other_weights(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    shutil.copytree(models, place)
    made = tiny_recipe(place, tmp_path / "run", steps=1, save_every=1)
    merge(made)
    assert plan(made, tflops=1.0)["refused"] is None  # also of a run that has ended
    more = tiny_recipe(place, tmp_path / "run", steps=2)
    held = lock_file(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match="in use by another danceopd process"):
        plan(more, tflops=1.0)
    assert held is not None
    held.close()
    shutil.copytree(place / "edits", place / "draws", dirs_exist_ok=True)
    for command in (lambda: plan(more, tflops=1.0), lambda: merge(more)):
        with pytest.raises(UserError, match="teacher 'generation' is no longer what the run"):
            command()


def test_a_distilled_base_takes_few_steps_and_says_so(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    shutil.copytree(models, place)
    call = {"height": 64, "width": 64, "max_sequence_length": 24}
    silent = tiny_recipe(place, tmp_path / "run", rollout={}, call=call)
    for name, says in (
        ("tiny-turbo", r"the base's name says 'turbo', .* write fast: \{steps: 4\}, or rollout: \{steps: 16\} if"),
        ("lightning-8steps", r"write fast: \{steps: 8\}"),
        ("undistilled", None),
        ("de-distilled", None),
    ):
        shutil.copytree(place / "base", tmp_path / name)
        named = tiny_recipe(place, tmp_path / "run", base=str(tmp_path / name), rollout={}, call=call)
        if says is None:
            assert plan(named, tflops=1.0)["queries"]["depth"] > 4
            continue
        with pytest.raises(UserError, match=says):
            plan(named, tflops=1.0)
        assert plan(named.replaced({"call.num_inference_steps": 3}), tflops=1.0)["queries"]["depth"] <= 3
    edit_json(place / "base" / "model_index.json", is_distilled=True)
    for command in (lambda: plan(silent, tflops=1.0), lambda: merge(silent)):
        with pytest.raises(UserError, match=r"the base is distilled .* names no steps; write fast: \{steps: 4\}$"):
            command()
    silent = tiny_recipe(place, tmp_path / "run", rollout={}, call={**call, "num_inference_steps": 4})
    facts = plan(silent, tflops=1.0)
    assert facts["queries"]["depth"] <= 4
    assert any("so rollout.steps 4; name another" in note for note in facts["notes"])
    fast = tiny_recipe(place, tmp_path / "run", rollout={}, call=call, fast={"steps": 4})
    assert plan(fast, tflops=1.0)["queries"] == facts["queries"]
    several = tiny_recipe(models, tmp_path / "run", rollout={}, call=call, fast={"steps": 4, "teacher_steps": 3})
    assert plan(several, tflops=1.0)["passes"]["teachers"] == 3 * facts["passes"]["teachers"]
    unsure = tiny_recipe(models, tmp_path / "run", rollout={}, call=call, fast={"steps": 4})
    assert any("fast.teacher_steps 4 shows it where they lead" in note for note in plan(unsure, tflops=1.0)["notes"])
    named = plan(tiny_recipe(place, tmp_path / "run", rollout={"steps": 16}), tflops=1.0)
    assert any("rollout.steps is 16; 4 is usual" in note for note in named["notes"])
    few = plan(tiny_recipe(place, tmp_path / "run", rollout={"steps": 3}), tflops=1.0)
    assert not any("distilled" in note for note in few["notes"])
    guided = recipe(place, tmp_path / "run", **drawing(place, "draws", "edits", guidance=2.0))
    assert any("teacher 't0' is guided" in note for note in plan(guided, tflops=1.0)["notes"])
    merge(tiny_recipe(place, tmp_path / "run", steps=1, rollout={}, call={**call, "num_inference_steps": 4}))
    kept = Recipe.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert kept.rollout.steps == 4 and kept.call["num_inference_steps"] == 4


def test_a_plan_says_what_size_is_drawn(models, tmp_path):
    call = {"max_sequence_length": 64, "height": 72, "width": 64}
    facts = plan(tiny_recipe(models, tmp_path / "run", call=call), tflops=1.0)
    assert any("call.height 72 and call.width 64 are drawn as 64 and 64" in note for note in facts["notes"])
    with pytest.raises(UserError, match="height 8 and width 64 leave no picture"):
        plan(tiny_recipe(models, tmp_path / "run", call={**call, "height": 8}), tflops=1.0)
