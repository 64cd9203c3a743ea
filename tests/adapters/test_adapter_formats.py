"""`export_as` and `danceopd inspect`: every format of every family, read back by danceopd, stock diffusers and PEFT."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tinies import TINYS
from tiny import random_adapter, tiny_klein

from danceopd.adapters.dialects import linear_sizes
from danceopd.adapters.export import FORMATS, distance, export_as, write_as
from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.load import check_injected, load_student
from danceopd.adapters.original_names import ARCHITECTURES
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.base import load_base
from danceopd.models.lora import Adapter
from danceopd.pipelines.registry import FAMILIES

WITHOUT_ORIGINAL_NAMES = ("bria-fibo", "hidream", "longcat-image", "qwen-image-2.1")
"""Families whose layers' names in other tools are not known here."""
ALL = {tiny.family: tiny for tiny in reversed(TINYS)}
FAMILY = {name: tiny for name, tiny in ALL.items() if name not in WITHOUT_ORIGINAL_NAMES}
HIDDEN = 3072  # FLUX.1's converter knows this width only, and no tiny model has it


def mixed(transformer, targets: str, seed: int = 1) -> Adapter:
    """Ranks 2 and 3 by turns, so that a fused layer joins unequal ones."""
    pairs = random_adapter(transformer, rank=3, seed=seed, targets=targets).tensors
    return Adapter({n: (a[: 2 + i % 2], b[:, : 2 + i % 2]) for i, (n, (a, b)) in enumerate(pairs.items())})


@pytest.fixture(scope="module", params=FAMILY)
def made(request, tmp_path_factory):
    """(pipeline, adapter on the family's targets, folder of the student, its base's folder)."""
    folder = tmp_path_factory.mktemp("family")
    pipe = FAMILY[request.param].build(folder / "base")
    adapter = mixed(pipe.transformer, FAMILIES[request.param].lora_targets)
    write_adapter(adapter, folder / "student", metadata={"base": str(folder / "base")})
    return pipe, adapter, folder


def stock_reads(pipe, format: str) -> bool:
    kind = type(pipe.transformer).__name__
    return format in ARCHITECTURES[kind].stock and not (kind == "FluxTransformer2DModel" and format != "diffusers")


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_reads_back_as_the_same_adapter(made, tmp_path, format):
    pipe, adapter, folder = made
    done = export_as(folder / "student", tmp_path, format)
    assert done.residual < 1e-6
    assert read_adapter(done.file, pipe.transformer).sha256 == adapter.sha256
    if format == "peft":
        read_adapter(tmp_path, pipe.transformer)
    header = inspect_adapter(done.file)
    assert header.record["base"] == str(folder / "base")
    if format in ("diffusers", "peft"):  # loaders that know one rank and one alpha take these for every layer
        assert set(header.ranks.values()) == {3}
    if format == "peft":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    if stock_reads(pipe, format):
        assert done.stock is True, done.note


@pytest.mark.parametrize("family", WITHOUT_ORIGINAL_NAMES)
def test_a_family_whose_original_names_are_not_known(family, tmp_path):
    """diffusers and peft are written and read back; other tools' formats are refused before anything is written."""
    from danceopd.cli.inspect import describe

    pipe = ALL[family].build(tmp_path / "base")
    adapter = mixed(pipe.transformer, FAMILIES[family].lora_targets)
    write_adapter(adapter, tmp_path / "student", metadata={"base": str(tmp_path / "base")})
    assert describe(tmp_path / "student")["family"] == [family]
    for format in ("diffusers", "peft"):
        done = export_as(tmp_path / "student", tmp_path / format, format)
        assert done.residual < 1e-6 and read_adapter(done.file, pipe.transformer).sha256 == adapter.sha256
    for format in ("comfyui", "kohya"):
        words = f"how {format} names the layers of a {type(pipe.transformer).__name__} is not known here; export it as"
        with pytest.raises(UserError, match=words):
            export_as(tmp_path / "student", tmp_path / format, format)
        assert not (tmp_path / format).exists()


@pytest.mark.parametrize("format", FORMATS)
def test_stock_load_lora_weights_acts_the_same(made, tmp_path, format):
    """The real loader on the real pipeline: N of N layers, number for number."""
    pipe, adapter, folder = made
    if not stock_reads(pipe, format):
        pytest.skip("diffusers has no converter for it")
    done = export_as(folder / "student", tmp_path, format)
    fresh = load_base(folder / "base", vae=None)
    fresh.load_lora_weights(str(done.file.parent), weight_name=done.file.name, adapter_name="student")
    from peft.tuners.lora import LoraLayer

    layers = {n: m for n, m in fresh.transformer.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == adapter.tensors.keys()
    for name, layer in layers.items():
        assert "student" in layer.active_adapters
        acts = layer.scaling["student"] * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
        torch.testing.assert_close(acts.detach(), adapter.delta(name), rtol=1e-5, atol=1e-5)


def test_peft_loads_the_peft_format(made, tmp_path):
    from peft import PeftModel

    pipe, adapter, folder = made
    export_as(folder / "student", tmp_path, "peft")
    model = PeftModel.from_pretrained(load_base(folder / "base", vae=None).transformer, str(tmp_path))
    check_injected(model.base_model.model, adapter, "default")


def test_partly_adapted_layers_join_exactly(made, tmp_path):
    """Only k of q, k, v: the fused layer has rows of zeros for the others, and only k comes back."""
    pipe, adapter, _ = made
    some = Adapter({n: p for n, p in adapter.tensors.items() if n.endswith(("to_k", "add_v_proj"))})
    for format in FORMATS:
        done = write_as(some, tmp_path / format / "x.safetensors", format, pipe.transformer)
        assert read_adapter(done.file, pipe.transformer).sha256 == some.sha256
        whole = format == "kohya" and type(pipe).__name__ == "WanPipeline"  # stock reads files of all layers alone
        assert done.stock in (True, None) or whole or not stock_reads(pipe, format)


def test_a_rank_bounds_what_joining_adds(made, tmp_path):
    pipe, adapter, folder = made
    fused = export_as(folder / "student", tmp_path / "whole", "comfyui")
    small = export_as(folder / "student", tmp_path / "small", "comfyui", rank=3)
    assert small.rank == 3 and (fused.rank > 3) == (small.residual > 1e-3)
    back = read_adapter(small.file, pipe.transformer)
    assert distance(adapter, back) == pytest.approx(small.residual, abs=1e-5)
    low = export_as(folder / "student", tmp_path / "low", "kohya", dtype="bf16")
    assert 1e-4 < low.residual < 1e-2 and inspect_adapter(low.file).dtypes in (("BF16", "F32"), ("BF16",))


@pytest.mark.parametrize("format", FORMATS)
def test_every_linear_goes_to_every_format(made, tmp_path, format):
    """The first and last layers and the modulations, too; where stock's loader cannot read that, it is said."""
    pipe, _, folder = made
    whole = mixed(pipe.transformer, ".*")
    write_adapter(whole, tmp_path / "whole", metadata={"base": str(folder / "base")})
    done = export_as(tmp_path / "whole", tmp_path / "out", format)
    assert read_adapter(done.file, pipe.transformer).sha256 == whole.sha256 and done.residual < 1e-6
    kind = type(pipe.transformer).__name__
    if (kind, format) == ("Flux2Transformer2DModel", "comfyui"):
        assert done.stock is False and "exchanges scale and shift of norm_out.linear" in done.sentence
    if (kind, format) == ("Flux2Transformer2DModel", "kohya"):
        assert done.stock is False and "leaves out double_stream_modulation_img.linear" in done.sentence


def test_layers_are_left_out_and_an_empty_lora_is_said_to_be_empty(klein, tmp_path):
    _, adapter, folder = klein
    done = export_as(folder / "student", tmp_path / "less", leave_out=["single_*"])
    kept = {name for name in adapter.tensors if not name.startswith("single_")}
    assert done.layers == len(kept) < len(adapter) and set(read_adapter(done.file).tensors) == kept
    empty = Adapter({n: (a, 0 * b) for n, (a, b) in adapter.tensors.items()})
    write_adapter(empty, tmp_path / "empty", metadata={"base": str(folder / "base")})
    assert "empty: B·A is zero in every layer" in export_as(tmp_path / "empty", tmp_path / "out").sentence


# The tables, against diffusers' converters of whole checkpoints


SINGLE_FILE = {
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
}


class Whole(dict):
    """A checkpoint that gives zeros for every tensor it does not have: some converters need them all."""

    zeros = torch.zeros(7 * HIDDEN)

    def pop(self, key, default=None):
        return super().pop(key, self.zeros)

    def __missing__(self, key):
        return self.zeros


@pytest.mark.parametrize("kind", SINGLE_FILE)
def test_the_tables_are_the_single_file_converters(kind):
    """An original weight, converted as a checkpoint, has its rows where the table says."""
    from diffusers.loaders import single_file_utils

    names = ARCHITECTURES[kind]
    width, sizes, tensors = HIDDEN if kind == "FluxTransformer2DModel" else 4, {}, {}
    for number, part in enumerate(p.format(0) for parts in names.stacked.values() for p in parts):
        out = 4 * width if part.endswith("proj_mlp") else 2 * width if part == "norm_out.linear" else width
        sizes[part] = (width, out)
        tensors[part] = (torch.ones(1, width), torch.arange(out).float()[:, None] + 100_000 * number)
    joined = names.join(tensors, sizes)
    checkpoint = {f"{layer}.weight": b @ a for layer, (a, b) in joined.items()}
    if kind in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        checkpoint = Whole(checkpoint)
    if kind == "SD3Transformer2DModel":  # its last block is another
        checkpoint["joint_blocks.1.x_block.attn.qkv.weight"] = Whole.zeros
    found = getattr(single_file_utils, SINGLE_FILE[kind])(checkpoint)
    assert len(tensors) == sum(map(len, names.stacked.values()))
    for module, (a, b) in tensors.items():
        assert torch.equal(found[f"{module}.weight"], b @ a), module


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_flux1_at_its_real_width_equals_the_stock_converter(tmp_path, format):
    """One double and one single block of FLUX.1's own sizes; its converter hard-codes them."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    targets = r".*\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|proj_mlp|proj_out|net\.(0\.proj|2)|linear)"
    sizes, draw = linear_sizes(transformer), torch.Generator().manual_seed(0)
    blocks = [n for n in sizes if "blocks." in n and re.fullmatch(targets, n)]
    adapter = Adapter(
        {
            n: tuple(torch.randn(s, generator=draw) for s in ((1 + i % 2, sizes[n][0]), (sizes[n][1], 1 + i % 2)))
            for i, n in enumerate(blocks)
        }
    )
    assert "single_transformer_blocks.0.proj_mlp" in adapter.tensors
    done = write_as(adapter, tmp_path / "x.safetensors", format, transformer)
    assert done.stock is True, done.note
    assert read_adapter(done.file, transformer).sha256 == adapter.sha256


# FLUX.2 klein in particular


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein")
    pipe = tiny_klein(folder / "base")
    adapter = random_adapter(pipe.transformer, rank=4, seed=1)
    write_adapter(adapter, folder / "student", metadata={"base": str(folder / "base")})
    return pipe, adapter, folder


def test_the_keys_each_tool_wants(klein, tmp_path):
    _, adapter, folder = klein
    keys = {}
    for format in FORMATS:
        done = export_as(folder / "student", tmp_path / format, format)
        with safe_open(str(done.file), "pt") as opened:
            keys[format] = set(opened.keys())
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in keys["diffusers"]
    assert "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight" in keys["peft"]
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in keys["comfyui"]
    assert "diffusion_model.single_blocks.1.linear1.lora_B.weight" in keys["comfyui"]
    stem = "lora_unet_double_blocks_1_txt_mlp_2"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= keys["kohya"]
    assert not any("to_q" in key for key in keys["comfyui"] | keys["kohya"])
    kohya = load_file(tmp_path / "kohya" / "student.safetensors")
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 12
    assert float(kohya["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 12
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and len(config["target_modules"]) == len(adapter)


def test_a_shared_a_keeps_its_rank(klein, tmp_path):
    """What came from a fused file goes back into one of the same rank."""
    pipe, adapter, _ = klein
    tensors = dict(adapter.tensors)
    for part in "qkv":
        name = f"transformer_blocks.0.attn.to_{part}"
        tensors[name] = (adapter.tensors["transformer_blocks.0.attn.to_q"][0], tensors[name][1])
    done = write_as(Adapter(tensors), tmp_path / "x.safetensors", "comfyui", pipe.transformer)
    shapes = inspect_adapter(done.file).shapes
    assert shapes["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"][0] == 4
    assert shapes["diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight"][0] == 12
    assert read_adapter(done.file, pipe.transformer).sha256 == Adapter(tensors).sha256


def test_same_student_same_bytes(klein, tmp_path):
    _, _, folder = klein
    for format in FORMATS:
        files = [export_as(folder / "student", tmp_path / str(i) / format, format).file for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_refused(klein, tmp_path):
    pipe, adapter, folder = klein
    student = folder / "student"

    def refused(says, **how):
        with pytest.raises(UserError, match=says) as caught:
            export_as(how.pop("student", student), how.pop("output", tmp_path / "out"), **how)
        assert "\n" not in str(caught.value)

    refused("no format 'comfy'; did you mean 'comfyui'", format="comfy")
    refused("no dtype 'bf'; did you mean 'bf16'", dtype="bf")
    refused("rank 0", rank=0)
    refused("does not exist", student=tmp_path / "gone")
    write_adapter(adapter, tmp_path / "lost")
    refused("does not say which base", student=tmp_path / "lost")
    export_as(student, tmp_path / "twice", "kohya")
    before = (tmp_path / "twice" / "student.safetensors").read_bytes()
    refused("exists and is not overwritten", output=tmp_path / "twice", format="kohya", dtype="bf16")
    assert (tmp_path / "twice" / "student.safetensors").read_bytes() == before
    huge = Adapter({n: (a / 1e6, b * 1e6) for n, (a, b) in adapter.tensors.items()})
    write_adapter(huge, tmp_path / "huge", metadata={"base": str(folder / "base")})
    for format in FORMATS:
        refused("up to .*e.06 and float16 ends at 6.55e.04", student=tmp_path / "huge", dtype="fp16", format=format)
    assert not (tmp_path / "out").exists()

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Linear(2, 2)

    some = Adapter({"x": (torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(UserError, match="how kohya names the layers of a Other is not known"):
        write_as(some, tmp_path / "o" / "x.safetensors", "kohya", Other())
    assert write_as(some, tmp_path / "o" / "x.safetensors", "diffusers", Other()).stock is None


def test_a_stock_converter_that_differs_is_caught(klein, tmp_path, monkeypatch):
    from diffusers.loaders import Flux2LoraLoaderMixin

    from danceopd.adapters.load import ExportError

    stock = Flux2LoraLoaderMixin.lora_state_dict.__func__

    def half(cls, *arguments, **how):
        return {key: 0.5 * tensor for key, tensor in stock(cls, *arguments, **how).items()}

    monkeypatch.setattr(Flux2LoraLoaderMixin, "lora_state_dict", classmethod(half))
    with pytest.raises(ExportError, match="stock diffusers reads another adapter"):
        export_as(klein[2] / "student", tmp_path / "out", "comfyui")
    assert not list((tmp_path / "out").iterdir())


def test_two_students_at_once_through_set_adapters(klein, tmp_path):
    """Each at its own weight, then fused: W + Σ w BA."""
    pipe, adapter, folder = klein
    other = random_adapter(pipe.transformer, rank=2, seed=7)
    write_adapter(other, tmp_path / "other", metadata={"base": str(folder / "base")})
    both = load_student(folder / "student")
    both.load_lora_weights(str(export_as(tmp_path / "other", tmp_path / "c", "comfyui").file), adapter_name="other")
    both.set_adapters(["student", "other"], [0.5, -2.0])
    both.fuse_lora(adapter_names=["student", "other"])
    both.unload_lora_weights()
    for name in adapter.tensors:
        old, new = (p.transformer.get_submodule(name).weight for p in (pipe, both))
        torch.testing.assert_close(new - old, 0.5 * adapter.delta(name) - 2 * other.delta(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_a_teacher(klein, tmp_path, format):
    """A student in any format, read as a merge reads its teachers, acts on the backbone as the student did."""
    from danceopd.models.backbone import Backbone
    from danceopd.models.base import empty_transformer

    pipe, adapter, folder = klein
    done = export_as(folder / "student", tmp_path, format)
    path = tmp_path if format == "peft" else done.file
    teacher = read_adapter(path, empty_transformer(folder / "base"))
    backbone = Backbone(tiny_klein().transformer, FAMILIES["flux2-klein"])
    backbone.add_adapter("teacher", teacher)
    assert backbone.adapter("teacher").sha256 == adapter.sha256


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_generates_what_the_student_generates(klein, tmp_path, format):
    """Joined and split again, its halves are others than the stock loader makes; what they do is the same."""
    pipe, adapter, folder = klein
    done = export_as(folder / "student", tmp_path, format)
    loaded = load_student(done.file, base=folder / "base").transformer
    for name in adapter.tensors:
        layer = loaded.get_submodule(name)
        acts = layer.lora_B["student"].weight @ layer.lora_A["student"].weight * layer.scaling["student"]
        torch.testing.assert_close(acts.detach(), adapter.delta(name), rtol=1e-5, atol=1e-5)


# What `danceopd inspect` says of them


@pytest.mark.parametrize("format", FORMATS)
def test_inspect_tells_the_family_and_the_format(made, tmp_path, format):
    from danceopd.cli.inspect import describe

    pipe, adapter, folder = made
    done = export_as(folder / "student", tmp_path, format)
    facts = describe(tmp_path)
    family = next(name for name, family in FAMILIES.items() if family.generation == type(pipe).__name__)
    assert facts["kind"] == "LoRA" and facts["dialect"] == format and facts["family"] == [family]
    assert facts["transformer"] == [type(pipe.transformer).__name__]
    assert facts["base"] == str(folder / "base") and len(facts["base_sha256"]) == 64
    assert facts["adapter_sha256"] == adapter.sha256 and facts["rank"] == done.rank
    assert ("stock load_lora_weights" in facts["uses"]) == (format in ARCHITECTURES[facts["transformer"][0]].stock)
    assert sum(facts["targets"].values()) == facts["modules"] == done.layers
    if format == "kohya":
        assert facts["alpha"].startswith("2, 3")
    json.dumps(facts)


def test_inspect_a_lora_that_does_not_say_its_base(made, tmp_path):
    """By its layers' names alone the family is among those found, and so is its transformer."""
    from danceopd.cli.inspect import describe

    pipe, adapter, _ = made
    write_adapter(adapter, tmp_path, one_rank=False)
    facts = describe(tmp_path)
    family = next(name for name, family in FAMILIES.items() if family.generation == type(pipe).__name__)
    assert family in facts["family"] and facts["transformer"] == [type(pipe.transformer).__name__]
    assert facts["base"] is None and (facts["rank"], facts["lowest_rank"]) == (3, 2)


def test_inspect_whole_models(made, tmp_path):
    from danceopd.cli.inspect import describe

    pipe, _, folder = made
    whole, part = describe(folder / "base"), describe(folder / "base" / "transformer")
    single = describe(next((folder / "base" / "transformer").glob("*.safetensors")))
    kind = type(pipe.transformer).__name__
    assert (whole["kind"], part["kind"], single["kind"]) == ("pipeline", "transformer", "checkpoint")
    assert whole["class"] == type(pipe).__name__ and part["class"] == kind and single["transformer"] == [kind]
    assert whole["family"][0] in part["family"] and whole["family"][0] in single["family"]
    assert whole["dtypes"] == part["dtypes"] == single["dtypes"] == ["F32"]
    assert any("extract" in use for use in single["uses"])


def test_inspect_a_run_and_what_is_refused(klein, tmp_path):
    from danceopd.cli.inspect import describe

    _, adapter, folder = klein
    (tmp_path / "recipe.yaml").write_text(
        "base: b\nsteps: 7\nteachers: [{name: draws, adapter: x, capability: generation}]\n"
    )
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    facts = describe(tmp_path)
    assert facts["kind"] == "run" and facts["teachers"] == ["draws (x)"]
    assert (facts["saved_step"], facts["finished"]) == (4, False) and "continues" in facts["uses"][0]
    write_adapter(adapter, tmp_path)
    facts = describe(tmp_path)
    assert facts["rank"] == 4 and "start: student.init" in facts["uses"] and facts["base"] == "b"
    from safetensors.torch import save_file

    parts = {"lora_A.weight": torch.ones(2, 2), "lora_B.weight": torch.ones(2, 2), "dora_scale": torch.ones(2)}
    save_file({f"transformer_blocks.0.attn.to_q.{n}": t for n, t in parts.items()}, tmp_path / "d.safetensors")
    facts = describe(tmp_path / "d.safetensors")
    assert "DoRA" in facts["refused"] and facts["uses"] == []
    save_file({"x": torch.ones(2)}, tmp_path / "n.safetensors")
    with pytest.raises(UserError, match="is not a LoRA"):
        describe(tmp_path / "n.safetensors")
