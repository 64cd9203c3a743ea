"""Many teachers from end to end on a tiny pipeline: triggers, rows by need, a student of few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import random_adapter
from tiny_merge import WEIGHTS, json_lines, run, tiny_recipe

from danceopd.adapters.blend import blend
from danceopd.adapters.fuse import fuse
from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.data.dataset import open_datasets, sampled_rows
from danceopd.data.routing import sample_batch
from danceopd.engine.teachers import check_teachers
from danceopd.engine.warm_start import student_init
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.base import load_base
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.fast import Fast
from danceopd.recipe.parts import Student
from danceopd.recipe.recipe import Recipe
from danceopd.run.card import load_snippet, write_card
from danceopd.run.heldout import held_out_rows
from danceopd.run.many.need import needed

PROMPTS = ["a red circle", "two blue star", "a white ring above", "a green cross", "a black star", "a ring"]
GENERAL = ["a blue ring", "two red cross", "a white star", "a yellow square", "a purple star", "a cross below"]


@pytest.fixture(scope="module")
def place(models, tmp_path_factory) -> Path:
    """`models` with prompts, general prompts, and a step-distilled LoRA whose name says eight steps."""
    folder = shutil.copytree(models, tmp_path_factory.mktemp("many") / "models")
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    (folder / "general.txt").write_text("\n".join(GENERAL))
    transformer = load_base(folder / "base").transformer
    write_adapter(random_adapter(transformer, seed=7, size=0.1, rank=2), folder / "lightning-8steps")
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    def make(name: str = "run", **fields) -> Recipe:
        given = tiny_recipe(place, tmp_path / name).resolved()
        kept = {k: given[k] for k in ("base", "output", "samples", "save_every", "call", "rollout")}
        return Recipe(**{**kept, **three_teachers(place), "validation": {"rows": 2}, **fields})

    return make


def three_teachers(place: Path) -> dict:
    """A teacher with a trigger, another with one, and the base on general prompts."""
    teachers = [
        {"name": "sketch", "adapter": str(place / "draws"), "capability": "generation", "trigger": "with star"},
        {"name": "ink", "adapter": str(place / "edits"), "capability": "generation", "trigger": "black {prompt}"},
        {"name": "plain", "adapter": "base", "capability": "generation", "data": str(place / "general.txt")},
    ]
    return {"teachers": teachers, "data": {"generation": str(place / "p.txt")}, "batch": 6, "steps": 4,
            "student": {"rank": 12}}  # fmt: skip


def test_prompts_have_their_teachers_triggers_wherever_they_are_read(recipe):
    made = recipe()
    found = open_datasets(made)
    assert found["sketch"].data[0] == "a red circle, with star" == found["sketch"].data.prompt(0)
    assert found["ink"].data[:2] == ["black a red circle", "black two blue star"]
    assert found["plain"].data[0] == "a blue ring"
    assert found["sketch"].data.table is found["ink"].data.table  # opened once
    sketch, *_ = made.teachers
    held = held_out_rows(sketch, made.data_source(sketch), found["sketch"], 2, 0)
    assert all(row.prompt.endswith(", with star") for row in held)
    scenes = held_out_rows(sketch, "scenes", found["sketch"], 2, 0)
    assert all(row.prompt.endswith(", with star") for row in scenes)


def test_a_merge_says_its_triggers_and_goes_on_with_the_same_bytes(recipe):
    """By need, too: the shares come from checks that a continued run has from its checkpoint."""
    by_need = {"routing": {"per": "need"}, "validation": {"every": 1, "rows": 2}, "save_every": 1}
    made = recipe(**by_need)
    run(made)
    shares = [line for line in json_lines(made.output / "metrics.jsonl") if "share/ink" in line]
    assert len(shares) == 4
    found = [[line[f"share/{name}"] for name in ("sketch", "ink", "plain")] for line in shares]
    assert all(sum(row) == pytest.approx(1) for row in found) and found[0] != pytest.approx([1 / 3] * 3)
    card = (made.output / "README.md").read_text()
    assert "| `sketch` | `{prompt}, with star` | generation |" in card and "`black {prompt}`" in card
    assert 'prompt="black a red circle above a blue square"' in card
    again = recipe("again", **by_need)
    run(again, kill=2)
    assert run(again) == [3, 4]
    assert (again.output / WEIGHTS).read_bytes() == (made.output / WEIGHTS).read_bytes()
    plain = recipe("plain", validation={"every": 1, "rows": 2})
    run(plain)
    assert (plain.output / WEIGHTS).read_bytes() != (made.output / WEIGHTS).read_bytes()


def test_the_rows_of_a_run_by_need_are_known_before_its_shares_are(recipe):
    made = recipe(routing={"per": "need", "weights": {"ink": 3}}, batch=7, steps=5)
    lengths = [900, 800, 700]
    known = sampled_rows(made.sampling, lengths)
    assert max(map(len, known)) < 7 * 5 + 4 * 5
    for shares in (made.sampling.shares, (0.05, 0.05, 0.9), (0.69, 0.3, 0.01), (0.1, 0.8, 0.1)):
        for step in range(5):
            teachers, rows = sample_batch(made.sampling, step, lengths, shares)
            assert all(row in known[teacher] for teacher, row in zip(teachers, rows))
            assert abs(teachers.count(2) - 7 * shares[2]) <= 1


def test_need_forgets_no_teacher_and_gives_none_all():
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    now = needed(shares, {"a": 0.1, "b": 0.9, "c": 0.5})
    assert sum(now.values()) == pytest.approx(1) and now["b"] > 0.25 and now["a"] < 0.5 and now["a"] > 0.5 / 9
    assert needed(shares, {}) == shares == needed(shares, dict.fromkeys(shares, 0.0))
    assert needed(shares, {"a": float("nan"), "b": 1.0, "c": 1.0})["a"] > 0
    many = {str(i): 1 / 16 for i in range(16)}
    assert max(needed(many, {"3": 1.0} | {str(i): 0.0 for i in range(16) if i != 3}).values()) <= 9 / 16


def test_the_snippet_asks_each_teacher_by_its_trigger(recipe, tmp_path):
    teachers = [
        {"name": "ink", "capability": "generation", "trigger": "{prompt}, “inked” \"so\""},
        {"name": "wash", "capability": "editing", "trigger": "wash: {prompt}"},
        {"name": "other", "capability": "editing", "trigger": None},
    ]
    code = load_snippet("base", {"num_inference_steps": 4}, teachers=teachers)
    compile(code, "snippet", "exec")
    assert 'drawn = pipe(prompt="a red circle above a blue square, “inked” \\"so\\"", num_inference_steps=4)' in code
    assert 'edited = pipe(image=drawn, prompt="wash: make the circle green"' in code and "other" not in code
    assert "trigger" not in load_snippet("base", {}, teachers=teachers[2:])
    card = write_card(tmp_path, {"base": "base", "teachers": teachers, "fast": {"steps": 4}}).read_text()
    assert "draws in **4 steps**" in card


# -- few steps --------------------------------------------------------------------------------------------


def test_a_student_of_few_steps_says_so_in_its_file_its_card_and_its_pipeline(recipe, place, tmp_path, capsys):
    few = {"fast": {"steps": 2, "adapter": str(place / "lightning-8steps")}, "call": {}, "rollout": {}}
    made = recipe(**few | {"call": {"height": 64, "width": 64, "max_sequence_length": 24}}, steps=2)
    run(made)
    assert inspect_adapter(made.output).record["num_inference_steps"] == "2"
    card = (made.output / "README.md").read_text()
    assert "num_inference_steps=2" in card and "draws in **2 steps**" in card
    assert "with fast.adapter on top" in card
    said = json.loads((made.output / "teachers.json").read_text())
    assert said["fast.adapter"] == read_adapter(place / "lightning-8steps").sha256
    whole = fuse(made.output, tmp_path / "whole")
    assert json.loads((whole / "danceopd.json").read_text())["num_inference_steps"] == 2
    other = recipe(**few | {"call": made.call}, steps=3)
    transformer = load_base(place / "base").transformer
    write_adapter(random_adapter(transformer, seed=9, size=0.1, rank=2), tmp_path / "changed")
    changed = Recipe(**other.resolved() | {"fast": {"steps": 2, "adapter": str(tmp_path / "changed")}})
    with pytest.raises(UserError, match=r"fast.adapter is no longer what the run in"):
        run(changed)


def test_teachers_are_asked_with_the_fast_adapter_on_top(place):
    """As the sum of both LoRAs, each at its strength; not where they show their small steps."""
    transformer = load_base(place / "base").transformer
    teachers = Recipe(
        base=str(place / "base"),
        teachers=[{"name": "a", "adapter": str(place / "draws"), "capability": "generation", "scale": 0.5},
                  {"name": "b", "adapter": "base", "capability": "generation"}],
        fast={"steps": 2, "adapter": str(place / "lightning-8steps"), "scale": 2.0},
    )  # fmt: skip
    draws, light = read_adapter(place / "draws"), read_adapter(place / "lightning-8steps")
    backbone = Backbone(transformer, FAMILIES["flux2-klein"])
    one, other = check_teachers(teachers.teachers, place / "base", fast=teachers.fast)
    one.attach(backbone, merged=False)
    assert other.attach(backbone, merged=False).name == "b" and backbone.adapters == ["a", "b"]
    for name, parts, weights in (("a", [draws, light], [0.5, 2.0]), ("b", [light], [2.0])):
        wanted, found = blend(parts, weights), backbone.adapter(name)
        for module in wanted.tensors:
            torch.testing.assert_close(found.delta(module), wanted.delta(module))
    small = Fast(steps=2, adapter=str(place / "lightning-8steps"), teacher_steps=3)
    assert not any(one.stacks for one in check_teachers(teachers.teachers, place / "base", fast=small))


@pytest.mark.parametrize("init", ["base", "blend", "a"])
def test_the_student_starts_with_the_fast_adapter_on_top(place, init):
    draws, edits = read_adapter(place / "draws"), read_adapter(place / "edits")
    light = read_adapter(place / "lightning-8steps")
    parts = {"base": ([], []), "blend": ([draws, edits], [0.5, 0.5]), "a": ([draws], [1.0])}[init]
    teachers = {"a": (draws, 1.0), "b": (edits, 1.0)}
    start = student_init(Student(rank=16, init=init), teachers, lambda path: (draws, path), fast=light)
    wanted = blend([*parts[0], light], [*parts[1], 1.0])
    for module in wanted.tensors:
        torch.testing.assert_close(start.adapter.delta(module), wanted.delta(module), atol=1e-4, rtol=1e-3)
    assert start.sentence.endswith("with fast.adapter on top.") and start.residual < 1e-5
    cut = student_init(Student(rank=2, init=init), teachers, lambda path: (draws, path), fast=light)
    assert (cut.residual > 0.01) == (init != "base") and cut.adapter.rank == 2


def test_what_a_fast_adapter_may_not_be(recipe, place):
    fast = {"steps": 2, "adapter": str(place / "base")}
    with pytest.raises(UserError, match="fast.adapter .* is a whole model; make it the base, or a LoRA"):
        run(recipe(fast=fast, call={}, rollout={}))


def test_a_student_learns_where_small_steps_of_its_teachers_lead(recipe):
    """The error that a run measures is that of its targets: more of a teacher's steps, another one."""
    found = {}
    for small in (1, 3):
        made = recipe(f"small-{small}", fast={"steps": 2, "teacher_steps": small}, rollout={}, steps=1,
                      call={"height": 64, "width": 64, "max_sequence_length": 24})  # fmt: skip
        run(made)
        found[small] = [line for line in json_lines(made.output / "metrics.jsonl") if "loss" in line][0]["loss"]
    assert found[1] != pytest.approx(found[3], rel=1e-3)
