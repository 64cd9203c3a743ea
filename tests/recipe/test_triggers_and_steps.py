"""What a recipe says of many teachers: triggers, few steps, rows by need; and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from danceopd.errors import UserError
from danceopd.recipe.fast import steps_of
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe


def of(trigger: str) -> Teacher:
    return Teacher(name="t", adapter="base", capability="generation", trigger=trigger)


@pytest.mark.parametrize(
    "trigger, template, prompt, worded",
    [
        ("in the style of sketch", "{prompt}, in the style of sketch", "a fox", "a fox, in the style of sketch"),
        (" sks ", "{prompt}, sks", "a desks", "a desks, sks"),  # not a word of its own there
        ("sks", "{prompt}, sks", "a SKS fox", "a SKS fox"),
        ("ink of {prompt}, fine", "ink of {prompt}, fine", "a fox", "ink of a fox, fine"),
        ("ink of {prompt}, fine", "ink of {prompt}, fine", "ink of a fox", "ink of ink of a fox, fine"),
        ("{x} \\1 (a+b)", "{prompt}, {x} \\1 (a+b)", "a {prompt} fox", "a {prompt} fox, {x} \\1 (a+b)"),
    ],
)
def test_a_trigger_joins_prompts_that_have_it_not_yet(trigger, template, prompt, worded) -> None:
    teacher = of(trigger)
    assert teacher.trigger == template and teacher.worded(prompt) == worded
    assert teacher.worded(worded) == worded
    assert Teacher(**teacher.model_dump()) == teacher


def test_steps_that_a_name_says() -> None:
    names = {"Qwen-Image-Lightning-8steps-V1.1.safetensors": 8, "x/hyper-flux-16step": 16,
             "FLUX.1-schnell": 4, "Tongyi-MAI/Z-Image-Turbo": 8,
             "klein-4B": 4, "/40steps/lora-Lightning-4steps": 4, "0steps": 4}  # fmt: skip
    assert {name: steps_of(name) for name in names} == names


def test_fast_sets_the_steps_of_rollouts_and_of_the_call(files: dict) -> None:
    recipe = Recipe(**files, fast={"steps": 4}, rollout={"solver": "ab2"}, call={"height": 64})
    assert (recipe.rollout.steps, recipe.rollout.solver) == (4, "ab2")
    assert recipe.call == {"height": 64, "num_inference_steps": 4} and recipe.small_steps == 1
    assert Recipe(**recipe.resolved()) == recipe
    assert not recipe.fast.stacks and Recipe(**files).small_steps == 1  # type: ignore[union-attr]
    few = Recipe(**files, fast={"steps": 8, "adapter": "models/draws"})
    assert few.fast.stacks and few.fast.adapter == str(Path("models/draws").absolute())  # type: ignore[union-attr]
    shown = Recipe(**files, fast={"steps": 8, "adapter": "models/draws", "teacher_steps": 4})
    assert not shown.fast.stacks and shown.small_steps == 4  # type: ignore[union-attr]


NEED = {"routing": {"per": "need"}}


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"fast": {}}, "fast says no number of steps; write fast: {steps: 4}"),
        ({"fast": {"adapter": "lightning-8steps"}}, r"write fast: {steps: 8}, or what .*lightning-8steps is made for"),
        ({"fast": {"steps": 4}, "rollout": {"steps": 5}}, "fast.steps is 4 and rollout.steps is 5"),
        ({"fast": {"steps": 4}, "call": {"num_inference_steps": 8}}, "and call.num_inference_steps is 8"),
        ({"fast": {"steps": 4, "adapter": "no.safetensors"}}, "adapter 'no.safetensors' does not exist"),
        ({"fast": {"steps": 4}, "rollout": {"noise": 0.7}}, "rollout.noise makes others; leave one of them out"),
        ({"fast": {"steps": 4, "teacher_steps": 2}, "objective": "supervised"}, "which objective supervised and gates"),
        ({"fast": {"steps": 4, "teacher_steps": 2}, "monitor": {"every": 9}}, "set monitor.every: 0"),
        ({**NEED, "validation": {"every": 0}}, "validation.every is 0; set it, such as 50"),
        ({**NEED, "gates": {"evidence": True}}, "routing.per need was never tried with gates"),
    ],
)
def test_recipes_that_are_refused(files: dict, fields: dict, says: str) -> None:
    shutil.copytree("models/draws", "lightning-8steps")
    with pytest.raises(UserError, match=says):
        Recipe(**files, **fields)


@pytest.mark.parametrize(
    "changes, says",
    [
        ([{"trigger": "Sketch"}, {"trigger": "sketch"}], "'t0' and 't1' have one trigger, '{prompt}, sketch'"),
        ([{"trigger": " , "}, {}], "is ' , ', without a word"),
        ([{"trigger": "{prompt} and {prompt}"}, {}], "has {prompt} twice"),
        ([{"adapter": "base", "trigger": "x"}, {}], "'t0' is the bare base, which no trigger asks for"),
    ],
)
def test_triggers_that_are_refused(files: dict, changes: list[dict], says: str) -> None:
    made = [{"name": f"t{i}", "adapter": "models/draws", "capability": "generation"} for i in range(2)]
    with pytest.raises(UserError, match=says):
        Recipe(base=files["base"], teachers=[one | change for one, change in zip(made, changes)])


def test_a_trigger_may_stand_for_both_capabilities_and_the_base_may_become_few_steps(files: dict) -> None:
    made = [{"name": c, "adapter": "base", "capability": c} for c in ("generation", "editing")]
    with pytest.raises(UserError, match="nothing to merge"):
        Recipe(base=files["base"], teachers=made, fast={"steps": 4})
    Recipe(base=files["base"], teachers=made, fast={"steps": 4, "teacher_steps": 4})
    Recipe(base=files["base"], teachers=[one | {"adapter": "models/draws", "trigger": "sks"} for one in made])


def test_a_run_by_need_goes_on_with_the_checks_that_it_began_with(files: dict) -> None:
    one, other = (Recipe(**files, **NEED, validation={"every": every}) for every in (50, 100))
    assert one.identity() != other.identity()
    assert Recipe(**files, validation={"every": 50}).identity() == Recipe(**files).identity()
