"""Teachers of every kind through `danceopd merge`: full checkpoints both ways, guided ones, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tinies import TINYS
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.data.null_prompt import check_guidance, null_condition
from danceopd.engine.teachers import check_teachers, load_teacher
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_fingerprint
from danceopd.models.fields import AdapterField, BaseField, GuidedField
from danceopd.models.streamed import StreamedField
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe

RUN_CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base; lora; near: a whole model a rank-4 step away; far: one that differs in everything, norms included."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(folder / "base")
    record = {"base_sha256": base_fingerprint(folder / "base")}
    write_adapter(random_adapter(pipe.transformer, seed=0, size=0.1), folder / "lora", metadata=record)
    step = random_adapter(pipe.transformer, seed=1, size=0.1)
    with torch.no_grad():
        for name, (a, b) in step.tensors.items():
            pipe.transformer.get_submodule(name).weight += b @ a
    pipe.save_pretrained(folder / "near")
    pipe.transformer = tiny_klein(seed=2).transformer
    pipe.save_pretrained(folder / "far")
    return folder


@pytest.fixture(scope="module")
def scene():
    pipe = tiny_klein()
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    condition = edit.conditions(["a star"] * 2, [random_image(i) for i in (1, 2)])
    return edit.noise([1, 2]), torch.tensor([0.9, 0.3]), condition


def teacher(models, adapter, **fields):
    return Teacher(name="whole", adapter=str(models / adapter), capability="editing", **fields)


def ready(models, cache, adapter, **fields):
    (weights,) = check_teachers([teacher(models, adapter, **fields)], models / "base")
    return load_teacher(weights, models / "base", cache, torch.device("cpu"))


def backbone_of():
    pipe = tiny_klein()
    return Backbone(pipe.transformer, family_of(pipe)), pipe


def test_a_whole_model_is_kept_as_a_difference_or_streamed(models, tmp_path, scene, monkeypatch, caplog):
    backbone, _ = backbone_of()
    stock = {name: tiny_klein() for name in ("near", "far")}
    for name, pipe in stock.items():
        pipe.transformer = type(pipe.transformer).from_pretrained(models / name / "transformer")
    near, far = ready(models, tmp_path, "near", rank=4), ready(models, tmp_path, "far", rank=4)
    assert (near.kind, far.kind) == ("low-rank", "streamed")
    assert near.residual < 1e-4 and far.residual > 0.5 and "teacher whole is streamed from disk: rank 4" in caplog.text
    for weights, name, tolerance in ((near, "near", 2e-5), (far, "far", 0.0)):
        field = weights.attach(backbone)
        with torch.no_grad():
            expected = family_of(stock[name]).velocity(stock[name].transformer, *scene)
        assert (field(*scene) - expected).abs().max() <= tolerance
        assert isinstance(field, AdapterField if weights is near else StreamedField)
    assert backbone.adapters == ["whole"]

    def never(*arguments, **how):
        raise AssertionError("extracted again")

    monkeypatch.setattr("danceopd.engine.teachers.difference", never)
    again = ready(models, tmp_path, "near", rank=4)
    assert again.adapter.sha256 == near.adapter.sha256 and again.residual == near.residual
    assert ready(models, tmp_path, "near", rank=4, residual=0).kind == "streamed"  # without reading a weight
    monkeypatch.undo()
    assert ready(models, tmp_path, "near", rank=2).kind == "streamed"
    assert ready(models, tmp_path, "far", rank=4, residual=1).kind == "low-rank"


def test_strength_of_either_kind_is_a_step_of_that_length(models, tmp_path, scene):
    backbone, _ = backbone_of()
    kept = ready(models, tmp_path, "near", rank=4, scale=0.5).attach(backbone)
    streamed = ready(models, tmp_path, "near", residual=0, scale=0.5).attach(backbone)
    assert (kept(*scene) - streamed(*scene)).abs().max() < 2e-5
    assert (kept(*scene) - BaseField(backbone)(*scene)).abs().max() > 0.05


@pytest.mark.parametrize(("capability", "negative"), [("generation", None), ("editing", None), ("editing", "blue")])
def test_a_guided_teacher_is_the_stock_pipelines_guidance(models, tmp_path, capability, negative):
    """A rollout of the guided field ends where the stock pipeline with that guidance ends."""
    backbone, pipe = backbone_of()
    image = random_image(3)
    if capability == "editing":
        pipeline = EditingPipeline(pipe, family_of(pipe), CALL)
        condition, source = pipeline.conditions(["make it red"], [image]), {"image": image}
    else:
        pipeline = GenerationPipeline(pipe, family_of(pipe), CALL)
        condition, source = pipeline.conditions(["make it red"]), {}
    whole = Teacher(
        name="whole", adapter=str(models / "far"), capability=capability, residual=0, guidance=3.5, negative=negative
    )
    (weights,) = check_teachers([whole], models / "base")
    null = null_condition(pipeline, whole, "base", tmp_path)
    assert len(null) == 1
    field = load_teacher(weights, models / "base", tmp_path, torch.device("cpu")).attach(backbone, null)
    assert isinstance(field, GuidedField) and isinstance(field.field, StreamedField)
    *_, last = pipeline.denoise(condition, pipeline.noise([7]), field)
    stock = tiny_klein()
    stock.transformer = type(pipe.transformer).from_pretrained(models / "far" / "transformer")
    embeds = stock.encode_prompt(negative or "", max_sequence_length=24)[0]
    ends = stock(
        prompt="make it red", negative_prompt_embeds=embeds, guidance_scale=3.5, **source,
        height=64, width=64, num_inference_steps=CALL["steps"], max_sequence_length=24,
        output_type="latent", generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    mean, var = (s.view(1, -1, 1, 1) for s in (stock.vae.bn.running_mean, stock.vae.bn.running_var))
    grid = last.x.transpose(1, 2).unflatten(2, (4, 4)) * torch.sqrt(var + stock.vae.config.batch_norm_eps) + mean
    assert (stock._unpatchify_latents(grid) - ends).abs().max() <= 1e-4 * ends.abs().max()
    pipe.text_encoder = None  # the second time it is read, not encoded
    again = null_condition(pipeline, whole, "base", tmp_path)
    assert all(v is None or torch.equal(v, again.kwargs[k]) for k, v in null.kwargs.items())


def test_guidance_is_refused_where_there_is_none_and_where_the_null_prompt_reads_the_source(models, tmp_path):
    from dataclasses import replace

    _, pipe = backbone_of()
    guided = teacher(models, "near", guidance=3.0)
    without = EditingPipeline(pipe, replace(family_of(pipe), guidance_on=None), CALL)
    with pytest.raises(UserError, match="needs classifier-free guidance, and .* has none"):
        null_condition(without, guided, "base", tmp_path)

    tiny = next(one for one in TINYS if one.family == "qwen-image" and one.editing is not None)
    bound = EditingPipeline(tiny.editing(tiny.build()), FAMILIES["qwen-image"], tiny.call)
    with pytest.raises(UserError, match="is read together with the source image"):
        null_condition(bound, guided, "base", tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("qwen-image", "qwen-image-2.1", "longcat-image"):  # before a base is loaded
        check_guidance(FAMILIES[name], "guidance of teacher 't'")
        with pytest.raises(UserError, match=f"{name} reads together with the source image, so edits"):
            check_guidance(FAMILIES[name], "guidance of teacher 't'", editing=True)
    with pytest.raises(UserError, match="'edits' has a negative prompt and no guidance"):
        draws = {"name": "draws", "capability": "generation"}
        edits = {"name": "edits", "adapter": str(models / "lora"), "capability": "editing", "negative": "blue"}
        Recipe(base=str(models / "base"), teachers=[draws, edits])


def test_what_was_made_for_something_else_is_refused(models, tmp_path):
    def refused(adapter, sentence, **fields):
        with pytest.raises(UserError, match=sentence):
            check_teachers([teacher(models, adapter, **fields)], models / "base")

    copy = lambda name: shutil.copytree(models / "near", tmp_path / name)  # noqa: E731
    shifted = copy("shifted")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(shifted / "scheduler")
    refused(shifted, "another scheduler than the base: shift is 3.0 there and 1.0 in the base")
    assert check_teachers([teacher(models, shifted, accept=("scheduler",))], models / "base")[0].checkpoint
    reads = copy("reads")
    file = next((reads / "text_encoder").glob("*.safetensors"))
    state = load_file(file)
    next(iter(state.values())).add_(1)
    save_file(state, file, {"format": "pt"})
    refused(reads, "has another text_encoder than the base")
    assert check_teachers([teacher(models, reads, accept=("components",))], models / "base")[0].checkpoint
    other = copy("other")
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    refused(other, "another architecture than .*num_attention_heads is 4 there and 2 in the base")
    refused(models / "base", "is the base itself; write `adapter: base`")
    foreign = write_adapter(read_adapter(models / "lora"), tmp_path / "foreign", metadata={"base_sha256": "f" * 64})
    refused(foreign, "was trained on another base than .*ffffffffffff and")
    assert check_teachers([teacher(models, foreign, accept=("base",))], models / "base")[0].adapter
    with pytest.raises(UserError, match="did you mean 'base'"):
        draws = {"name": "draws", "capability": "generation"}
        Recipe(base=str(models / "base"), teachers=[draws, {**draws, "name": "b", "accept": ["bsae"]}])


def run(models, output, editing, **fields):
    given = {
        "base": str(models / "base"),
        "teachers": [
            {"name": "draws", "adapter": "base", "capability": "generation", "guidance": 3.5},
            {"name": "edits", "adapter": str(models / "near"), "capability": "editing", **editing},
        ],
        "output": output,
        "steps": 3,
        "batch": 4,
        "student": {"rank": 4},
        "data": {"rows": 4},
        "samples": {"every": 0, "count": 1},
        "validation": {"rows": 2},
        "save_every": 2,
        "call": RUN_CALL,
    }
    return Recipe(**{**given, **fields})


def test_a_lora_that_was_never_trained_is_refused(models, tmp_path):
    fresh = random_adapter(tiny_klein().transformer)
    fresh.tensors = {name: (a, torch.zeros_like(b)) for name, (a, b) in fresh.tensors.items()}
    write_adapter(fresh, tmp_path / "fresh")
    with pytest.raises(UserError, match="changes nothing"):
        check_teachers([Teacher(name="edits", adapter=str(tmp_path / "fresh"), capability="editing")], models / "base")


@pytest.mark.parametrize(
    ("editing", "kind"),
    [({"rank": 4}, "low-rank"), ({"residual": 0, "guidance": 2.0}, "streamed")],
    ids=["low-rank", "streamed and guided"],
)
def test_merge_runs_with_a_whole_model(models, tmp_path, editing, kind):
    """A guided base and a whole model, kept either way: the student is exported and says what it came from."""
    losses = []
    merge(run(models, tmp_path / "run", editing), lambda metrics, steps: losses.append(metrics.loss_by_teacher))
    assert len(losses) == 3 and all(value > 0 for loss in losses for value in loss.values())
    assert {name for loss in losses for name in loss} == {"draws", "edits"}
    record = json.loads((tmp_path / "run" / "teachers.json").read_text())
    sha = base_fingerprint(models / "near")
    assert record["base"] == base_fingerprint(models / "base") and record["teachers"]["draws"]["sha256"] is None
    assert record["teachers"]["edits"]["kind"] == kind and record["teachers"]["edits"]["sha256"] == sha
    meta = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "meta.json").read_text())["meta"]
    assert meta["weights"] == record
    assert sha in (tmp_path / "run" / "README.md").read_text()
    assert inspect_adapter(tmp_path / "run").record["base_sha256"] == record["base"]


def test_a_run_is_not_continued_with_other_weights(models, tmp_path):
    class Stop(Exception):
        pass

    def stop(metrics, steps):
        raise Stop

    changing = shutil.copytree(models / "near", tmp_path / "changing")
    teacher = {"adapter": str(changing), "residual": 0}
    with pytest.raises(Stop):
        merge(run(models, tmp_path / "run", teacher, save_every=1), stop)
    shutil.rmtree(changing / "transformer")
    shutil.copytree(models / "far" / "transformer", changing / "transformer")
    with pytest.raises(UserError, match="teacher 'edits' is no longer what the run in .* began with"):
        merge(run(models, tmp_path / "run", teacher, save_every=1), stop)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")
    with pytest.raises(Stop):  # where nothing was learnt yet, nothing is mixed
        merge(run(models, tmp_path / "run", teacher, save_every=1), stop)


def test_every_further_teacher_costs_its_adapter_and_nothing_else(models):
    """Bytes of all tensors alive, with 1, 2, 4 and 8 LoRA teachers on one backbone, each queried once."""
    backbone, _ = backbone_of()
    condition = GenerationPipeline(tiny_klein(), backbone.family, CALL).conditions(["a star"])
    x = torch.randn(1, *condition.shape)

    def alive():
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)  # a stand-in of the tracer holds no bytes
        held = [o for o in gc.get_objects() if type(o) in kinds]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    adapters = [random_adapter(backbone.transformer, seed=i) for i in range(8)]
    field = BaseField(backbone)
    field(x, torch.ones(1), condition)
    before = alive()
    for count, adapter in enumerate(adapters, start=1):
        name = f"teacher{count}"
        backbone.add_adapter(name, adapter)
        AdapterField(backbone, name)(x, torch.ones(1), condition)
        if count in (1, 2, 4, 8):
            assert alive() - before == count * adapter.parameters * 4
