"""Merges on a base that is quantised, or stays in the computer's memory: from files to the stock pipeline."""

from __future__ import annotations

import json
import shutil
from importlib import import_module

import pytest
import tiny_flux1
import tiny_sd3
import torch
from diffusers import DiffusionPipeline, TorchAoConfig
from safetensors.torch import load_file, save_file
from tinies import KLEIN
from tiny_merge import WEIGHTS, family_recipe, run

from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.load import ExportError, load_student
from danceopd.engine.trainer import Trainer
from danceopd.errors import UserError
from danceopd.kernels.autotune import model_spec
from danceopd.merge import merge
from danceopd.models import storage
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe
from danceopd.run.provenance import start_from

CASES = {"flux2-klein": (KLEIN, "nf4"), "flux1": (tiny_flux1.TINY, "int8"), "sd3": (tiny_sd3.TINY, "fp8")}
FAST = {"validation": {"every": 0}, "monitor": {"every": 0}}


@pytest.fixture(scope="module", params=CASES)
def merged(request, tmp_path_factory):
    """A merge of one family on a quantised base, its recipe, what it said; and the same, stopped and continued."""
    tiny, kind = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    stock = tiny.build()
    given = family_recipe(tiny, stock, folder).resolved() | {"base_dtype": kind, "steps": 3, **FAST, "save_every": 1}
    recipe = Recipe(**given)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("danceopd.merge"), "_say", lambda line, processes: said.append(line))
        run(recipe)
    again = Recipe(**{**given, "output": str(folder / "again")})
    run(again, kill=2)
    run(again)
    return tiny, kind, recipe, said, folder


def test_a_merge_on_a_quantised_base_ends_and_continues_exactly(merged):
    tiny, kind, recipe, said, folder = merged
    assert any(f"Linear layers quantised to {kind}" in line for line in said)
    whole, continued = (load_file(folder / name / WEIGHTS) for name in ("student", "again"))
    assert whole.keys() == continued.keys() and all(torch.equal(whole[key], continued[key]) for key in whole)
    assert list((folder / "student").rglob("*.png"))  # sample grids
    card = (folder / "student" / "README.md").read_text()
    assert "on the base in full precision its change of the velocity is" in card
    kept = Recipe.from_yaml(folder / "student" / "recipe.yaml")
    assert kept.base_dtype == kind and kept.rollout.merged is False


def test_stock_diffusers_loads_the_student_on_both_bases(merged):
    """What the student changes on the quantised base it changes, nearly, on the one in full precision."""
    tiny, kind, recipe, _, folder = merged
    call = {k: v for k, v in tiny.call.items() if k != "steps"} | {"num_inference_steps": 2, "output_type": "latent"}
    changes = []
    for quantised in (False, True):
        pipe = DiffusionPipeline.from_pretrained(folder / "base") if quantised else load_student(folder / "student")
        if quantised:
            storage.quantise(pipe.transformer, kind, torch.float32, torch.device("cpu"))
            pipe.load_lora_weights(folder / "student", adapter_name="student")
        pipe.set_progress_bar_config(disable=True)
        drawn = []
        for _ in range(2):
            drawn.append(pipe(prompt="a red circle", **call, generator=torch.Generator().manual_seed(1)).images)
            pipe.disable_lora()
        changes.append((drawn[0] - drawn[1]).flatten())
    cosine = torch.nn.functional.cosine_similarity(*changes, dim=0)
    assert float(cosine) > 0.8, cosine


def test_a_base_that_training_changed_proves_nothing(merged, tmp_path, monkeypatch):
    tiny, kind, recipe, _, folder = merged
    release = Trainer.release

    def broken(self):
        release(self)
        layer = next(m for m in self.backbone.transformer.modules() if storage.kept_as(m))
        packed = layer.weight.data if kind == "nf4" else layer.weight.qdata
        packed.view(torch.uint8).flatten()[0] ^= 24

    monkeypatch.setattr(Trainer, "release", broken)
    with pytest.raises(ExportError, match="of the base is not what"):
        merge(Recipe(**recipe.resolved() | {"output": str(tmp_path / "run"), "steps": 1}), lambda *_: None)
    assert not (tmp_path / "run" / WEIGHTS).exists()


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """A tiny klein, two LoRAs of it, and the recipe of their merge."""
    folder = tmp_path_factory.mktemp("klein")
    return folder, family_recipe(KLEIN, KLEIN.build(), folder).resolved() | {"steps": 2, **FAST}


def test_an_offloaded_base_gives_the_same_student(klein):
    folder, given = klein
    same = {"gradient_checkpointing": True, "rollout": {"steps": 2, "merged": False}}
    for name, how in (("whole", {}), ("shared", {"offload": "blocks"})):
        merge(Recipe(**{**given, **same, **how, "output": str(folder / name)}), lambda *_: None)
    whole, shared = (load_file(folder / name / WEIGHTS) for name in ("whole", "shared"))
    assert all(torch.equal(whole[key], shared[key]) for key in whole)


def test_a_base_that_was_saved_quantised(klein, tmp_path, capsys):
    """By diffusers with torchao: it is merged on, in bf16, and the student loads on it."""
    from torchao.quantization import Int8WeightOnlyConfig

    folder, given = klein
    shutil.copytree(folder / "base", tmp_path / "base")
    kind = type(KLEIN.build().transformer)
    saved = kind.from_pretrained(
        tmp_path / "base" / "transformer", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.bfloat16,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "base" / "transformer")
    saved.save_pretrained(tmp_path / "base" / "transformer")
    recipe = Recipe(**{**given, "base": str(tmp_path / "base"), "output": str(tmp_path / "run")})
    facts = plan(recipe, tflops=1.0)
    assert facts["base_dtype"] == "int8" and facts["settings"]["dtype"] == "bf16"
    merge(recipe, lambda *_: None)
    assert "proven on the quantised base alone" in capsys.readouterr().err
    assert load_student(tmp_path / "run", dtype=torch.bfloat16).transformer.peft_config
    for more, said in (
        ({"base_dtype": "nf4"}, "was saved quantised in int8, so base_dtype has no meaning"),
        ({"rollout": {"merged": True}}, "saved quantised in int8: rollout.merged adds the student"),
    ):
        with pytest.raises(UserError, match=said):
            plan(Recipe(**{**recipe.resolved(), "output": str(tmp_path / "no"), **more}), tflops=1.0)


def test_a_gguf_in_place_of_the_transformer(klein, tmp_path, capsys):
    import gguf

    folder, given = klein
    shutil.copytree(folder / "base", tmp_path / "base")
    [file] = (tmp_path / "base" / "transformer").glob("*.safetensors")
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "flux")
    for name, tensor in load_file(file).items():
        numbers, kind = tensor.float().numpy(), None
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            numbers = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = {**given, "base": str(tmp_path / "base"), "base_dtype": "gguf", "gguf": str(tmp_path / "model.gguf")}
    file.unlink()  # the folder has the configuration, the encoders and the VAE
    recipe = Recipe(**{**own, "output": str(tmp_path / "run")})
    plan(recipe, tflops=1.0)
    merge(recipe, lambda *_: None)
    assert "proven on the quantised base alone" in capsys.readouterr().err
    more = start_from(Recipe(**{**own, "output": str(tmp_path / "next")}), tmp_path / "run")
    assert "base_sha256" not in inspect_adapter(more.student.init).record  # it fits the base in full precision, too
    student = load_student(tmp_path / "run", base=folder / "base")  # the base in full precision
    assert student.transformer.peft_config
    (tmp_path / "other.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no GGUF"):
        plan(Recipe(**{**own, "gguf": str(tmp_path / "other.gguf"), "output": str(tmp_path / "no")}), tflops=1.0)


REFUSED = [
    ({"base_dtype": "nf4", "objective": "flowopd", "rollout": {"noise": 0.7}, "batch": 8}, "objective flowopd weighs"),
    ({"base_dtype": "nf4", "rollout": {"merged": True}}, "rollout.merged adds the student to the base's weights"),
    ({"base_dtype": "int8", "parallel": "fsdp"}, "parallel fsdp shares out weights in full precision"),
    ({"base_dtype": "int8", "offload": "blocks"}, "offload brings weights in full precision"),
    ({"base_dtype": "int8", "compile": True}, "compile was never tried on a quantised base"),
    ({"base_dtype": "gguf"}, "give both base_dtype: gguf and the file"),
    ({"offload": "blocks", "rollout": {"merged": True}}, "offload blocks keeps one block on the card"),
    ({"offload": "blocks", "gradient_checkpointing": False}, "would hold every block until the backward"),
    ({"offload": "blocks", "compile": True}, "offload blocks exchanges weights"),
    ({"base_dtype": "int4"}, "base_dtype"),
]


@pytest.mark.parametrize(("over", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused_when_the_recipe_is_made(klein, over, said):
    _, given = klein
    with pytest.raises(UserError, match=said):
        Recipe(**{**given, **over})


def test_a_whole_model_is_not_streamed_into_quantised_weights(klein, tmp_path):
    folder, given = klein
    shutil.copytree(folder / "base", tmp_path / "tuned")
    [file] = (tmp_path / "tuned" / "transformer").glob("*.safetensors")
    tensors = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    teachers = [{**given["teachers"][0], "adapter": str(tmp_path / "tuned"), "residual": 0}, given["teachers"][1]]
    for how, key in (({"base_dtype": "int8"}, "base_dtype: int8"), ({"offload": "blocks"}, "offload: blocks")):
        own = {**given, **how, "teachers": teachers, "student": {"rank": 8, "init": "base"}}
        with pytest.raises(UserError, match=f"streamed through the base, which {key} does not keep whole"):
            merge(Recipe(**{**own, "output": str(tmp_path / "run")}), lambda *_: None)


def test_the_kernels_trial_is_told_what_a_quantised_model_computes_in():
    pipe = KLEIN.build()
    storage.quantise(pipe.transformer, "nf4", torch.float32, torch.device("cpu"))
    spec = model_spec(pipe.transformer)
    assert spec["dtype"] == "float32"
    json.dumps(spec)
