"""Inputs recorded for a blend by regression, on tiny pipelines of every family; the command; a student's start."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tinies import TINYS
from tiny import random_adapter, tiny_klein
from tiny_merge import family_recipe, tiny_recipe
from tiny_merge import run as merged
from tiny_trainer import KLEIN, tiny_data
from typer.testing import CliRunner

from danceopd.adapters.blend import blend, blend_with_residual, delta_norm
from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.regression.moments import Moments
from danceopd.cli.app import app
from danceopd.cli.blend import Request, planned
from danceopd.cli.blend import run as blended
from danceopd.cli.blending.asked import Asked
from danceopd.data.dataset import ConditionDataset
from danceopd.engine.calibration.inputs import RecordedInputs
from danceopd.engine.calibration.states import Questions
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe

CPU = torch.device("cpu")
DEEP = "single_transformer_blocks.1.attn.to_out"
SHALLOW = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def klein():
    """A tiny transformer, two LoRAs of it of which one lacks a block, and questions for both."""
    transformer, data = tiny_klein().transformer, tiny_data()
    one, two = (random_adapter(transformer, rank=r, seed=r, size=0.1) for r in (3, 4))
    two = Adapter({name: pair for name, pair in two.tensors.items() if not name.startswith("transformer_blocks.1.")})
    sigmas = data.sigmas[[0, 2, 4, 6]]
    sets = [ConditionDataset([(data.conditions[name], sigmas)]) for name in ("generation", "editing")]
    return transformer, [one, two], [Questions(dataset, [0, 1, 3]) for dataset in sets]


def recorded(klein, method, seen=None, **how):
    transformer, adapters, questions = klein
    backbone = Backbone(copy.deepcopy(transformer), KLEIN)
    with RecordedInputs(backbone, questions, CPU, at_once=2, **how) as inputs:
        if seen is not None:
            of = inputs.of
            inputs.of = lambda layer: seen.setdefault(layer, of(layer))
        found = blend_with_residual(adapters, method=method, inputs=inputs).adapter
    assert backbone.adapters == []
    return found, inputs


def fused(transformer, *adapters):
    """A copy of the transformer, without LoRA layers, whose weights are W + BA."""
    model = copy.deepcopy(transformer)
    with torch.no_grad():
        for adapter in adapters:
            for name in adapter.tensors:
                model.get_submodule(name).weight += adapter.delta(name)
    return model


@torch.no_grad()
def gram(model, layer, states):
    """The mean Gram matrix of a Linear's inputs, by torch's own hook."""
    total, kept, rows = 0, [], sum(len(state.x) for state in states)
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(args[0]))
    for state in states:
        KLEIN.velocity(model, state.x, state.sigma, state.condition)
    handle.remove()
    for state, found in zip(states, kept, strict=True):
        x = found.flatten(0, -2).double()
        total = total + len(state.x) / rows * x.T @ x / len(x)
    return total


def close(one, other, size=1e-4):
    assert float((one.double() - other.double()).norm()) <= size * float(other.double().norm())


def test_states_are_the_teachers_own_rollouts_at_all_noise_levels(klein):
    _, inputs = recorded(klein, "ssr")
    transformer, adapters, questions = klein
    sigmas = questions[0].dataset.sigmas(0)
    for adapter, states in zip(adapters, inputs.states):
        assert [len(state.x) for state in states] == [2, 2, 2, 1, 1, 1]
        assert [float(state.sigma[0]) for state in states] == [*sigmas[:3].tolist()] * 2
        first, second = states[:2]
        with torch.no_grad():
            v = KLEIN.velocity(fused(transformer, adapter), first.x, first.sigma, first.condition)
        close(second.x, first.x + (sigmas[1] - sigmas[0]) * v)


@pytest.mark.parametrize("room", [None, 1])
def test_regmean_sees_what_each_loras_own_layers_get(klein, room):
    """Also where only one layer at a time has room."""
    seen: dict[str, Moments] = {}
    found, inputs = recorded(klein, "regmean", seen, room=room)
    assert len(inputs.stages) == (1 if room is None else len(seen))
    transformer, adapters, _ = klein
    for layer in (SHALLOW, DEEP, "transformer_blocks.1.attn.to_k"):
        each = [gram(fused(transformer, a), layer, states) for a, states in zip(adapters, inputs.states)]
        close(seen[layer].total, sum(each))
        close(seen[layer].crossed[0], adapters[0].tensors[layer][0].double() @ each[0])
        close(seen[layer].diagonals[1], each[1].diagonal())
    assert seen["transformer_blocks.1.attn.to_k"].crossed[1] is None
    assert found.ranks[DEEP] == 7 and found.ranks["transformer_blocks.1.attn.to_k"] == 3


def test_regmean_plus_plus_sees_what_the_merged_network_gives(klein):
    """All blocks before a layer's are blended; those of its own are still each LoRA's."""
    seen: dict[str, Moments] = {}
    found, inputs = recorded(klein, "regmean++", seen)
    transformer, adapters, _ = klein
    own = DEEP.rpartition(".attn")[0]
    before = Adapter({name: pair for name, pair in found.tensors.items() if not name.startswith(own)})
    each = []
    for adapter, states in zip(adapters, inputs.states):
        mine = Adapter({name: pair for name, pair in adapter.tensors.items() if name.startswith(own)})
        each.append(gram(fused(transformer, before, mine), DEEP, states))
    close(seen[DEEP].total, sum(each), 1e-3)
    plain = gram(fused(transformer, adapters[0]), DEEP, inputs.states[0])
    assert (each[0] - plain).norm() > 1e-2 * plain.norm()
    assert found.sha256 != recorded(klein, "regmean")[0].sha256


def test_a_lora_of_weight_0_takes_no_part(klein):
    transformer, adapters, questions = klein
    with RecordedInputs(Backbone(copy.deepcopy(transformer), KLEIN), questions, CPU) as inputs:
        found = blend(adapters, [0.0, 1.0], method="ssr", inputs=inputs)
    assert inputs.states[0] == []
    close(found.delta(SHALLOW), adapters[1].delta(SHALLOW), 1e-1)


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_every_family_is_blended_by_its_inputs(tiny, tmp_path):
    recipe = family_recipe(tiny, tiny.build(), tmp_path)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    loras, asked = [tmp_path / f"teacher{i}" for i in range(2)], Asked([str(tmp_path / "r.yaml")], 2)
    found = blended(Request(loras, tmp_path / "out", "regmean++", base=tmp_path / "base", asked=asked))[1].adapter
    one, two = (read_adapter(lora) for lora in loras)
    assert found.ranks == {name: 2 * rank for name, rank in one.ranks.items()}
    assert all(bool(torch.isfinite(half).all()) for pair in found.tensors.values() for half in pair)
    mean = blend([one, two])
    assert delta_norm(blend([found, mean], [1.0, -1.0])) / delta_norm(mean) > 0.05


# The command


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Prompts, and edits, as files."""
    from tiny import random_image

    folder = tmp_path_factory.mktemp("sources")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue square\n")
    random_image(0).save(folder / "0.png")
    (folder / "edits.jsonl").write_text(json.dumps({"prompt": "make it red", "image": "0.png"}))
    return folder


def test_the_plan_says_what_is_recorded_and_the_memory(models, sources, tmp_path):
    data = [str(sources / "prompts.txt"), str(sources / "edits.jsonl")]
    how = {"base": models / "base", "asked": Asked(data, device="cpu")}
    said = planned(Request([models / "draws", models / "edits"], tmp_path / "out", "regmean", **how))
    assert f"inputs of draws: 2 prompts of {data[0]}, at 16 noise levels" in said
    assert f"inputs of edits: 1 edits of {data[1]}" in said
    assert "Gram matrices" in said and not (tmp_path / "out").exists()
    sums = planned(Request([models / "draws", models / "edits"], tmp_path / "out", "linear", base=models / "base"))
    assert "Gram" not in sums and "inputs" not in sums


@pytest.mark.parametrize(
    "method, data, prompts, base, says",
    [
        ("linear", ["prompts.txt"], None, True, "linear looks at no inputs, so --data has no meaning"),
        ("ties", [], 3, True, "so --prompts has no meaning"),
        ("regmean", ["prompts.txt"], 0, True, "--prompts is 0; give a number from 1"),
        ("regmean", ["prompts.txt"], None, False, "runs the base model to record inputs .* give it with --base"),
        ("regmean++", [], None, True, "give --data FILE once for each"),
        ("ssr", ["gone.txt"], None, True, "gone.txt does not exist"),
        ("ssr", ["scenes"], None, True, "write generation=scenes or editing=scenes"),
        ("ssr", ["hub:me/mine"], None, True, "say what it holds"),
        ("ssr", ["prompts.txt"] * 3, None, True, "given 3 times for 2 LoRAs"),
        ("ssr", ["editing=prompts.txt"], None, True, "edits need a source image"),
        ("ssr", ["other.yaml"], None, True, "has no teacher with the LoRA"),
        ("ssr", ["other.yaml", "prompts.txt"], None, True, "give the recipe alone"),
        ("ssr", ["broken.yaml"], None, True, "teeachers"),
        ("ssr", ["empty.txt"], None, True, "no rows|is empty|has no"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(models, sources, tmp_path, method, data, prompts, base, says):
    (sources / "other.yaml").write_text("steps: 3\n")
    (sources / "broken.yaml").write_text("teeachers: []\n")
    (sources / "empty.txt").write_text("\n")
    named = [
        f"editing={sources / one[8:]}" if one.startswith("editing=") else
        str(sources / one) if "." in one else one for one in data
    ]  # fmt: skip
    request = Request(
        [models / "draws", models / "edits"], tmp_path / "out", method, base=models / "base" if base else None,
        asked=Asked(named, prompts),
    )  # fmt: skip
    for ask in (planned, blended):
        with pytest.raises(UserError, match=says) as caught:
            ask(request)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_lora_is_refused_and_the_program_ends_with_2(models, sources, tmp_path):
    with pytest.raises(UserError, match="merges two LoRAs or more"):
        blended(Request([models / "draws"], tmp_path / "out", "ssr", base=models / "base"))
    words = [models / "draws", models / "edits", "--method", "ssr", "-o", tmp_path / "out", "--prompts", "2"]
    done = CliRunner().invoke(app, ["blend", *map(str, words)])
    assert done.exit_code == 2 and "give it with --base" in " ".join(done.output.split())


# A student's start


def test_a_start_by_the_name_of_a_method():
    recipe = Recipe(student={"init": "regmean"})
    assert (recipe.student.init, recipe.student.init_method) == ("blend", "regmean")
    assert Recipe(**recipe.resolved()) == recipe
    for student, says in (
        ({"init": "ties", "init_method": "knots"}, "student: init names ties and init_method knots"),
        ({"init": "regmeen"}, "did you mean 'regmean'"),
    ):
        with pytest.raises(UserError, match=says):
            Recipe(student=student)
    with pytest.raises(UserError, match="records inputs of whole layers, which parallel fsdp shares out"):
        Recipe(student={"init": "ssr"}, parallel="fsdp")


def test_a_merge_starts_at_the_recorded_blend_and_keeps_it(models, tmp_path, monkeypatch):
    """The same blend as the command's; a run that goes on reads it and records nothing."""
    fields = {"student": {"rank": 8, "init": "regmean"}, "optimizer": {"lr": 1e-9}, "steps": 2, "save_every": 1}
    recipe = tiny_recipe(models, tmp_path / "student", **fields)
    merged(recipe, kill=1)
    kept = next((tmp_path / "student" / "cache").glob("start-*"))
    sentence = "The student started as the regmean blend of 1 x generation and 1 x editing, exactly."
    assert inspect_adapter(kept).record["started"] == sentence
    monkeypatch.setattr("danceopd.assembly.RecordedInputs", None)  # whoever records now fails
    merged(recipe)
    start, student = read_adapter(kept), read_adapter(tmp_path / "student")
    close(student.delta(SHALLOW), start.delta(SHALLOW), 1e-3)
    linear = blend([read_adapter(models / name) for name in ("draws", "edits")])
    assert delta_norm(blend([start, linear], [1.0, -1.0])) > 0.05 * delta_norm(linear)
    assert sentence in " ".join((tmp_path / "student" / "README.md").read_text().split())
