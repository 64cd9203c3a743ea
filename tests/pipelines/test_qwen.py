"""Qwen-Image beyond `test_families.py`: masks, source shapes, sizes, the processor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from tiny import random_image
from tiny_parts import calls_of, close
from tiny_qwen import CALL, DIVISOR, PLUS, TINY, editing, save_editing, tiny_qwen

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import BaseField
from danceopd.pipelines import EditingPipeline, GenerationPipeline, editing_pipe, family_of, generation_pipe, stack
from danceopd.pipelines.families.qwen import QWEN_IMAGE

PROMPTS = ["a red circle", "two blue square on the left", "a white ring above"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_qwen()


@pytest.fixture(scope="module")
def draw(pipe):
    return GenerationPipeline(pipe, QWEN_IMAGE, CALL)


@pytest.fixture(scope="module", params=[TINY, PLUS], ids=["edit", "edit-plus"])
def edit(request):
    return EditingPipeline(request.param.editing(request.param.build()), QWEN_IMAGE, CALL)


def test_the_transformer_is_called_as_the_stock_pipeline_calls_it(edit):
    transformer, image = edit.pipe.transformer, random_image(0)
    call = {"num_inference_steps": 4, "height": 64, "width": 64, "true_cfg_scale": 1.0, "output_type": "latent"}
    stock = calls_of(transformer, lambda: edit.pipe(image=image, prompt="make it red", **call))
    condition, sigma = edit.conditions(["make it red"], [image]), edit.sigmas()
    field = BaseField(Backbone(transformer, QWEN_IMAGE))
    for step, theirs in enumerate(stock):
        x = theirs["hidden_states"][:, :16]
        (ours,) = calls_of(transformer, lambda x=x, step=step: field(x, sigma[step].expand(1), condition))
        assert theirs["encoder_hidden_states_mask"] is ours["encoder_hidden_states_mask"] is None
        assert theirs["img_shapes"] == ours["img_shapes"] == [[(1, 4, 4), (1, 4, 4)]]
        for key in ("hidden_states", "timestep", "encoder_hidden_states"):
            close(ours[key], theirs[key], 1e-6)


def test_a_mask_goes_in_only_where_rows_differ_in_length(pipe, draw):
    field = BaseField(Backbone(pipe.transformer, QWEN_IMAGE))
    batch = draw.conditions(PROMPTS)
    lengths = batch.kwargs["encoder_hidden_states_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    x, sigma = draw.noise([1, 2, 3]), torch.full((3,), 0.5)
    (call,) = calls_of(pipe.transformer, lambda: field(x, sigma, batch))
    assert call["encoder_hidden_states_mask"].sum(1).tolist() == lengths
    for i, length in enumerate(lengths):
        (call,) = calls_of(pipe.transformer, lambda i=i: field(x[:1], sigma[:1], batch.rows([i])))
        assert call["encoder_hidden_states_mask"] is None and call["encoder_hidden_states"].shape[1] == length


def test_text_and_source_tokens_each_matter(edit):
    """The source has an effect twice: through the text encoder, and as tokens after the latents."""
    field = BaseField(Backbone(edit.pipe.transformer, QWEN_IMAGE))
    one, other = (edit.conditions(["make it red"], [random_image(i)]) for i in (0, 1))
    x, sigma = edit.noise([1]), torch.tensor([0.6])
    answers = [
        field(x, sigma, c) for c in (one, replace(one, kwargs=other.kwargs), replace(one, context=other.context), other)
    ]
    gaps = [(a - b).abs().max().item() for i, a in enumerate(answers) for b in answers[:i]]
    assert min(gaps) > 1e-3, gaps


def test_zero_cond_t_is_at_work_in_edits_alone():
    """2511 modulates source tokens as at time 0; the same weights without that give another velocity."""
    plain, zero = (tiny_qwen(zero_cond_t=z) for z in (False, True))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.transformer.parameters(), zero.transformer.parameters(), strict=True)
    )
    words = GenerationPipeline(plain, QWEN_IMAGE, CALL).conditions(PROMPTS[:1])
    edits = EditingPipeline(editing(plain), QWEN_IMAGE, CALL).conditions(["make it red"], [random_image(0)])
    x, sigma = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.8])
    fields = [BaseField(Backbone(p.transformer, QWEN_IMAGE)) for p in (plain, zero)]
    drawn, edited = ([field(x, sigma, c) for field in fields] for c in (words, edits))
    close(*drawn)
    assert (edited[0] - edited[1]).abs().max() > 1e-3


def test_sources_of_other_shapes_keep_them_and_do_not_share_a_batch(edit):
    square, wide, tall = (
        edit.conditions(["make it red"], [random_image(0, *size)]) for size in [(64, 64), (128, 64), (64, 128)]
    )
    _, rows, columns = wide.fixed["img_shapes"][1]
    assert rows < columns and tall.fixed["img_shapes"][1] == [1, columns, rows]
    assert wide.context.shape == tall.context.shape
    for other in (wide, tall):
        with pytest.raises(UserError, match="img_shapes is"):
            stack([square, other])
    with pytest.raises(UserError, match="img_shapes is"):
        stack([wide, tall])


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1024, 1024), (100, 700), (1920, 1080)])
def test_the_size_of_an_edit_is_what_the_stock_pipelines_draw(pipe, size):
    stock = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024 * DIVISOR, size[0] / size[1])
    image = Image.new("RGB", size)
    assert QWEN_IMAGE.size_of(pipe, image, {}) == QWEN_IMAGE.size_of(pipe, image, {"height": 512, "width": 2048})
    assert QWEN_IMAGE.size_of(pipe, image, {}) == (stock[1], stock[0])


def test_latents_decode_in_bf16_as_the_stock_pipeline_does():
    pipe = tiny_qwen().to(torch.bfloat16)
    ours = GenerationPipeline(pipe, QWEN_IMAGE, CALL)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "true_cfg_scale": 1.0}
    latents, images = (
        pipe("a ring", **call, generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pil")
    )
    assert latents.dtype == torch.bfloat16
    assert np.array_equal(np.asarray(ours.images(latents)[0]), np.asarray(images[0]))


def test_prompts_are_refused_exactly_where_the_stock_pipeline_cuts(pipe, edit):
    counted = QWEN_IMAGE.prompt_lengths(pipe, ["x"])[0]
    whole = {**CALL, "max_sequence_length": counted + 9}
    draw = GenerationPipeline(pipe, QWEN_IMAGE, whole)
    fits = draw.conditions(["x" * 10]).kwargs["encoder_hidden_states"]
    assert fits.shape[1] == counted + 9 == pipe.encode_prompt("x" * 10)[0].shape[1]
    with pytest.raises(UserError, match=f"has {counted + 10} tokens"):
        draw.conditions(["x" * 11])
    short = EditingPipeline(edit.pipe, QWEN_IMAGE, {**CALL, "max_sequence_length": 8})
    long = short.conditions(["x" * 11], [random_image(0)]).kwargs["encoder_hidden_states"]
    close(long, edit.conditions(["x" * 11], [random_image(0)]).kwargs["encoder_hidden_states"])


def test_a_base_saved_as_an_editing_pipeline_also_generates(tmp_path, pipe, draw):
    save_editing(tmp_path, QwenImageEditPlusPipeline)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert family_of(tmp_path) is family_of(loaded) is QWEN_IMAGE
    again = GenerationPipeline(generation_pipe(loaded), QWEN_IMAGE, CALL).conditions(PROMPTS)
    close(again.kwargs["encoder_hidden_states"], draw.conditions(PROMPTS).kwargs["encoder_hidden_states"])
    edits = [
        EditingPipeline(p, QWEN_IMAGE, CALL).conditions(["make it red"], [random_image(0)])
        for p in (loaded, editing(pipe, QwenImageEditPlusPipeline), editing_pipe(pipe, tmp_path))
    ]
    for other in edits[1:]:
        close(other.kwargs["encoder_hidden_states"], edits[0].kwargs["encoder_hidden_states"])
        close(other.context, edits[0].context)


def test_a_base_without_a_processor_cannot_edit(pipe):
    with pytest.raises(UserError, match="QwenImagePipeline has no processor, which QwenImageEditPipeline needs"):
        editing_pipe(pipe)
