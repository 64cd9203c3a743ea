"""`load_student`, `export` and `fuse`: what they give, and what they refuse."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_adapter, tiny_klein

from danceopd.adapters.fuse import fuse
from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.load import ExportError, check_injected, load_student
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_fingerprint, empty_transformer, load_base, stored_dtype
from danceopd.models.lora import Adapter
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.families.flux2 import FLUX2_KLEIN
from danceopd.run.export import Probe, export

PICTURE = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_klein(folder)
    return folder


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return random_adapter(tiny_klein().transformer, rank=4, seed=1)


@pytest.fixture
def student(tmp_path, base, adapter) -> Path:
    """A student's folder as a run leaves it: the LoRA, with its base's fingerprint, and the recipe."""
    folder = tmp_path / "student"
    write_adapter(adapter, folder, metadata={"base_sha256": base_fingerprint(base)})
    (folder / "recipe.yaml").write_text(f"base: {base}\n")
    return folder


def condition(dtype: torch.dtype = torch.float32) -> Condition:
    draw = torch.Generator().manual_seed(3)
    return Condition(
        family="flux2-klein",
        shape=(16, 32),
        kwargs={
            "encoder_hidden_states": torch.randn(2, 5, 48, generator=draw).to(dtype),
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).expand(2, -1, -1),
            "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 5))).expand(2, -1, -1),
            "guidance": None,
        },
        context=None,
    )


def probe(adapter: Adapter | None, transformer=None) -> Probe:
    """The velocity of the student in training, from a backbone with it as an adapter (None: of the base)."""
    backbone = Backbone(transformer or tiny_klein().transformer, FLUX2_KLEIN)
    x, sigma = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4)), torch.tensor([0.2, 0.8])
    if adapter is not None:
        backbone.add_adapter("student", adapter)
    with torch.no_grad(), backbone.acting_as("student" if adapter is not None else None):
        inputs = condition(backbone.transformer.dtype)
        velocity = backbone.velocity(x, sigma, inputs)
    return Probe(x, sigma, inputs, velocity)


def picture(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), output_type="pt", **PICTURE)
    return torch.as_tensor(out.images)


# Loading


def test_load_student_is_the_stock_pipeline_bit_for_bit(base, student):
    from diffusers import DiffusionPipeline, Flux2KleinPipeline

    stock = DiffusionPipeline.from_pretrained(base)
    bare = picture(stock)
    stock.load_lora_weights(student)
    ours = load_student(student)
    assert type(ours) is Flux2KleinPipeline
    assert torch.equal(picture(ours), picture(stock))
    assert not torch.equal(picture(ours), bare)
    assert next(ours.transformer.parameters()).dtype == torch.float32


def test_load_student_by_file_base_and_dtype(base, student, adapter):
    pipe = load_student(student / WEIGHTS, base=base, dtype=torch.bfloat16, device="cpu")
    assert pipe.transformer.dtype == torch.bfloat16
    check_injected(pipe.transformer, adapter)


def test_the_base_is_found_in_the_file_when_there_is_no_recipe(base, student, adapter):
    write_adapter(adapter, student, metadata={"base": str(base)})
    (student / "recipe.yaml").unlink()
    check_injected(load_student(student).transformer, adapter)
    write_adapter(adapter, student)
    with pytest.raises(UserError, match="does not say which base"):
        load_student(student)


@pytest.mark.parametrize("form", ["diffusion_model.{}", "base_model.model.{}"])
def test_load_student_takes_foreign_files_with_their_alpha(base, tmp_path, adapter, form):
    tensors = {}
    for name, pair in adapter.tensors.items():
        for half, tensor in zip("AB", pair):
            tensors[f"{form.format(name)}.lora_{half}.weight"] = tensor
        tensors[f"{form.format(name)}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "foreign.safetensors")
    halved = Adapter({name: (a, b / 2) for name, (a, b) in adapter.tensors.items()})
    check_injected(load_student(tmp_path / "foreign.safetensors", base=base).transformer, halved)


def test_another_base_is_refused(tmp_path, base, student):
    other = tmp_path / "other"
    tiny_klein(other, seed=5)
    with pytest.raises(UserError, match=r"trained on another base than .*other.*fingerprints differ"):
        load_student(student, base=other)
    shutil.copytree(base, tmp_path / "copy")
    load_student(student, base=tmp_path / "copy")


def test_a_student_that_does_not_fit_is_refused_before_weights_load(base, student, adapter, monkeypatch):
    import danceopd.adapters.load as module

    monkeypatch.setattr(module, "load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    wide = Adapter({n: (torch.cat([a, a], 1), b) for n, (a, b) in adapter.tensors.items()})
    write_adapter(wide, student)
    with pytest.raises(UserError, match="another size"):
        load_student(student)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder, base: shutil.rmtree(folder), "does not exist"),
        (lambda folder, base: (folder / WEIGHTS).unlink(), "no safetensors file"),
        (lambda folder, base: (folder / WEIGHTS).write_bytes(b"x" * 100), "not a safetensors file"),
        (lambda folder, base: (folder / "recipe.yaml").write_text("base: [\n"), "not valid YAML"),
        (lambda folder, base: (folder / "recipe.yaml").write_text("base: 3\n"), "does not say which base"),
        (lambda folder, base: (folder / "recipe.yaml").write_text("base: ./gone\n"), "base model './gone'"),
        (lambda folder, base: (folder / "recipe.yaml").write_text(f"base: {folder}\n"), "not a diffusers pipeline"),
    ],
)
def test_load_student_refusals(base, student, spoil, says):
    spoil(student, base)
    with pytest.raises(UserError, match=says) as caught:
        load_student(student)
    assert "\n" not in str(caught.value)


def test_a_base_with_damaged_weights_is_a_sentence(tmp_path, base):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    shard = next((broken / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="does not load"):
        load_base(broken)
    (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        empty_transformer(broken)


# The silent no-op


def test_check_injected_sees_every_way_of_not_being_there(base, adapter):
    def fresh(given=adapter):
        pipe = load_base(base)
        halves = {
            f"transformer.{n}.lora_{h}.weight": t.clone() for n, p in given.tensors.items() for h, t in zip("AB", p)
        }
        if halves:
            pipe.load_lora_weights(halves, adapter_name="student")
        return pipe

    check_injected(fresh().transformer, adapter)
    fewer = Adapter(dict(list(adapter.tensors.items())[1:]))
    with pytest.raises(ExportError, match=f"loaded {len(adapter) - 1} of the student's {len(adapter)}.*left out"):
        check_injected(fresh(fewer).transformer, adapter)
    with pytest.raises(ExportError, match="invented"):
        check_injected(fresh().transformer, fewer)
    with pytest.raises(ExportError, match="loaded 0 of"):
        check_injected(fresh(Adapter({})).transformer, adapter)
    pipe = fresh()
    pipe.transformer.transformer_blocks[0].attn.to_q.lora_A["student"].weight.data[0, 0] += 1
    with pytest.raises(ExportError, match=r"changed transformer_blocks\.0\.attn\.to_q"):
        check_injected(pipe.transformer, adapter)
    for switch_off in (lambda p: p.disable_lora(), lambda p: p.set_adapters(["student"], [0.5])):
        pipe = fresh()
        switch_off(pipe)
        with pytest.raises(ExportError, match="loaded 0 of"):
            check_injected(pipe.transformer, adapter)


def test_a_loader_that_does_nothing_is_caught(base, student, monkeypatch):
    from diffusers import Flux2KleinPipeline

    monkeypatch.setattr(Flux2KleinPipeline, "load_lora_weights", lambda self, *a, **k: None)
    with pytest.raises(ExportError, match="loaded 0 of"):
        load_student(student)


# Export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_writes_what_loads_alone(base, tmp_path, adapter, dtype):
    file = export(adapter, tmp_path / "out", base, [probe(adapter)], dtype=dtype, metadata={"steps": "300"})
    assert os.listdir(tmp_path / "out") == [WEIGHTS] and file == tmp_path / "out" / WEIGHTS
    record = inspect_adapter(file).record
    assert record["base_sha256"] == base_fingerprint(base) and record["steps"] == "300"
    trained = probe(adapter)
    velocity = trained.velocity_of(load_student(tmp_path / "out").transformer)
    torch.testing.assert_close(velocity, trained.velocity, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.1)
    assert (velocity - probe(None).velocity).norm() > 0.1 * trained.velocity.norm()


def test_export_with_a_bf16_backbone(base, tmp_path, adapter):
    student = probe(adapter, load_base(base, torch.bfloat16).transformer)
    export(adapter, tmp_path, base, [student], load=lambda: load_base(base, torch.bfloat16))
    other = random_adapter(tiny_klein().transformer, rank=4, seed=2)
    with pytest.raises(ExportError, match="is not the student"):
        export(other, tmp_path, base, [student], load=lambda: load_base(base, torch.bfloat16))


def test_export_refuses_what_is_not_the_student_and_keeps_the_old_file(base, tmp_path, adapter):
    before = export(adapter, tmp_path, base, [probe(adapter)]).read_bytes()

    def refused(says, exported, probes, **kwargs):
        with pytest.raises(ExportError, match=says):
            export(exported, tmp_path, base, probes, **kwargs)
        assert os.listdir(tmp_path) == [WEIGHTS] and (tmp_path / WEIGHTS).read_bytes() == before

    scaled = Adapter({n: (a, 1.1 * b) for n, (a, b) in adapter.tensors.items()})
    refused("is not the student", scaled, [probe(adapter)])
    fewer = Adapter(dict(list(adapter.tensors.items())[1:]))
    refused("is not the student", fewer, [probe(adapter)])
    zero = Adapter({n: (a, 0 * b) for n, (a, b) in adapter.tensors.items()})
    refused("equals its base", zero, [probe(zero)])
    refused("changes nothing in the stock pipeline", zero, [probe(adapter)])
    good = probe(adapter)
    refused("NaN", adapter, [Probe(good.x, good.sigma, good.condition, good.velocity * torch.nan)])
    with pytest.raises(ValueError, match="at least one probe"):
        export(adapter, tmp_path, base, [])


def test_export_catches_a_stock_loader_that_scales(base, tmp_path, adapter, monkeypatch):
    """As diffusers did with alpha and no metadata: loads, warns of nothing, and is another model."""
    from diffusers import Flux2KleinPipeline

    stock = Flux2KleinPipeline.load_lora_weights

    def half(self, source, **kwargs):
        stock(self, source, **kwargs)
        self.set_adapters(["student"], [0.5])

    monkeypatch.setattr(Flux2KleinPipeline, "load_lora_weights", half)
    with pytest.raises(ExportError, match="changed"):
        export(adapter, tmp_path, base, [probe(adapter)])
    assert not list(tmp_path.iterdir())


# Fusing


def test_a_fused_pipeline_loads_alone_and_generates_the_same(tmp_path, base, student):
    from diffusers import DiffusionPipeline

    (base / "danceopd.json").write_text("{}")
    bare, with_lora = picture(load_base(base)), picture(load_student(student))
    output = fuse(student, tmp_path / "whole" / "fused")
    drawn = picture(DiffusionPipeline.from_pretrained(output))
    torch.testing.assert_close(drawn, with_lora, rtol=0, atol=1e-3)
    assert (drawn - bare).abs().max() > 0.05
    assert torch.equal(drawn, picture(load_student(output)))
    assert (output / "recipe.yaml").is_file() and (output / "danceopd.json").is_file()
    assert not list(output.rglob("*.bin"))
    assert os.listdir(tmp_path / "whole") == ["fused"]
    config = json.loads((output / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "Flux2Transformer2DModel"


def test_fuse_keeps_the_dtype_of_the_base(tmp_path, adapter):
    tiny_klein().to(torch.bfloat16).save_pretrained(tmp_path / "low")
    assert stored_dtype(tmp_path / "low") == torch.bfloat16
    write_adapter(adapter, tmp_path / "lora")
    output = fuse(tmp_path / "lora", tmp_path / "fused", base=tmp_path / "low")
    assert stored_dtype(output) == torch.bfloat16


def test_fuse_refusals(tmp_path, base, student, adapter):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        fuse(student, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    with pytest.raises(UserError, match="whole pipeline already"):
        fuse(base, tmp_path / "new")
    faint = Adapter({n: (a, 1e-12 * b) for n, (a, b) in adapter.tensors.items()})
    write_adapter(faint, student)
    with pytest.raises(ExportError, match="fusing changed nothing"):
        fuse(student, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    write_adapter(adapter, student)
    assert (fuse(student, tmp_path / "empty") / "model_index.json").is_file()
    assert not (tmp_path / "new").exists()


def test_fuse_catches_a_fuse_that_goes_wrong(tmp_path, student, monkeypatch):
    from diffusers import Flux2KleinPipeline

    stock = Flux2KleinPipeline.fuse_lora
    monkeypatch.setattr(Flux2KleinPipeline, "fuse_lora", lambda self, **k: stock(self, lora_scale=0.9, **k))
    with pytest.raises(ExportError, match=r"something else than W \+ BA"):
        fuse(student, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The fingerprint


def test_the_fingerprint_is_the_transformers(tmp_path, base):
    first = base_fingerprint(base)
    assert re.fullmatch("[0-9a-f]{64}", first)
    copy = tmp_path / "elsewhere"
    shutil.copytree(base, copy)
    assert base_fingerprint(copy) == first

    config = copy / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_name_or_path": "x", "_diffusers_version": "9"}))
    assert base_fingerprint(copy) == first
    config.write_text(json.dumps(settings | {"rope_theta": 3000}))
    assert base_fingerprint(copy) != first
    config.write_text(json.dumps(settings))

    shard = next((copy / "transformer").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert base_fingerprint(copy) != first
    shard.unlink()
    with pytest.raises(UserError, match="no safetensors weights"):
        base_fingerprint(copy)


def test_the_fingerprint_hashes_a_file_once(base, monkeypatch):
    import danceopd.models.base as module

    first = base_fingerprint(base)
    monkeypatch.setattr(module, "sha256", lambda file: pytest.fail("hashed again"))
    assert base_fingerprint(base) == first


def test_empty_transformer_has_shapes_and_no_weights(base, adapter, student):
    empty = empty_transformer(base)
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert read_adapter(student, empty).sha256 == adapter.sha256


def test_loading_is_quiet_and_gives_the_bars_back(base, capfd):
    from diffusers.utils import logging

    load_base(base)
    assert "it/s" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


def test_a_base_that_needs_a_missing_package_says_so(base, monkeypatch):
    from diffusers import DiffusionPipeline

    def missing(*args, **kwargs):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", missing)
    with pytest.raises(UserError, match="needs a package that is not installed .*Torchvision.*; install it"):
        load_base(base)
