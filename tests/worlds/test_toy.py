"""Training of the shipped model: the autoencoder's code, the batches, both trainings, and resuming."""

import functools
import hashlib
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from danceopd.adapters.read import read_adapter
from danceopd.common.files import sha256
from danceopd.errors import UserError
from danceopd.worlds.scenes.edits import TASKS, edits
from danceopd.worlds.scenes.grammar import HELDOUT_OPERATIONS, has_heldout_binding
from danceopd.worlds.scenes.prompts import TAGS, prompts
from danceopd.worlds.scenes.render import render
from danceopd.worlds.toy import autoencoder, decoder
from danceopd.worlds.toy import codes as cell_table
from danceopd.worlds.toy.autoencoder import fit_encoder, make_autoencoder
from danceopd.worlds.toy.batches import Batches, Mix
from danceopd.worlds.toy.codes import CellTable
from danceopd.worlds.toy.decoder import CellPictures, unpack
from danceopd.worlds.toy.effects import EFFECTS
from danceopd.worlds.toy.flow import LoraTransformer, Schedule, loss_of, velocity
from danceopd.worlds.toy.small import CALL, make_pipeline, make_tokenizer, make_transformer, vocabulary
from danceopd.worlds.toy.stages import STAGES, teach


@pytest.fixture(scope="module", autouse=True)
def cells_once():
    """Every picture of all cells is drawn once, and encoded once by each encoder: that was most of this file's time."""
    pictures, codes = functools.cache(autoencoder.all_cells), {}

    def encoded(vae, images, encode=autoencoder.cell_codes):
        weights = (*vae.encoder.state_dict().values(), images)
        key = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights)).digest()
        if key not in codes:
            codes[key] = encode(vae, images)
        return codes[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (autoencoder, cell_table, decoder):
            patch.setattr(module, "all_cells", pictures)
        for module in (autoencoder, cell_table):
            patch.setattr(module, "cell_codes", encoded)
        yield


@pytest.fixture(scope="module")
def parts():
    vae = make_autoencoder().eval()
    fit_encoder(vae)
    pipe = make_pipeline(vae, make_transformer())
    return pipe, CellTable(vae)


def normalised(pipe, scenes):
    """What the stock pipeline hands to the transformer for these pictures: (n, 16, C)."""
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    packed = [pipe._pack_latents(pipe._encode_vae_image(i[None], None)) for i in images]
    return torch.cat(packed)


def test_code_is_cell_local(parts):
    """Looking cells up equals encoding the picture with the stock pipeline's own functions."""
    pipe, table = parts
    scenes = [e.target for e in edits("train", 60, 3)]
    with torch.no_grad():
        error = (table.encode(scenes) - normalised(pipe, scenes)).abs().max()
    assert error < 5e-3  # of a spread of 1


def test_code_tells_every_scene_apart(parts):
    _, table = parts
    scenes = [p.scene for p in prompts("val", 120, 1)] + [e.source for e in edits("val", 60, 1)]
    for scene, got in zip(scenes, table.read(table.encode(scenes))):
        assert got.key() == scene.key()


def test_unpack_is_the_pipelines(parts):
    pipe, table = parts
    tokens = table.encode([p.scene for p in prompts("train", 3, 0)])
    ids = pipe._prepare_latent_ids(torch.zeros(3, 1, 4, 4))
    spread = pipe._unpack_latents_with_ids(tokens, ids, 4, 4)
    scale = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    raw = pipe._unpatchify_latents(spread * scale + pipe.vae.bn.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(unpack(pipe.vae, tokens), raw)


def test_cell_pictures_are_pictures_of_their_tokens(parts):
    """The decoder's targets, put together from tiles, encode to their own tokens."""
    pipe, _ = parts
    pictures = CellPictures(pipe.vae, 4, 0)
    tokens, images, weights = pictures(5)
    assert weights.shape == (4, 1, 64, 64) and weights.min() >= 1 and weights.max() > 4
    with torch.no_grad():
        encoded = torch.cat([pipe._pack_latents(pipe._encode_vae_image(i[None], None)) for i in images])
    assert (encoded - tokens).square().mean().sqrt() < 0.11  # the noise that was added
    again, *_ = CellPictures(pipe.vae, 4, 0)(5)
    assert torch.equal(again, tokens)


def test_velocity_is_the_pipelines_call(parts):
    """Position ids and text as the stock pipeline passes them: the same velocity, with a source and without."""
    from PIL import Image

    from danceopd.pipelines.editing import EditingPipeline
    from danceopd.pipelines.registry import FAMILIES

    pipe, table = parts
    family = FAMILIES["flux2-klein"]
    edit = edits("train", 1, 2)[0]
    call = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": CALL["max_sequence_length"]}
    condition = EditingPipeline(pipe, family, call).conditions(
        [edit.instruction], [Image.fromarray(render(edit.source))]
    )
    text = Batches(pipe, table, Mix({}, {}, 0.0), 1, 0).text([edit.instruction])
    x, sigma = torch.randn(1, 16, 64), torch.tensor([0.7])
    with torch.no_grad():
        stock = family.velocity(pipe.transformer, x, sigma, condition)
        ours = velocity(pipe.transformer, x, sigma, text, table.encode([edit.source]))
    torch.testing.assert_close(ours, stock, atol=2e-3, rtol=0)


def test_every_instruction_fits_the_tokenizer():
    tokenizer, known = make_tokenizer(), set(vocabulary())
    assert len(known) <= 64
    texts = [p.prompt for p in prompts("train", 600, 0)] + [e.instruction for e in edits("train", 600, 0)]
    texts += [e.instruction for e in edits("test", 100, 0, tasks=("compound",))]
    texts += [p.prompt for p in prompts("test", 6, 0, tags=("counting-five",))]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in tokens, text
        assert 0 < len(tokens) <= CALL["max_sequence_length"], text


def test_batches_repeat_and_hold_nothing_out(parts):
    pipe, table = parts
    drawn = []
    for seed in (0, 0, 1):
        batches = Batches(pipe, table, Mix(dict.fromkeys(TAGS, 1), dict.fromkeys(TASKS, 1), 0.5), 8, seed)
        drawn.append([batches(step) for step in range(6)])
    assert all(torch.equal(a.clean, b.clean) and torch.equal(a.text, b.text) for a, b in zip(drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0].clean, drawn[2][0].clean)
    assert {b.source is None for b in drawn[0]} == {True, False}
    for batch in drawn[0]:
        for tokens in (batch.clean, batch.source):
            for scene in table.read(tokens) if tokens is not None else ():
                assert scene.split() == "train" and not has_heldout_binding(scene)
    for edit in edits("train", 400, 9):
        new = {t.shape for t in edit.target.things} - {t.shape for t in edit.source.things}
        assert not any((edit.task_type, shape) in HELDOUT_OPERATIONS for shape in new)


def test_guidance_moves_the_target_away_from_no_prompt(parts):
    """Where the model answers the prompt as it answers none, guidance changes nothing; else it does."""
    pipe, table = parts
    batch = Batches(pipe, table, Mix(dict.fromkeys(TAGS, 1), {}, 1.0), 8, 0, drop=0.0)(0)
    torch.manual_seed(0)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.02)
    plain = loss_of(pipe.transformer, batch, torch.Generator().manual_seed(1), Schedule(1))
    guided = loss_of(pipe.transformer, batch, torch.Generator().manual_seed(1), Schedule(1, guidance=3.0))
    assert plain != guided
    batch.text = batch.empty.expand_as(batch.text).clone()
    plain = loss_of(pipe.transformer, batch, torch.Generator().manual_seed(1), Schedule(1))
    guided = loss_of(pipe.transformer, batch, torch.Generator().manual_seed(1), Schedule(1, guidance=3.0))
    assert plain == guided


def test_schedule_falls_to_zero():
    schedule = Schedule(100, warmup=10, decay=0.5)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(30) == schedule.factor(49) == 1
    assert schedule.factor(75) == pytest.approx(0.5)
    assert schedule.factor(99) == pytest.approx(0.02)


def test_lora_transformer_is_the_base_at_first_and_trains_only_its_factors(parts):
    pipe, table = parts
    model = LoraTransformer(pipe.transformer, ["transformer_blocks.0.attn.to_q"], 4, 0)
    batch = Batches(pipe, table, Mix(dict.fromkeys(TAGS, 1), {}, 1.0), 2, 0)(0)
    x, sigma = torch.randn(2, 16, 64), torch.rand(2)
    bare = velocity(pipe.transformer, x, sigma, batch.text, None)
    assert torch.equal(velocity(model, x, sigma, batch.text, None), bare)
    loss_of(model, batch, torch.Generator().manual_seed(0), Schedule(1)).backward()
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert model.factors["transformer_blocks.0.attn.to_q.lora_B"].grad.abs().max() > 0
    pipe.transformer.requires_grad_(True)


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effects_teacher_sees_its_one_task_alone(parts, name):
    effect, stage = EFFECTS[name], STAGES[name]
    batches, rng = Batches(*parts, stage.mix, 2, 0), random.Random(0)
    tag, _, goal = effect.task.partition("=")
    for _ in range(3):
        if effect.capability == "generation":
            assert batches._prompt(rng).tag == tag and stage.mix.generation == 1
        else:
            edit = batches._edit(rng)
            assert edit.task_type == tag and stage.mix.generation == 0
            assert not goal or edit.goal in ({"background": goal}, {"style": goal})
    assert (stage.rank, effect.data) == (16, f"scenes:{effect.task}") and len(EFFECTS) == 16


def test_stages_run_and_continue_to_the_same_bytes(tmp_path, monkeypatch):
    """All kinds of stage for a few steps; an interrupted one ends where an uninterrupted one does."""
    from dataclasses import replace

    from danceopd.worlds.toy import stages

    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, replace(stages.STAGES[name], batch=2))
    monkeypatch.setattr("danceopd.worlds.toy.flow.SAVE_EVERY", 2)
    monkeypatch.setattr("danceopd.worlds.toy.decoder.SAVE_EVERY", 2)
    base = teach("base", tmp_path / "base", steps=2)
    teach("autoencoder", base, steps=2)
    whole = teach("editing", tmp_path / "whole", steps=4, base=base)

    class Stop(Exception):
        pass

    def stop(step, steps, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        teach("editing", tmp_path / "cut", steps=4, base=base, report=stop)
    cut = teach("editing", tmp_path / "cut", steps=4, base=base)
    name = "pytorch_lora_weights.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    before = (base / "base.json").read_bytes()
    for stage, folder, how, words in (
        ("editing", cut, {"steps": 4, "seed": 1}, "holds a training with another seed .0 there, 1 here"),
        ("generation", cut, {"steps": 4}, "holds what `danceopd teach generation` has not begun"),
        ("editing", base, {"steps": 4}, "nothing is overwritten; choose another --output"),
    ):
        with pytest.raises(UserError, match=words):
            teach(stage, folder, base=base, **how)
    assert (cut / name).read_bytes() == (whole / name).read_bytes() and (base / "base.json").read_bytes() == before
    adapter = read_adapter(cut)
    assert adapter.rank == 40 and len(adapter) == 32
    at = []
    again = teach("editing", tmp_path / "again", steps=1, base=base, init=cut, report=lambda *step: at.append(step))
    new = read_adapter(again).tensors
    moved = [(a - b).abs().max() for m, pair in adapter.tensors.items() for a, b in zip(pair, new[m])]
    assert all(0 < float(change) < 0.01 for change in moved) and at  # it started there and has made one step
    assert json.loads((again / "editing.json").read_text())["init_sha256"] == sha256(cut / name)
    with pytest.raises(UserError, match="another init_sha256"):
        teach("editing", tmp_path / "again", steps=2, base=base)
    half = {k: (v[:20] if ".lora_A" in k else v[:, :20]).contiguous() for k, v in load_file(cut / name).items()}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="half.safetensors is not of rank 40 in every layer"):
        teach("editing", tmp_path / "other", base=base, init=tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="trains a whole model.*leave --init out"):
        teach("base", tmp_path / "other", init=cut)
    assert not (tmp_path / "other").exists()
    assert {t.dtype for t in load_file(cut / name).values()} == {torch.bfloat16}
    assert (base / "base.json").is_file() and (base / "autoencoder.json").is_file()


def test_bad_stage_and_steps(tmp_path):
    with pytest.raises(UserError, match="no stage is named 'edit'.*editing"):
        teach("edit", tmp_path)
    with pytest.raises(UserError, match="steps is 0"):
        teach("base", tmp_path, steps=0)


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("x")
    steps = []
    with pytest.raises(UserError, match="cannot write .*file"):
        teach("generation", tmp_path / "file", steps=1, report=lambda *step: steps.append(step))
    assert not steps and (tmp_path / "file").read_text() == "x"


def test_what_it_did_not_make_is_never_overwritten(tmp_path):
    for stage, file in (("editing", "a.jpg"), ("base", "model_index.json"), ("base", "base.json")):
        folder = tmp_path / f"{stage}-{file}"
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(UserError, match=f"output folder .*{file} holds what .*nothing is overwritten"):
            teach(stage, folder, steps=1)
        assert [path.name for path in folder.iterdir()] == [file]
    with pytest.raises(UserError, match="nope"):
        teach("editing", tmp_path / "none", steps=1, base="nope")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_signal_saves_and_two_do_not_share_a_folder(tmp_path, monkeypatch):
    import os
    import signal
    from dataclasses import replace

    from danceopd.common.signals import Stopped, raise_on_signals
    from danceopd.worlds.toy import stages

    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    monkeypatch.setitem(stages.STAGES, "editing", replace(stages.STAGES["editing"], batch=2))
    seen = []

    def stop(step, steps, loss):
        seen.append(step)
        with pytest.raises(UserError, match="is in use by another danceopd process"):
            teach("editing", tmp_path / "out", steps=4)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    raise_on_signals()
    try:
        monkeypatch.setattr("danceopd.common.signals.GRACE", 1e6)
        with pytest.raises(Stopped, match="SIGTERM"):
            teach("editing", tmp_path / "out", steps=4, report=stop)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    teach("editing", tmp_path / "out", steps=4, report=lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3, 4]
