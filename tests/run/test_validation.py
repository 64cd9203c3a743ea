"""The validation error: its figures against the stock pipelines; runs that it leaves alone, ends, and chooses of."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CALL, tiny_klein
from tiny_merge import WEIGHTS, check_student, tiny_recipe, two_processes
from tiny_merge import run as merge_run

from danceopd.adapters.read import read_adapter
from danceopd.data.dataset import open_datasets
from danceopd.data.null_prompt import null_prompt
from danceopd.engine.metrics import adapter_norm
from danceopd.engine.query import draw_queries, place
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField, GuidedField
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.recipe.recipe import Recipe
from danceopd.run.early_stopping import EarlyStopping, lowest, waited
from danceopd.run.validation import HeldOut, HeldOutBatch, ValidationError, forwards, quarters, relative, scales

STEPS = 6
PROMPTS = [f"a {a} {b} above a {c} {d}" for a, b, c, d in zip(
    ["red", "green", "blue", "white"] * 15, ["circle", "square", "star"] * 20,
    ["red", "green", "blue", "white", "black"] * 12, ["ring", "cross", "triangle", "star", "circle", "square"] * 10,
)]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(models, tmp_path_factory):
    """With a file of prompts beside them."""
    folder = shutil.copytree(models, tmp_path_factory.mktemp("validation") / "models")
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    return folder


# -- what is measured -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(models):
    """A pipeline with both adapters on its backbone, two prompts with their noise, and the schedule."""
    pipe = tiny_klein()
    family = family_of(pipe)
    pipeline = GenerationPipeline(pipe, family, CALL)
    null = null_prompt(pipeline, "t", " ")
    rows = pipeline.conditions(PROMPTS[:3]), pipeline.noise([7, 8, 9]), pipeline.sigmas(), null
    backbone = Backbone(pipe.transformer, family)
    for name in ("draws", "edits"):
        backbone.add_adapter(name, read_adapter(models / name))
    return backbone, *rows


def recipe_of(models, output="student", **fields):
    given = {"steps": STEPS, "data": {"generation": str(models / "p.txt"), "rows": 6}, "rollout": {"steps": 4}}
    return tiny_recipe(models, output, **{**given, **fields})


def error_of(world, models, teacher, queried=(0, 2, 2, 3), null=None, **fields):
    backbone, condition, noise, sigmas, _ = world
    recipe = recipe_of(models, **fields)
    held_out = HeldOut("draws", teacher, [HeldOutBatch(condition, noise, sigmas, queried)], null)
    return ValidationError(recipe.rollout, [held_out], BaseField(backbone), CPU, recipe.batch)


def test_a_student_that_is_the_teacher_has_no_error(world, models):
    teacher = AdapterField(world[0], "draws")
    error = error_of(world, models, teacher)
    assert error.measure(teacher) == {"draws": [0.0] * 4}
    assert min(error.measure(error.base)["draws"]) > 1e-4
    assert min(error.measure(AdapterField(world[0], "edits"))["draws"]) > 1e-4


def test_it_is_what_the_stock_pipelines_differ_by(world, models):
    """Stock diffusers rolls out the student; where it calls its transformer, the stock teacher's gets the same call."""
    student, teacher = (DiffusionPipeline.from_pretrained(models / "base") for _ in range(2))
    student.load_lora_weights(str(models / "edits"))
    teacher.load_lora_weights(str(models / "draws"))
    seen = []
    student.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True
    )
    wanted = torch.zeros(6, dtype=torch.float64)
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 24, "guidance_scale": 1.0}
    for i, prompt in enumerate(PROMPTS[:3]):
        seen.clear()
        student.set_progress_bar_config(disable=True)
        student(prompt=prompt, generator=torch.Generator().manual_seed(7 + i), output_type="latent", **call)
        with torch.no_grad():
            answers = [teacher.transformer(*args, **kwargs)[0] for args, kwargs, _ in seen]
        wanted += torch.stack([(o - a).square().mean().double() for (_, _, o), a in zip(seen, answers)]) / 3
    queried = (0, 2, 2, 3)
    found = error_of(world, models, AdapterField(world[0], "draws"), queried, batch=2)
    found = found.measure(AdapterField(world[0], "edits"))["draws"]  # in chunks of two rows
    assert found == pytest.approx(wanted[list(queried)].tolist(), rel=1e-4) and found[1] == found[2]
    assert float(wanted[0]) != pytest.approx(float(wanted[2]), rel=0.05)


def test_a_guided_rollout_goes_where_the_guided_student_goes(world, models):
    """Its states are those of the guided field; teacher and student are still queried without guidance."""
    backbone, condition, noise, sigmas, null = world
    student, teacher = AdapterField(backbone, "edits"), AdapterField(backbone, "draws")
    guided = GuidedField(student, null, 3.0)
    x = noise + (sigmas[1] - sigmas[0]) * guided(noise, sigmas[0].expand(3), condition)
    x = x + (sigmas[2] - sigmas[1]) * guided(x, sigmas[1].expand(3), condition)
    at = sigmas[2].expand(3)
    wanted = (student(x, at, condition) - teacher(x, at, condition)).square().mean()
    error = error_of(world, models, teacher, (2,) * 4, null, rollout={"steps": 6, "guidance": 3.0})
    assert error.measure(student)["draws"] == pytest.approx([float(wanted)] * 4, rel=1e-5)


def test_quarters_are_those_of_the_query_law(models, world):
    sigmas = torch.linspace(1, 0, 33)
    for fields in ({"law": "paper"}, {"law": "high-noise"}, {"law": "mid", "beta": (1.5, 4.0)}):
        recipe = recipe_of(models, query=fields)
        index, _ = place(draw_queries(3, 0, 40000, 1, recipe.query.law, recipe.query.beta), sigmas, recipe.query.law)
        wanted = torch.quantile(index.double(), torch.tensor([1, 3, 5, 7], dtype=torch.float64) / 8)
        assert (torch.tensor(quarters(recipe, sigmas)) - wanted).abs().max() <= 1
    assert quarters(recipe_of(models, objective="diffusionopd"), sigmas) == [3, 11, 19, 27]
    assert quarters(recipe_of(models), torch.tensor([1.0, 0.0])) == [0] * 4


def test_the_plan_counts_the_forwards(models, world):
    counted = [0]

    def count(field):
        def counting(x, sigma, condition):
            counted[0] += len(x)
            return field(x, sigma, condition)

        return counting

    for guidance in (1.0, 2.0):
        rollout = {"steps": 6, "guidance": guidance}
        recipe = recipe_of(models, validation={"every": 2, "rows": 3}, rollout=rollout)
        backbone, condition, noise, sigmas, null = world
        batches = [HeldOutBatch(condition, noise, sigmas, quarters(recipe, sigmas))]
        field = count(BaseField(backbone))
        held_out = [HeldOut(t.name, field, batches, null if guidance != 1 else None) for t in recipe.teachers]
        counted[0] = 0
        ValidationError(recipe.rollout, held_out, field, CPU, recipe.batch).measure(field)
        assert forwards(recipe, sigmas) == 5 * counted[0] and recipe.validation.checks(STEPS) == 5


def test_a_teacher_that_is_the_base_or_the_start_has_a_scale_too():
    nothing, base = [0.0] * 4, {"style": [1.0, 2, 0.5, 0.5], "base": [0.0] * 4}
    blend = {"style": [0.25] * 4, "base": [0.5] * 4}
    assert scales(base, blend) == {"style": 4.0, "base": 2.0}  # the further of the two
    assert scales(base, {"style": nothing, "base": [2.0] * 4}) == {"style": 4.0, "base": 8.0}
    assert scales(base, base) == {"style": 4.0, "base": pytest.approx(0.04)}
    errors = {"style": [0.5, 1, 0.25, 0.25], "base": [1.0] * 4}
    assert relative(errors, scales(base, blend)) == {"style": 0.5, "base": 2}
    assert math.isnan(scales({"base": nothing}, {"base": nothing})["base"])


def test_patience_waits_for_what_is_worth_it():
    assert waited([1.0, 0.5, 0.499, 0.498], 0.01) == 2 and waited([1.0, 0.5, 0.499, 0.49], 0.01) == 0
    assert waited([0.5, math.nan, 0.4], 0.0) == 0 and waited([0.5, math.nan], 0.0) == 1
    assert lowest([2.0, math.nan, 1.0, 1.0]) == 2 and lowest([math.nan]) is None


def test_adapter_norm_is_that_of_what_is_added(models):
    adapter = read_adapter(models / "draws")
    wanted = sum(adapter.delta(m).double().square().sum() for m in adapter.tensors) ** 0.5
    assert adapter_norm([t for pair in adapter.tensors.values() for t in pair]) == pytest.approx(float(wanted))


# -- runs -------------------------------------------------------------------------------------------------


def run(models, output, kill=None, **fields):
    return merge_run(recipe_of(models, output=output, **fields), kill)


def validation_of(folder):
    return json.loads((folder / "validation.json").read_text())


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "run"
    run(models, folder, validation={"every": 3, "rows": 2}, student={"rank": 8, "init": "editing"})
    return folder


def test_a_measured_run_is_the_run(models, measured, tmp_path):
    """The same student, and the same last checkpoint with all random states."""
    run(models, tmp_path / "run", validation={"every": 0}, student={"rank": 8, "init": "editing"})
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (measured / WEIGHTS).read_bytes()
    state = "checkpoints/step-000006/state.safetensors"
    assert (tmp_path / "run" / state).read_bytes() == (measured / state).read_bytes()
    assert not (tmp_path / "run" / "validation.json").exists()
    assert "Validation error" not in (tmp_path / "run" / "README.md").read_text().split("## Recipe")[0]


def test_what_was_measured_is_written_everywhere(models, measured):
    found = validation_of(measured)
    assert [check["step"] for check in found["checks"]] == [0, 3, 6]
    assert found["rows"] == {"generation": 2, "editing": 2}
    start = found["checks"][0]["teachers"]
    assert start["editing"]["error"] < 1e-6 < start["generation"]["error"]  # it starts as that teacher
    assert found["checks"][2]["teachers"]["generation"]["error"] < start["generation"]["error"]
    assert start["generation"]["error"] <= 1 and min(found["base"]["editing"]) > 1e-4
    assert found["checks"][0]["error"] == pytest.approx((start["editing"]["error"] + start["generation"]["error"]) / 2)
    lines = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 3, 6]
    assert [lines[step]["validation"] for step in (0, 3)] == [check["error"] for check in found["checks"][:2]]
    assert "validation/editing" in lines[0] and "loss" not in lines[0]
    levels = [name for name in lines[6] if name.startswith("validation/editing sigma ")]
    assert 1 <= len(levels) <= 4 and 0 < float(levels[0].split()[-1]) <= 1 and "validation/generation" in lines[6]
    assert all(line["adapter_norm"] > 0 and line["samples/s"] > 0 and line["peak_memory"] > 1e7 for line in lines[1:])
    events = EventAccumulator(str(measured / "logs")).Reload()
    assert [e.step for e in events.Scalars("validation")] == [0, 3, 6] and events.Scalars("samples/s")
    assert f"Validation error {found['checks'][2]['error']:.3g} after step 6 (" in (measured / "README.md").read_text()
    assert Image.open(measured / "validation.png").width > 400


def test_no_update_draws_a_held_out_row(models, tmp_path, monkeypatch):
    """Prompts that validation uses are of the file, and no update samples one of them."""
    keys, said = [], []
    keep = GenerationPipeline.conditions
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(GenerationPipeline, "conditions", lambda self, p, *a: said.extend(p) or keep(self, p, *a))
    levels = {"generation": [1.0] * 4, "editing": [1.0] * 4}
    monkeypatch.setattr(ValidationError, "measure", lambda self, field: keys.append(self.rows_key) or levels)
    recipe = recipe_of(models, output=tmp_path / "run", steps=2, validation={"rows": 5})
    merge(recipe, lambda metrics, total: None)
    dataset = open_datasets(recipe)["generation"]
    drawn = {dataset.data[row] for row in dataset.rows}
    held = [prompt for prompt in said if prompt in PROMPTS and prompt not in drawn]
    assert len(held) == 5 and len(set(keys)) == 1


@pytest.fixture
def planted(monkeypatch):
    """Errors by step, as if they had been measured; the base's are 1."""
    real_check = EarlyStopping._check

    def plant(values):
        order = [1.0]

        def measure(self, field):
            value = 1.0 if field is self.base else order[0]
            return {held.name: [value] * 4 for held in self.held_out}

        def check(stopping, trainer):
            order[0] = values[trainer.step]
            return real_check(stopping, trainer)

        monkeypatch.setattr(ValidationError, "measure", measure)
        monkeypatch.setattr(EarlyStopping, "_check", check)

    return plant


VALUES = {0: 1.0, 1: 0.6, 2: 0.3, 3: 0.299, 4: 0.5, 5: 0.2, 6: 0.9}
STOPPING = {"every": 1, "rows": 2, "patience": 2}


def test_it_stops_when_the_error_no_longer_falls_and_exports_the_best(models, tmp_path, planted):
    """3 is hardly better than 2, and 4 is worse: the run ends there, and its student is that of three updates."""
    planted(VALUES)
    assert run(models, tmp_path / "run", validation=STOPPING) == [1, 2, 3, 4]
    run(models, tmp_path / "three", steps=3, validation={"every": 0})
    found, wanted = (read_adapter(tmp_path / name).sha256 for name in ("run", "three"))
    assert found == wanted
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Validation error 0.299 after step 3, chosen as the lowest of 5 checks (1 after step 0)" in card
    assert "samples/step-000003.png" in card and (tmp_path / "run" / "samples" / "step-000003.png").exists()
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["exported"] == 3
    assert run(models, tmp_path / "run", validation=STOPPING) == []  # it is finished
    assert run(models, tmp_path / "run", validation={**STOPPING, "patience": 3}) == [5, 6]  # more patience goes on
    assert validation_of(tmp_path / "run")["best"] == {"step": 5, "error": pytest.approx(0.2)}


def test_an_error_that_explodes_is_said_once(models, tmp_path, planted, caplog):
    """Once it is twice what the start or the bare base has, or NaN; again where it had fallen between."""
    planted({0: 1.0, 1: 0.5, 2: 3.0, 3: 1904.0, 4: 0.9, 5: math.nan, 6: math.inf})
    run(models, tmp_path / "run", validation={"every": 1, "rows": 2})
    said = [record.message for record in caplog.records if "moves away from its teachers" in record.message]
    assert [line.split(":")[0] for line in said] == [
        "the validation error is 3 after step 2 and was 1 after step 0",
        "the validation error is nan after step 5 and was 1 after step 0",
    ]
    assert "in another --output with optimizer.lr below 0.0002" in said[0]


def test_a_killed_run_still_knows_its_best(models, tmp_path, planted):
    """Stopped after 3, of which 2 is saved: it goes on from there, and its best is that of before."""
    values = {**VALUES, 2: 0.1}
    planted(values)
    chosen = {"every": 1, "rows": 2, "select": "best"}
    assert run(models, tmp_path / "whole", validation=chosen) == [1, 2, 3, 4, 5, 6]
    run(models, tmp_path / "run", kill=5, validation=chosen)
    (tmp_path / "run" / "validation.json").unlink()
    planted({**values, 1: math.nan, 2: math.nan, 0: math.nan})  # what was measured is not measured again
    assert run(models, tmp_path / "run", validation=chosen) == [5, 6]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    manifest = "checkpoints/step-000006/manifest.json"
    assert (tmp_path / "run" / manifest).read_text() == (tmp_path / "whole" / manifest).read_text()
    assert "after step 2, chosen" in (tmp_path / "run" / "README.md").read_text()
    assert [check["step"] for check in validation_of(tmp_path / "run")["checks"]] == list(range(7))


def test_a_run_killed_between_its_end_and_its_export_ends_there(models, tmp_path, planted, monkeypatch):
    planted(VALUES)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("danceopd.run.export.export", lambda *a, **k: {}["killed"])
        run(models, tmp_path / "run", validation=STOPPING)
    assert run(models, tmp_path / "run", validation=STOPPING) == []
    assert "after step 3, chosen" in (tmp_path / "run" / "README.md").read_text()


def test_checks_on_other_rows_do_not_count(models, tmp_path, caplog):
    chosen = {"every": 2, "rows": 2, "select": "best"}
    run(models, tmp_path / "run", kill=5, validation=chosen)
    run(models, tmp_path / "run", validation={**chosen, "rows": 3})
    assert "no longer the same" in caplog.text
    assert [check["step"] for check in validation_of(tmp_path / "run")["checks"]] == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(models, tmp_path, parallel):
    """And stop together, with the same student: patience wants far more than the error falls by."""
    options = {"every": 2, "rows": 2, "patience": 1, "min_delta": 0.9}
    fields = {"batch": 3, "optimizer": {"warmup": 1}, "validation": options}
    assert run(models, tmp_path / "one", **fields) == [1, 2]
    two = recipe_of(models, output=tmp_path / "two", parallel=parallel, **fields)
    two_processes(two, tmp_path)
    check_student(tmp_path / "two", load_file(tmp_path / "one" / WEIGHTS))
    ours, theirs = validation_of(tmp_path / "one"), validation_of(tmp_path / "two")
    assert [c["step"] for c in theirs["checks"]] == [0, 2]
    for a, b in zip(ours["checks"], theirs["checks"], strict=True):
        assert b["error"] == pytest.approx(a["error"], rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"evry": 5}, "did you mean 'every'"),
        ({"every": 0, "patience": 2}, "validation.patience 2 .*validation.every is 0"),
        ({"every": 0, "select": "best"}, "validation.select best .*validation.every"),
        ({"select": "bst"}, "validation.select"),
        ({"rows": 0}, "validation.rows"),
    ],
)
def test_what_would_not_be_measured(fields, said):
    with pytest.raises(UserError, match=said):
        Recipe(validation=fields)
