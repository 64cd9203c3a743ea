"""A base of two transformers, of which the noise level chooses (Wan 2.2 A14B): from two files a teacher to the stock
pipeline with the student in both."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_adapter
from tiny_parts import close, recorded_steps
from tiny_wan import CALL, TINY, tiny_wan

import danceopd
from danceopd.adapters.export import export_as
from danceopd.adapters.load import load_student
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_fingerprint, empty_transformer, load_base, transformer_fingerprint
from danceopd.models.fields import AdapterField, Ask, BaseField, ask_together
from danceopd.models.lora import Adapter
from danceopd.pipelines import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES
from danceopd.pipelines.two_transformers import SECOND, of_second, parted

FAMILY = FAMILIES[TINY.family]
PROMPT = "a red circle"
STOCK = {
    "height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 40, "guidance_scale": 1.0,
    "num_frames": 1, "prompt": PROMPT,
}  # fmt: skip


def of_both(pipe, seed=0, size=0.2):
    """A random LoRA of both transformers."""
    first, second = (
        random_adapter(one, targets=FAMILY.lora_targets, seed=seed + i, size=size).tensors
        for i, one in enumerate((pipe.transformer, pipe.transformer_2))
    )
    return Adapter(first | {f"{SECOND}.{name}": pair for name, pair in second.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`base`, and two teachers of it."""
    folder = tmp_path_factory.mktemp("two")
    pipe = tiny_wan(folder / "base", unipc=True, two=True)
    for i in range(2):
        write_adapter(of_both(pipe, seed=2 * i), folder / f"teacher{i}")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue square\na white ring above")
    return folder


def recipe(models, output, **fields):
    given = {
        "base": str(models / "base"), "output": output, "steps": 4, "batch": 3, "device": "cpu",
        "teachers": [
            {"name": f"t{i}", "adapter": str(models / f"teacher{i}"), "capability": "generation"} for i in range(2)
        ],
        "data": {"generation": str(models / "prompts.txt")},
        "call": {key: value for key, value in CALL.items() if key != "steps"} | {"num_inference_steps": 4},
        "student": {"rank": 8}, "rollout": {"steps": 4}, "samples": {"every": 0, "count": 1}, "validation": {"rows": 2},
        "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return danceopd.Recipe(**{**given, **fields})


@pytest.mark.parametrize("unipc", [True, False])
def test_each_row_is_asked_of_the_transformer_of_its_noise_level(unipc, tmp_path):
    """Every velocity of the stock pipeline, on both sides of its boundary; rows of both sides in one batch, with a
    gradient to both; the stock pipeline is whole again once it is parted."""
    tiny_wan(tmp_path, unipc=unipc, two=True)
    pipe = load_base(tmp_path)
    stock = tiny_wan(unipc=unipc, two=True)
    _, steps = recorded_steps(stock, **STOCK, output_type="latent", generator=torch.Generator().manual_seed(3))
    ours = GenerationPipeline(pipe, FAMILY, CALL)
    condition, sigmas = ours.conditions([PROMPT]), ours.sigmas()[:-1]
    assert (sigmas < 0.7).sum() in (1, 2, 3)
    field = BaseField(Backbone(pipe.transformer, FAMILY))
    for sigma, (velocity, x, _) in zip(sigmas, steps, strict=True):
        close(field(x, sigma[None], condition), velocity, 2e-5)
    states = torch.cat([x for _, x, _ in steps])
    rows = condition.rows([0, 0, 0, 0])
    close(field(states, sigmas, rows), torch.cat([velocity for velocity, *_ in steps]), 2e-5)
    pipe.transformer.requires_grad_(True)
    FAMILY.velocity(pipe.transformer, states, sigmas, rows).square().mean().backward()
    for one in (pipe.transformer.blocks, pipe.transformer.transformer_2.blocks):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in one.named_parameters() if "to_v.w" in n)
    assert parted(pipe) is pipe.transformer_2
    assert pipe.transformer.state_dict().keys() == stock.transformer.state_dict().keys()


def test_teachers_asked_for_rows_on_both_sides_are_each_themselves(models):
    """Rows of several adapters in one forward are told by their places, which a half of the rows does not have."""
    backbone = Backbone(load_base(models / "base").transformer, FAMILY)
    for name in ("teacher0", "teacher1"):
        backbone.add_adapter(name, read_adapter(models / name))
    ours = GenerationPipeline(load_base(models / "base"), FAMILY, CALL)
    x, condition = ours.noise([1, 2]), ours.conditions([PROMPT, PROMPT])
    fields = [AdapterField(backbone, name) for name in ("teacher0", "teacher1")]
    for low in (0.9, 0.3):  # the first forward is compared, and the next ones trusted
        sigmas = torch.tensor([[0.9, 0.9], [0.9, low]])
        asks = [Ask(field, x, sigma, condition) for field, sigma in zip(fields, sigmas, strict=True)]
        for together, one in zip(ask_together(asks), asks, strict=True):
            close(together, one.field(*one[1:]))


@pytest.fixture(scope="module")
def student(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "student"
    danceopd.merge(recipe(models, output), report=lambda metrics, steps: None)
    return output


def test_a_merge_trains_both_and_the_stock_pipeline_draws_what_the_student_draws(models, student):
    adapter = read_adapter(student, empty_transformer(models / "base"))
    seconds = of_second(adapter.tensors)
    assert len(adapter) == 2 * len(seconds) == 40
    for tensors in (seconds, {n: p for n, p in adapter.tensors.items() if not n.startswith(SECOND)}):
        assert any((b @ a).abs().max() > 1e-3 for a, b in tensors.values())

    backbone = Backbone(load_base(models / "base").transformer, FAMILY)
    backbone.add_adapter("student", adapter)
    fields = {"student": AdapterField(backbone, "student"), "base": BaseField(backbone)}
    card = (student / "README.md").read_text()
    assert 'pipe.load_lora_weights("path/to/this/folder")' in card
    assert 'pipe.transformer_2.load_lora_adapter("path/to/this/folder", weight_name="pytorch_lora' in card
    stock = tiny_wan(unipc=True, two=True)
    stock.load_lora_weights(str(student))
    stock.transformer_2.load_lora_adapter(
        str(student), weight_name="pytorch_lora_weights.safetensors", prefix="transformer_2"
    )
    noise = torch.Generator().manual_seed(3)
    _, steps = recorded_steps(stock, **STOCK, output_type="latent", generator=noise)
    ours = GenerationPipeline(load_base(models / "base"), FAMILY, CALL)
    condition = ours.conditions([PROMPT])
    for sigma, (velocity, x, _) in zip(ours.sigmas(), steps, strict=False):
        close(fields["student"](x, sigma[None], condition), velocity, 5e-5)
        assert (fields["base"](x, sigma[None], condition) - velocity).abs().max() > 1e-3

    loaded = load_student(student)
    assert not hasattr(loaded.transformer, SECOND)
    _, again = recorded_steps(loaded, **STOCK, output_type="latent", generator=torch.Generator().manual_seed(3))
    close(again[-1][2], steps[-1][2], 1e-5)


def test_two_files_become_one_and_one_becomes_two(models, tmp_path):
    """A LoRA for each transformer, in ComfyUI's names, is one teacher; a student is written as a file for each."""
    adapter, base = read_adapter(models / "teacher0"), models / "base"
    parts = [export_as(models / "teacher0", tmp_path / n, "comfyui", base=base, leave_out=[pattern])
             for n, pattern in (("high", "transformer_2.*"), ("low", "blocks.*"))]  # fmt: skip
    assert all(key.startswith("diffusion_model.blocks.") for part in parts for key in load_file(part.file))
    both = export_as(parts[0].file, tmp_path / "both", base=base, second=parts[1].file)
    assert both.stock is True and read_adapter(both.file).sha256 == adapter.sha256
    with pytest.raises(UserError, match="a comfyui file is a LoRA of one transformer, and this one adapts two"):
        export_as(models / "teacher0", tmp_path / "x", "comfyui", base=base)
    from_other = tmp_path / "from_other"
    write_adapter(adapter, from_other, metadata={"base_sha256": transformer_fingerprint(base / "transformer")})
    with pytest.raises(UserError, match="which was trained on other weights than .*transformer_2 .their fingerprints"):
        export_as(parts[0].file, tmp_path / "x", base=base, second=from_other)
    with pytest.raises(UserError, match="the first file has layers of both transformers already"):
        export_as(models / "teacher0", tmp_path / "x", base=base, second=parts[1].file)


def test_the_fingerprint_is_of_both(models, tmp_path):
    import shutil

    shutil.copytree(models / "base", tmp_path / "base")
    assert base_fingerprint(tmp_path / "base") == base_fingerprint(models / "base")
    file = tmp_path / "base" / SECOND / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] += 1
    save_file(tensors, file)
    assert base_fingerprint(tmp_path / "base") != base_fingerprint(models / "base")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_dtype": "int8"}, "has two transformers, of which the noise level chooses: leave out base_dtype: int8"),
        ({"offload": "blocks"}, "leave out offload: blocks"),
        ({"compile": True}, "leave out compile: true"),
    ],
)
def test_what_was_never_tried_on_two_is_refused(models, tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        danceopd.merge(recipe(models, tmp_path / "no", **fields), report=lambda metrics, steps: None)


def test_bad_bases_and_whole_models_are_refused(models, tmp_path):
    index = json.loads((models / "base" / "model_index.json").read_text())
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 7}))
    with pytest.raises(UserError, match="two transformers and boundary_ratio 7 in its model_index.json; it must be"):
        danceopd.merge(recipe(models, tmp_path / "no", base=str(folder)))
    teachers = [{"name": n, "adapter": str(models / n), "capability": "generation"} for n in ("teacher0", "base")]
    teachers[1]["name"] = "whole"
    with pytest.raises(UserError, match="has two transformers, and whole models of two are not compared; extract"):
        danceopd.merge(recipe(models, tmp_path / "no", teachers=teachers))


def test_a_bench_leaves_out_edits_and_frames_that_the_student_cannot_show(student, tmp_path, caplog):
    """Suites have edits and are of pictures; Wan has no editing class, and a student may draw videos."""
    from danceopd.bench.options import BlendOptions
    from danceopd.bench.run import Bench

    video = danceopd.Recipe.from_yaml(student / "recipe.yaml").replaced({"call.num_frames": 5})
    found = Bench(student, against=["none"], limit=2, output=tmp_path, recipe=video, blends=BlendOptions())
    with caplog.at_level("WARNING", logger="danceopd"):
        assert found.estimate()["items"] == {"generation": 2, "editing": 0}
        assert found.call["num_frames"] == 1
    assert "wan cannot edit, so the suite's 2 edits are left out" in caplog.text
    assert "one frame is drawn, not call.num_frames 5" in caplog.text
