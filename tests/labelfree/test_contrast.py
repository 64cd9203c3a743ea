"""Targets past a teacher: the formula, each reference against velocities asked by hand, and whole merges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flows import Gaussian
from tiny_merge import WEIGHTS, run, tiny_recipe
from tiny_trainer import NAMES, batches_of, make_trainer, tiny_data, train

from danceopd.adapters.blend import scaled
from danceopd.engine.objectives import velocity_error
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.labelfree.contrast import contrasted
from danceopd.labelfree.gates.evidence import edit_mask
from danceopd.models.fields import AdapterField, BaseField, ContrastField, GuidedField, unguided
from danceopd.pipelines.registry import with_prompt_of
from danceopd.plan import plan
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def data():
    return tiny_data(variants=True)


def constant(value):
    return lambda x, sigma, condition: torch.full_like(x, value)


class Rows:
    """A condition without content."""

    def rows(self, index):
        return self


X, SIGMA = torch.zeros(3, 4), torch.tensor([0.2, 0.5, 0.9])


@pytest.mark.parametrize(
    "how, expected",
    [
        ({"weight": 0.5}, [3.0, 3.0, 3.0]),  # 2 + 0.5 (2 - 0)
        ({"weight": 0.5, "sigma": (0.5, 1.0)}, [2.0, 3.0, 3.0]),
        ({"weight": 0.5, "sigma": (0.95, 1.0)}, [2.0, 2.0, 2.0]),
        ({"weight": 4.0, "bound": 0.25}, [2.5, 2.5, 2.5]),  # |shift| at most a quarter of |v|
        ({"weight": 0.1, "bound": 0.25}, [2.2, 2.2, 2.2]),
        ({"weight": 0.5, "mask": lambda difference, condition: 0.5 * torch.ones_like(difference)}, [2.5, 2.5, 2.5]),
    ],
)
def test_the_formula(how, expected):
    field = ContrastField(constant(2.0), constant(0.0), **how)
    torch.testing.assert_close(field(X, SIGMA, Rows()), torch.tensor(expected)[:, None].expand(3, 4))
    assert unguided(field) is field.field


def test_a_reference_is_not_asked_where_no_row_needs_it():
    def refuse(x, sigma, condition):
        raise AssertionError

    ContrastField(constant(1.0), refuse, 1.0, (0.95, 1.0))(X, SIGMA, Rows())


def test_the_target_of_two_flows_is_past_the_teacher():
    """Away from a wider normal distribution lies a narrower one: its flow contracts more than the teacher's."""
    narrow, wide = (lambda s: lambda x, sigma, _: Gaussian(0.0, s).line(sigma[:, None])[0] * x)(0.5), None
    wide = (lambda s: lambda x, sigma, _: Gaussian(0.0, s).line(sigma[:, None])[0] * x)(1.0)
    x, sigma = torch.ones(1, 1), torch.tensor([0.5])
    past = ContrastField(narrow, wide, 1.0)(x, sigma, Rows())
    assert past > narrow(x, sigma, None) > wide(x, sigma, None)


def moved(data, files, contrast, **fields):
    """A trainer with plain teachers, and the teachers as `contrast` moves them."""
    recipe = Recipe(**files, **{"steps": 6, "batch": 6, "student": {"rank": 8}, "contrast": contrast, **fields})
    trainer = make_trainer(data, files, contrast=contrast, **fields)
    return trainer, contrasted(recipe, trainer.teachers, BaseField(trainer.backbone))


@pytest.mark.parametrize("reference", ["base", "others", "editing", "null", "prompt", "source"])
def test_each_reference_is_what_its_name_says(data, files, reference):
    name = "editing" if reference == "source" else "generation"
    trainer, teachers = moved(data, files, {name: {"reference": reference, "weight": 0.7}})
    m = NAMES.index(name)
    assert teachers[1 - m] is trainer.teachers[1 - m]  # the other teacher is as it was
    condition = data.conditions[name]
    x = torch.randn(len(condition), *condition.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(condition),), 0.6)
    own, rival = (AdapterField(trainer.backbone, one) for one in (name, NAMES[1 - m]))
    v = own(x, sigma, condition)
    first = [1, 0, 0, 0]  # the first row of the data that is another one
    if reference == "base":
        away = BaseField(trainer.backbone)(x, sigma, condition)
    elif reference in ("others", "editing"):
        away = rival(x, sigma, condition)
    elif reference == "null":
        away = own(x, sigma, with_prompt_of(condition, data.null))
    elif reference == "prompt":
        away = own(x, sigma, with_prompt_of(condition, condition.rows(first)))
    else:
        away = own(x, sigma, with_prompt_of(condition.rows(first), condition))
    assert not torch.allclose(v, away)
    torch.testing.assert_close(teachers[m].field(x, sigma, condition), v + 0.7 * (v - away))


@pytest.mark.parametrize("guided", [False, True])
def test_a_weaker_teacher_is_itself_at_a_lower_strength_without_guidance(data, files, guided):
    trainer, _ = moved(data, files, {})
    lora = trainer.backbone.adapter("generation")
    how = {"scale": 0.8, "guidance": 3.0 if guided else None}
    teacher = Teacher(name="drawn", adapter=files["generation"], capability="generation", **how)
    weaker = TeacherWeights(teacher, lora).weaker(0.25).attach(trainer.backbone)
    recipe = Recipe(**files, contrast={"generation": {"reference": "weaker", "weight": 2.0, "strength": 0.25}})
    first, second = trainer.teachers
    found, _ = contrasted(recipe, [replace(first, weaker=weaker), second], BaseField(trainer.backbone))
    condition = data.conditions["generation"]
    x, sigma = torch.randn(len(condition), *condition.shape), torch.full((len(condition),), 0.6)
    trainer.backbone.add_adapter("byhand", scaled(lora, 0.2))  # 0.25 of 0.8
    v, away = first.field(x, sigma, condition), AdapterField(trainer.backbone, "byhand")(x, sigma, condition)
    assert not torch.allclose(v, away)
    torch.testing.assert_close(found.field(x, sigma, condition), v + 2 * (v - away))
    for name in ("byhand", "drawn-weaker"):
        trainer.backbone.remove_adapter(name)


def test_a_guided_teacher_keeps_its_guidance_and_is_compared_without(data, files):
    trainer, _ = moved(data, files, {})
    teachers = [replace(t, field=GuidedField(t.field, data.null, 2.0)) for t in trainer.teachers]
    recipe = Recipe(**files, contrast={"generation": {"weight": 0.5}})
    (first, _), (plain, rival) = contrasted(recipe, teachers, BaseField(trainer.backbone)), teachers
    condition = data.conditions["generation"]
    x, sigma = torch.randn(len(condition), *condition.shape), torch.full((len(condition),), 0.6)
    v, away = plain.field(x, sigma, condition), unguided(rival.field)(x, sigma, condition)
    torch.testing.assert_close(first.field(x, sigma, condition), v + 0.5 * (v - away))
    assert unguided(first.field) is trainer.teachers[0].field  # of rows without a prompt


def test_a_mask_moves_only_where_the_two_differ(data, files):
    trainer, teachers = moved(data, files, {"editing": {"reference": "base", "weight": 1.0, "mask": True}})
    condition = data.conditions["editing"]
    x, sigma = torch.randn(len(condition), *condition.shape), torch.full((len(condition),), 0.6)
    v, base = (f(x, sigma, condition) for f in (trainer.teachers[1].field, BaseField(trainer.backbone)))
    mask = edit_mask(v - base, trainer.backbone.family.grid(condition))
    assert 0 <= mask.min() < mask.max() == 1
    torch.testing.assert_close(teachers[1].field(x, sigma, condition), v + mask * (v - base))


def test_the_student_learns_the_moved_target(data, files):
    """The first loss is the error to the moved target, not to the teacher's velocity."""
    contrast = {"generation": {"weight": 2.0}, "editing": {"weight": 2.0, "reference": "base"}}
    trainer, teachers = moved(data, files, contrast)
    trainer.velocities = replace(trainer.velocities, teachers=[t.field for t in teachers])
    batch = batches_of(trainer)[0]
    (query,) = trainer.objective(batch, trainer.velocities)
    (states,) = trainer.velocities.rollout(batch, batch.query_step, batch.query_sigma).unbind(1)
    sigma = batch.query_sigma[:, 0]
    target = trainer.velocities.teacher(batch, states, sigma)
    plain = replace(trainer.velocities, teachers=[unguided(t.field) for t in teachers]).teacher(batch, states, sigma)
    error = velocity_error(trainer.velocities.student(batch, states, sigma), target)
    torch.testing.assert_close(query.error, error)
    assert not torch.allclose(target, plain)
    train(trainer, 2)


REFUSED = [
    ({"contrast": {"genration": {}}}, "contrast.genration is no teacher and no capability; did you mean 'generation'"),
    ({"contrast": {"generation": {"reference": "bas"}}}, "contrast.generation.reference is 'bas'; did you mean 'base'"),
    ({"contrast": {"generation": {"reference": "generation"}}}, "itself as its reference"),
    ({"contrast": {"generation": {"strength": 0.7}}}, "has a strength, which is of reference weaker"),
    ({"contrast": {"generation": {"reference": "source"}}}, "it edits no source; choose prompt"),
    ({"contrast": {"generation": {"weight": -1}}}, "contrast.generation.weight"),
    ({"contrast": {"generation": {"sigma": [0.7, 0.2]}}}, "give the lower noise level first"),
    ({"contrast": {"generation": {}}, "objective": "supervised"}, "asks no teacher"),
    ({"contrast": {"generation": {}}, "gates": {"evidence": True}}, "keep one of the two"),
]


@pytest.mark.parametrize("fields, sentence", REFUSED, ids=lambda one: one if isinstance(one, str) else "")
def test_what_means_nothing_is_refused(files, fields, sentence):
    with pytest.raises(UserError) as refused:
        Recipe(**files, **fields)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_teachers_name_wins_over_its_capability(files):
    recipe = Recipe(**files, contrast={"editing": {"weight": 2.0}})
    (generation, editing) = recipe.teachers
    assert recipe.contrast_of(generation) is None and recipe.contrast_of(editing).weight == 2.0


# -- whole merges -----------------------------------------------------------------------------------------


def test_weight_nought_is_plain_bit_for_bit_and_more_is_not(models, tmp_path):
    written = {}
    for name, contrast in {
        "plain": {},
        "nought": {"generation": {"weight": 0.0}, "editing": {"weight": 0.0, "reference": "null"}},
        "moved": {"generation": {"weight": 1.0}, "editing": {"weight": 1.0, "reference": "null"}},
        "weaker": {"generation": {"reference": "weaker"}, "editing": {"reference": "weaker", "strength": 0.7}},
    }.items():
        run(tiny_recipe(models, tmp_path / name, contrast=contrast))
        written[name] = (tmp_path / name / WEIGHTS).read_bytes()
    assert written["plain"] == written["nought"] and len(set(written.values())) == 3


def test_a_stopped_run_goes_on_to_the_same_student(models, tmp_path):
    how = {"contrast": {"generation": {"reference": "prompt"}, "editing": {"reference": "source", "bound": 0.5}}}
    run(tiny_recipe(models, tmp_path / "whole", **how))
    run(tiny_recipe(models, tmp_path / "stopped", **how), kill=3)
    assert run(tiny_recipe(models, tmp_path / "stopped", **how)) == [3, 4]
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "stopped" / WEIGHTS).read_bytes()


def test_the_plan_counts_the_reference(models, tmp_path):
    def passes(**fields):
        return plan(tiny_recipe(models, tmp_path / "none", **fields), tflops=1.0)["passes"]

    assert "contrast" not in passes(contrast={"generation": {"weight": 0.0}})
    assert passes(contrast={"generation": {}})["contrast"] == 0.5
    weaker = plan(tiny_recipe(models, tmp_path / "none", contrast={"editing": {"reference": "weaker"}}), tflops=1.0)
    assert weaker["passes"]["contrast"] == 0.5
    held = {part["part"]: part["bytes"] for part in weaker["memory"]}
    [name] = [part for part in held if part.endswith(", weaker")]
    assert held[name] == held[name.removesuffix(", weaker")] > 0
    assert passes(contrast={"generation": {}, "editing": {}}, query={"count": 2})["contrast"] == 2.0
