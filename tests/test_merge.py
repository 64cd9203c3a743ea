"""The front door on a real, tiny pipeline: files out, the same bytes twice, exact continuation, refusals."""

import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, Flux2Transformer2DModel
from PIL import Image
from tiny import random_adapter, tiny_klein
from tiny_merge import WEIGHTS, Killed, json_lines, run, tiny_recipe

from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.data.encode import Encoder, free_encoders
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.models.cuda_graphs import with_cuda_graphs


def recipe(models, output, **fields):
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 24}
    return tiny_recipe(models, output, **{"samples": {"every": 2, "count": 2}, "call": call, "rollout": {}, **fields})


def silent(metrics, steps):
    """A report that keeps quiet."""


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "student"
    seen = []
    student = merge(recipe(models, output), lambda metrics, steps: seen.append((metrics.step, steps)))
    return output, student, seen


def test_everything_is_written(done):
    output, student, seen = done
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert student.folder == output and student.steps == 4
    for name in ("recipe.yaml", "README.md", WEIGHTS, "metrics.jsonl", "finished.json"):
        assert (output / name).is_file(), name
    assert [p.name for p in sorted((output / "samples").iterdir())] == [f"step-{i:06d}.png" for i in (0, 2, 4)]
    assert Image.open(output / "samples" / "step-000004.png").size[0] > 128
    lines = json_lines(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and "validation" in lines[0]
    for line in lines[1:]:
        assert line["loss/generation"] > 0 and line["loss/editing"] > 0 and line["grad_norm"] > 0
        queries = {key: line[key] for key in line if key.startswith("query/sigma ")}
        assert len(queries) == 10 and sum(queries.values()) == pytest.approx(1, abs=1e-5)
        errors = [key for key in line if key.startswith("error/sigma ")]
        assert 1 <= len(errors) <= 4 and all(line[key] > 0 for key in errors)
    assert any((output / "logs").iterdir())
    assert "guidance_scale=1.0" in (output / "README.md").read_text()


def test_stock_diffusers_draws_what_the_student_draws(done, models):
    """The three lines of the model card, with and without a source image; not the base's pictures."""
    output, student, _ = done
    stock = DiffusionPipeline.from_pretrained(models / "base")
    base = DiffusionPipeline.from_pretrained(models / "base")
    stock.load_lora_weights(str(output))
    ours = student.pipeline()
    source = Image.new("RGB", (64, 64), (200, 80, 40))
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 24, "output_type": "np"}
    for extra in ({}, {"image": source}):
        pictures = []
        for pipe in (stock, ours, base):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(5)
            made = pipe(prompt="a red circle", generator=generator, guidance_scale=1.0, **extra, **call)
            pictures.append(made.images)
        assert (pictures[0] == pictures[1]).all()
        assert (pictures[0] != pictures[2]).any()


def test_same_seed_same_bytes(done, models, tmp_path, caplog):
    output, _, _ = done
    merge(recipe(models, tmp_path / "again"), silent)
    assert "data.editing is the built-in synthetic scenes" in caplog.text  # on a base that is not the shipped one
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (output / WEIGHTS).read_bytes()
    merge(recipe(models, tmp_path / "other", seed=1), silent)
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (output / WEIGHTS).read_bytes()


def test_interrupted_run_continues_to_the_same_bytes(done, models, tmp_path):
    run(recipe(models, tmp_path / "run"), kill=3)
    assert not (tmp_path / "run" / WEIGHTS).exists()
    assert run(recipe(models, tmp_path / "run")) == [3, 4]  # the checkpoint after step 2 is the last whole one
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (done[0] / WEIGHTS).read_bytes()
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_finished_run_is_left_alone(done, models):
    output, _, _ = done
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    called = []
    merge(recipe(models, output), lambda *a: called.append(a))
    assert not called
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")} == before


def test_another_run_in_the_folder_is_refused(done, models):
    before = (done[0] / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="holds another run .*optimizer.lr"):
        merge(recipe(models, done[0], optimizer={"lr": 0.5}), silent)
    assert (done[0] / WEIGHTS).read_bytes() == before


def test_foreign_adapter_is_refused_before_anything_is_written(models, tmp_path):
    pipe = tiny_klein()
    wrong = random_adapter(pipe.transformer, seed=7)
    a, b = wrong.tensors.popitem()[1]
    wrong.tensors["transformer_blocks.9.attn.to_q"] = (a, b)
    write_adapter(wrong, tmp_path / "foreign")
    with pytest.raises(UserError, match="transformer_blocks.9.attn.to_q"):
        merge(recipe(models, tmp_path / "run", editing=str(tmp_path / "foreign")), silent)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_would_be_cut_is_named_and_the_mended_run_may_start(models, tmp_path):
    words, output = tmp_path / "words.txt", tmp_path / "out"
    words.write_text("\n".join(["a red circle", "a star " * 30] * 12))
    fields = {"data": {"rows": 24, "generation": str(words)}, "validation": {"every": 0}}
    with pytest.raises(UserError, match=r"words.txt, line \d*[02468] has 65 tokens and would be cut at 24"):
        merge(recipe(models, output, **fields), silent)
    words.write_text("\n".join(["a red circle", "a star"] * 12))
    fields["student"] = {"rank": 12}  # and something else is changed, too
    assert merge(recipe(models, output, **fields), silent).steps == 4


def test_init_is_where_the_student_starts(models, tmp_path):
    """With no learning to speak of, a student initialised as a teacher exports that teacher."""
    fields = {"steps": 1, "optimizer": {"lr": 1e-12}, "student": {"rank": 8, "init": "editing"}}
    merge(recipe(models, tmp_path / "run", **fields), silent)
    got, want = read_adapter(tmp_path / "run"), read_adapter(models / "edits")
    for module in want.tensors:
        torch.testing.assert_close(got.delta(module), want.delta(module), atol=1e-6, rtol=0)


def test_blend_is_the_default_init(models, tmp_path):
    fields = {"steps": 1, "optimizer": {"lr": 1e-12}}
    merge(recipe(models, tmp_path / "run", **fields), silent)
    got = read_adapter(tmp_path / "run")
    parts = [read_adapter(models / name) for name in ("draws", "edits")]
    for module in got.tensors:
        mean = 0.5 * parts[0].delta(module) + 0.5 * parts[1].delta(module)
        torch.testing.assert_close(got.delta(module), mean, atol=1e-5, rtol=0)


TWO_STEPS = {
    "steps": 2, "save_every": 1, "optimizer": {"lr": 1e-3, "warmup": 1}, "samples": {"every": 0, "count": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def fp32(models, tmp_path_factory):
    """A run of two steps in fp32."""
    merge(recipe(models, output := tmp_path_factory.mktemp("fp32") / "run", **TWO_STEPS), silent)
    return output


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_half_precision_backbone_with_all_that_saves_memory(models, fp32, tmp_path, dtype):
    """The student stays fp32, and is proven through the stock pipeline in that dtype; it is near the fp32 one."""
    seen = []
    half = recipe(
        models, tmp_path / dtype, dtype=dtype, gradient_checkpointing=True, micro_batch=1, keep_last=1, **TWO_STEPS
    )
    merge(half, lambda metrics, steps: seen.append(metrics))
    found, wanted = (read_adapter(folder) for folder in (tmp_path / dtype, fp32))
    assert all(t.dtype == torch.float32 for pair in found.tensors.values() for t in pair)
    assert not any(metrics.skipped for metrics in seen) and (dtype == "fp16") == (seen[0].loss_scale is not None)
    lines = json_lines(fp32 / "metrics.jsonl")[1:]
    rounding = {"bf16": 0.5, "fp16": 0.1}[dtype]  # the teachers are near the student, so bf16's own noise is seen
    assert [metrics.loss for metrics in seen] == pytest.approx([line["loss"] for line in lines], rel=rounding)
    assert [p.name for p in (tmp_path / dtype / "checkpoints").iterdir()] == ["step-000002"]
    near = sum((found.delta(m) - wanted.delta(m)).square().sum() for m in wanted.tensors)
    assert near < 0.01 * sum(wanted.delta(m).square().sum() for m in wanted.tensors)


def test_damaged_checkpoint_falls_back(done, models, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"cut")
    assert run(recipe(models, tmp_path / "run", steps=4)) == [3, 4]


def test_continued_run_encodes_nothing_anew(done, models, tmp_path, monkeypatch):
    """What a run encoded is kept: continuing it never asks the text encoder or the VAE's encoder again."""
    run(recipe(models, tmp_path / "run"), kill=1)

    def refused(*arguments):
        raise AssertionError("a row was encoded again")

    monkeypatch.setattr("danceopd.data.encode.Encoder._encode", refused)
    merge(recipe(models, tmp_path / "run"), silent)


def test_the_transformer_goes_to_the_device_when_the_encoders_have_left(models, tmp_path, monkeypatch):
    """So the two are never there together."""

    def stop(metrics, steps):
        raise Killed

    def noted(name, done, size=lambda self: None):
        def instead(self, *arguments, **more):
            happened.append((name, size(self)))
            return done(self, *arguments, **more)

        return instead

    def weights(module):
        return sum(p.numel() for p in module.parameters())

    happened = []
    whole = weights(tiny_klein().transformer)
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "cache"))
    to, moved = DiffusionPipeline.to, Flux2Transformer2DModel.to
    monkeypatch.setattr(DiffusionPipeline, "to", noted("to device", to, lambda pipe: weights(pipe.transformer)))
    monkeypatch.setattr(sys.modules["danceopd.merge"], "free_encoders", noted("encoders leave", free_encoders))
    monkeypatch.setattr("danceopd.data.encode.Encoder._encode", noted("encode", Encoder._encode))
    monkeypatch.setattr(Flux2Transformer2DModel, "to", noted("transformer", moved, weights))
    monkeypatch.setattr(AutoencoderKLFlux2, "to", noted("VAE", AutoencoderKLFlux2.to))
    with pytest.raises(Killed):
        merge(recipe(models, tmp_path / "run"), stop)
    began = happened.index(("to device", 0))  # its transformer holds nothing
    left = happened.index(("encoders leave", None))
    assert ("encode", None) in happened[began:left]
    assert not [size for name, size in happened[began:left] if name == "transformer" and size]
    assert happened[left + 1] == ("VAE", None)  # it leaves the device until there are pictures to decode
    later = [one for one in happened[left:] if one[0] == "transformer"]
    assert later[0][1] > whole  # with its adapters


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"rollout": {"cuda_graphs": True}}, {"enabled"}),
        ({"compile": True}, {"compiled"}),
        ({"rollout": {"cache_source": True}}, {"source_cached"}),
    ],
)
def test_the_recipe_says_how_rollouts_are_captured(models, tmp_path, monkeypatch, caplog, fields, flags):
    """A graph is what the recipe asks for, and a processor has none."""
    module, seen = sys.modules["danceopd.merge"], {}

    def noted(field, device, **given):
        seen.update(given)
        with_cuda_graphs(field, torch.device("cpu"), **given)
        raise Killed

    monkeypatch.setattr(module, "with_cuda_graphs", noted)
    # FLUX.2 klein cannot keep its source
    monkeypatch.setattr("danceopd.planning.outline.check_source_cache", lambda family: None)
    quick = {"validation": {"every": 0}, "samples": {"every": 0, "count": 1}, "device": "cpu"}
    with pytest.raises(Killed):
        merge(recipe(models, tmp_path / "run", **quick, **fields), silent)
    assert {name for name, on in seen.items() if on} == flags <= set(seen) and len(seen) == 3
    assert ("eager rollouts, because cpu has no CUDA graphs" in caplog.text) == ("enabled" in flags)


def test_fused_run_folder_loads_alone(done, models, tmp_path):
    """`--fuse`: the run folder is a pipeline whose pictures are the student's, and still a LoRA."""
    from danceopd.adapters.fuse import fuse_in_place

    folder = tmp_path / "student"
    shutil.copytree(done[0], folder)
    fuse_in_place(folder)
    fused = DiffusionPipeline.from_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(models / "base")
    stock.load_lora_weights(str(folder), weight_name=WEIGHTS)
    pictures = []
    for pipe in (fused, stock):
        pipe.set_progress_bar_config(disable=True)
        call = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 24, "output_type": "np"}
        made = pipe(prompt="a red circle", generator=torch.Generator().manual_seed(1), guidance_scale=1.0, **call)
        pictures.append(torch.from_numpy(made.images))
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=0)
    assert fuse_in_place(folder) == folder
    assert (folder / "recipe.yaml").read_bytes() == (done[0] / "recipe.yaml").read_bytes()
