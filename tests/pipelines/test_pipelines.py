"""Recorded conditions, schedule, noise, velocities and pictures against the stock pipeline itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CALL, random_adapter, random_image, tiny_klein
from tiny_parts import calls_of, close

from danceopd.adapters.load import load_lora
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import BaseField, GuidedField
from danceopd.pipelines import Condition, EditingPipeline, GenerationPipeline, family_of, record, stack
from danceopd.pipelines.condition import joined_layers, split_layers
from danceopd.pipelines.generation import euler
from danceopd.pipelines.record import empty_module
from danceopd.run.card import load_snippet

PROMPTS = ["a red circle", "two blue square on the left", "a white ring above a yellow star"]
EDITS = ["make the circle red", "remove the star", "change the background to blue"]
STOCK = {"num_inference_steps": 6, "height": 64, "width": 64, "max_sequence_length": 24, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_klein()


@pytest.fixture(scope="module")
def field(pipe):
    return BaseField(Backbone(pipe.transformer, family_of(pipe)))


@pytest.fixture(scope="module")
def draw(pipe):
    return GenerationPipeline(pipe, family_of(pipe), CALL)


@pytest.fixture(scope="module")
def edit(pipe):
    return EditingPipeline(pipe, family_of(pipe), CALL)


class Scheduler:
    """Spies on what the stock pipeline hands to `scheduler.step`: (velocity, latents) of every step."""

    def __init__(self, pipe, monkeypatch):
        self.steps, stock = [], pipe.scheduler.step

        def step(velocity, t, x, **kwargs):
            self.steps.append((velocity.clone(), x.clone()))
            return stock(velocity, t, x, **kwargs)

        monkeypatch.setattr(pipe.scheduler, "step", step)


def stock_run(pipe, seed, output_type="pil", **call):
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**STOCK, **call}, generator=generator, output_type=output_type).images


@pytest.mark.parametrize("source", [None, 3])
def test_rollout_and_picture_equal_the_stock_pipeline(pipe, field, draw, edit, monkeypatch, source):
    image = None if source is None else random_image(source)
    ours = draw if image is None else edit
    condition = draw.conditions(PROMPTS[:1]) if image is None else edit.conditions(EDITS[:1], [image])
    prompt = PROMPTS[0] if image is None else EDITS[0]
    spy = Scheduler(pipe, monkeypatch)
    picture = stock_run(pipe, 11, prompt=prompt, image=image)[0]
    states = list(ours.denoise(condition, ours.noise([11]), field))
    assert [s.step for s in states] == list(range(7)) and states[-1].sigma == 0 and states[-1].velocity is None
    assert len(spy.steps) == 6
    for state, (velocity, x) in zip(states, spy.steps, strict=False):
        close(state.x, x)
        close(state.velocity, velocity)
    assert np.array_equal(np.asarray(ours.images(states[-1].x)[0]), np.asarray(picture))
    assert np.asarray(picture).std() > 1  # a flat picture would equal anything


def test_euler_that_is_stopped_early_calls_the_field_no_further(field, draw):
    levels = []

    def counted(x, sigma, condition):
        levels.append(float(sigma[0]))
        return field(x, sigma, condition)

    condition, sigmas = draw.conditions(PROMPTS[:2]), draw.sigmas()
    whole = list(draw.denoise(condition, draw.noise([1, 2]), field))
    for state in euler(counted, draw.noise([1, 2]), sigmas, condition):
        if state.step == 2:
            break
    assert torch.equal(state.x, whole[2].x) and torch.equal(state.velocity, whole[2].velocity)
    assert levels == sigmas[:3].tolist() and not state.x.requires_grad


def test_prompts_seeds_and_sources_matter(field, draw, edit):
    """Without this, the equalities above would hold for a pipeline that ignores its inputs."""
    x, sigma = draw.noise([1]), torch.tensor([0.7])
    answers = [field(x, sigma, draw.conditions([p])) for p in PROMPTS]
    answers += [field(x, sigma, edit.conditions(EDITS[:1], [random_image(i)])) for i in (0, 1)]
    gaps = [(a - b).abs().max().item() for i, a in enumerate(answers) for b in answers[:i]]
    assert min(gaps) > 1e-2
    assert (draw.noise([1]) - draw.noise([2])).abs().max() > 0.5


def test_batch_of_different_rows_equals_its_rows(field, edit, draw):
    images = [random_image(i) for i in range(3)]
    sigma, x = torch.tensor([0.95, 0.5, 0.1]), edit.noise([5, 6, 7])
    for batch, single in [
        (edit.conditions(EDITS, images), lambda i: edit.conditions([EDITS[i]], [images[i]])),
        (draw.conditions(PROMPTS), lambda i: draw.conditions([PROMPTS[i]])),
    ]:
        together = field(x, sigma, batch)
        for i in range(3):
            close(together[i : i + 1], field(x[i : i + 1], sigma[i : i + 1], single(i)))
            close(together[i : i + 1], field(x[i : i + 1], sigma[i : i + 1], batch.rows([i])))


def test_batched_conditions_equal_one_by_one_stock_recordings(pipe, edit):
    small = GenerationPipeline(pipe, family_of(pipe), CALL, chunk=2)
    images = [random_image(i) for i in range(3)]
    for batch, single in [
        (small.conditions(PROMPTS), [{"prompt": p} for p in PROMPTS]),
        (edit.conditions(EDITS, images), [{"prompt": p, "image": i} for p, i in zip(EDITS, images, strict=True)]),
    ]:
        assert len(batch) == 3
        for i, call in enumerate(single):
            stock = calls_of(pipe.transformer, partial(pipe, **{**STOCK, **call}, output_type="latent"))[0]
            one = batch.rows(slice(i, i + 1))
            for key, value in one.kwargs.items():
                assert (value is None) == (stock[key] is None)
                if value is not None:
                    close(value, stock[key])
            n = one.shape[0]
            assert (one.context is None) == ("image" not in call)
            if one.context is not None:
                assert torch.equal(one.context, stock["hidden_states"][:, n:])
            assert set(one.kwargs) == set(stock) - {
                "hidden_states", "timestep", "return_dict", "joint_attention_kwargs"
            }  # fmt: skip


def test_noise_and_schedule_are_the_stock_pipelines(pipe, draw, edit, monkeypatch):
    spy = Scheduler(pipe, monkeypatch)
    for seed in (3, 4):
        stock_run(pipe, seed, prompt=PROMPTS[0])
    assert torch.equal(draw.noise([3, 4]), torch.cat([spy.steps[0][1], spy.steps[6][1]]))
    assert torch.equal(edit.noise([3, 4]), draw.noise([3, 4]))
    assert draw.sigmas().dtype == torch.float32 and draw.sigmas()[-1] == 0
    assert torch.equal(draw.sigmas(), pipe.scheduler.sigmas)


def test_noise_and_schedule_need_no_text_encoder(pipe, draw):
    from diffusers import Flux2KleinPipeline

    parts = {k: v for k, v in pipe.components.items() if k not in ("text_encoder", "tokenizer")}
    bare = GenerationPipeline(Flux2KleinPipeline(**parts, text_encoder=None, tokenizer=None), draw.family, CALL)
    assert torch.equal(bare.noise([8, 9]), draw.noise([8, 9])) and torch.equal(bare.sigmas(), draw.sigmas())


def test_guided_field_is_the_stock_guidance(pipe, field, draw, edit, monkeypatch):
    null = stack([record(pipe, draw.family, prompt="", max_sequence_length=24, height=64, width=64)[0]])
    for call, condition in [
        ({"prompt": PROMPTS[0]}, draw.conditions(PROMPTS[:1])),
        ({"prompt": EDITS[0], "image": random_image(2)}, edit.conditions(EDITS[:1], [random_image(2)])),
    ]:
        spy = Scheduler(pipe, monkeypatch)
        stock_run(pipe, 1, **call, guidance_scale=4.0)
        guided = GuidedField(field, null, 4.0)
        for sigma, (velocity, x) in zip(draw.sigmas(), spy.steps, strict=False):
            close(guided(x, sigma.expand(1), condition), velocity, 2e-5)
    two = draw.conditions(PROMPTS[:2])
    assert GuidedField(field, null, 1.0)(draw.noise([1, 2]), torch.tensor([0.5, 0.9]), two).shape == (2, 16, 32)


def test_pictures_decode_in_chunks(pipe, draw):
    x = draw.noise(list(range(5)))
    draw_small = GenerationPipeline(pipe, draw.family, CALL, chunk=2)
    for together, apart in zip(draw_small.images(x), (draw.images(row[None])[0] for row in x), strict=True):
        assert np.abs(np.asarray(together, int) - np.asarray(apart, int)).max() <= 1


def test_recording_leaves_no_trace(pipe, draw):
    transformer, bar = pipe.transformer, dict(pipe._progress_bar_config)
    before = stock_run(pipe, 2, prompt=PROMPTS[0], output_type="np")
    schedule, state = pipe.scheduler.sigmas.clone(), torch.random.get_rng_state()
    record(pipe, draw.family, prompt="a star", height=64, width=64, num_inference_steps=3)
    with pytest.raises(UserError, match=r"Flux2KleinPipeline refuses this call \(.*prompt"):
        record(pipe, draw.family, height=64, width=64)  # the stock pipeline's own refusal
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(pipe.scheduler.sigmas, schedule)
    assert pipe.transformer is transformer and not transformer._forward_pre_hooks
    assert pipe._progress_bar_config == bar and pipe.text_encoder is not None
    assert np.array_equal(stock_run(pipe, 2, prompt=PROMPTS[0], output_type="np"), before)


def test_a_saved_pipeline_records_the_same(tmp_path, pipe, draw):
    from diffusers import DiffusionPipeline

    tiny_klein(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert family_of(tmp_path) is family_of(loaded) is draw.family
    again = GenerationPipeline(loaded, draw.family, CALL).conditions(PROMPTS)
    close(again.kwargs["encoder_hidden_states"], draw.conditions(PROMPTS).kwargs["encoder_hidden_states"], 1e-6)


def test_condition_rows_stack_and_state(tmp_path, edit, draw):
    condition = edit.conditions(EDITS, [random_image(i) for i in range(3)])
    turned = stack([condition.rows([2]), condition.rows(torch.tensor([0, 1]))])
    assert turned.layout == condition.layout and hash(condition.layout) and len(turned) == 3
    assert torch.equal(turned.context, condition.context[[2, 0, 1]])
    save_file(condition.state(), tmp_path / "c.safetensors")
    loaded = Condition.from_state(load_file(tmp_path / "c.safetensors"))
    assert loaded.layout == condition.layout and loaded.kwargs.keys() == condition.kwargs.keys()
    assert all(v is None or torch.equal(v, condition.kwargs[k]) for k, v in loaded.kwargs.items())
    assert torch.equal(loaded.context, condition.context) and len(draw.conditions(PROMPTS).to("cpu")) == 3
    plain = draw.conditions(PROMPTS)
    assert Condition.from_state(plain.state()).layout == plain.layout != condition.layout


def test_stack_refuses_unequal_layouts(edit, draw):
    square, plain = edit.conditions(EDITS[:1], [random_image(0)]), draw.conditions(PROMPTS[:1])
    wide, tall = (edit.conditions(EDITS[:1], [random_image(0, *size)]) for size in [(128, 64), (64, 128)])
    for other in (plain, wide):
        with pytest.raises(UserError, match="cannot share a batch"):
            stack([square, other])
    assert wide.context.shape == tall.context.shape
    with pytest.raises(UserError, match="img_ids has other positions"):
        stack([wide, tall])


def test_a_list_of_prompt_states_is_one_tensor_that_holds_each_once():
    layers = [torch.randn(2, 3, 4) for _ in range(3)]
    given = [*layers, layers[-1], layers[-1], layers[0]]
    joined, places = joined_layers(given)
    assert joined.shape == (2, 3, 3, 4) and places == [0, 1, 2, 2, 2, 0]
    assert all(torch.equal(a, b) for a, b in zip(split_layers(joined, places), given, strict=True))


def test_a_pipeline_without_a_lora_loader_loads_through_its_transformer(pipe, tmp_path):
    alone = SimpleNamespace(transformer=tiny_klein().transformer)
    adapter = random_adapter(alone.transformer)
    load_lora(alone, write_adapter(adapter, tmp_path), adapter)
    assert family_of(pipe).loads_loras and "load_lora_weights" in load_snippet("base", family=family_of(pipe))
    bare = replace(family_of(pipe), generation="LongCatImagePipeline", editing=None)
    code = load_snippet("base", family=bare)
    assert 'pipe.transformer.load_lora_adapter("path/to/this/folder", weight_name="' in code and "edited" not in code


def test_a_stand_in_for_a_transformer_has_its_number_of_blocks(pipe):
    empty = empty_module(pipe.transformer, torch.empty(0))
    assert len(empty.transformer_blocks) == len(pipe.transformer.transformer_blocks) == 2
    assert len(list(empty.parameters())) == 1 and len(list(pipe.transformer.transformer_blocks[0].parameters())) > 1


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "no prompt"),
        (["a star", "  "], "prompt 2 of 2 is empty"),
        (["a star " * 30], "prompt 1 of 1 has 65 tokens and would be cut at 24"),
    ],
)
def test_bad_prompts(draw, edit, prompts, sentence):
    with pytest.raises(UserError, match=sentence):
        draw.conditions(prompts)
    with pytest.raises(UserError, match=sentence):
        edit.conditions(prompts, [random_image(0)] * len(prompts))


def test_a_tokenizer_without_a_chat_template_is_named(pipe, draw, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="the tokenizer reads no prompt .*chat"):
        draw.conditions(["a star"])


def test_a_prompt_that_just_fits_is_not_cut(pipe, draw):
    fits, cut = " ".join(["star"] * 19), " ".join(["star"] * 20)  # the chat template adds 5
    draw.conditions([fits])
    with pytest.raises(UserError, match="25 tokens"):
        draw.conditions([cut])
    longest = GenerationPipeline(pipe, draw.family, {**CALL, "max_sequence_length": 40}).conditions([fits])
    states = draw.conditions([fits]).kwargs["encoder_hidden_states"]
    close(longest.kwargs["encoder_hidden_states"][:, :24], states)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (random_image(0).convert("RGBA"), "source image 1 of 1 has an alpha channel"),
        (random_image(0).convert("LA"), "alpha channel"),
        (random_image(0, 64, 56), "64x56 pixels; give one with at least 64"),
        (random_image(0, 1024, 64), "at most 8 times"),
        (np.zeros((64, 64, 3), np.uint8), "not a PIL image"),
    ],
)
def test_bad_sources(edit, image, sentence):
    with pytest.raises(UserError, match=sentence):
        edit.conditions(["make it red"], [image])


def test_transparent_palette_and_counts(edit):
    image = random_image(0).convert("P")
    image.info["transparency"] = 0
    with pytest.raises(UserError, match="alpha"):
        edit.conditions(["make it red"], [image])
    with pytest.raises(UserError, match="2 prompts and 1 source"):
        edit.conditions(["make it red"] * 2, [Image.new("RGB", (64, 64))])


def test_bad_families_and_calls(tmp_path, pipe):
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        family_of(tmp_path)
    for name, family in (("Flux2KleinPipelin", "flux2-klein"), ("QwenImageLayeredPipeline", "qwen-image"), ("X", "")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        said = rf"is a {name}, which danceopd does not know; the nearest family is {family}.*bring-your-own-model\.md"
        with pytest.raises(UserError, match=said):
            family_of(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(UserError, match="not a diffusers pipeline"):
            family_of(str(tmp_path))
    with pytest.raises(UserError, match="steps is 0"):
        GenerationPipeline(pipe, family_of(pipe), {**CALL, "steps": 0})


def test_conditions_cost_no_more_than_their_encoders(pipe, edit, monkeypatch):
    """One text encoding a chunk, one image encoding a row, and not a single transformer block."""
    calls = []

    def count(name):
        part = {"text": pipe.text_encoder.model, "image": pipe.vae.encoder, "block": pipe.transformer.x_embedder}[name]
        return part.register_forward_pre_hook(lambda *_: calls.append(name))

    hooks = [count(name) for name in ("text", "image", "block")]
    edit.conditions(EDITS * 5, [random_image(i) for i in range(15)])
    edit.noise([1, 2])
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["image"] * 15 + ["text"]


def test_a_vae_that_is_kept_elsewhere_decodes_on_the_device_of_the_latents(pipe):
    vae, seen = SimpleNamespace(device="cpu"), []
    vae.to = lambda device: setattr(vae, "device", device)

    def decode(pipe, x, height, width):
        seen.append(pipe.vae.device)
        return [None] * len(x) if len(seen) < 3 else 1 / 0

    family = replace(family_of(pipe), decode=decode)
    pipeline = GenerationPipeline(SimpleNamespace(vae=vae, vae_scale_factor=8), family, CALL, chunk=1)
    x = torch.empty(2, 16, 32, device="meta")
    assert len(pipeline.images(x)) == 2 and seen == [x.device] * 2 and vae.device == "cpu"
    with pytest.raises(ZeroDivisionError):
        pipeline.images(x)
    assert vae.device == "cpu"
