"""What only Z-Image has: two layouts on one transformer, ragged captions, bfloat16 sources, SigLIP2 or none.

Velocities, rollouts, guidance and batches against the stock pipelines are in `test_families.py`, for a plain
transformer and for one with SigLIP2.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from tiny import random_image
from tiny_parts import close
from tiny_zimage import CALL, source_only, tiny_z_image, tiny_z_image_omni

from danceopd.data.null_prompt import null_prompt
from danceopd.errors import UserError
from danceopd.pipelines import (
    EditingPipeline,
    GenerationPipeline,
    editing_pipe,
    family_of,
    generation_pipe,
    record,
    stack,
)
from danceopd.pipelines.families.zimage import Z_IMAGE
from danceopd.pipelines.registry import with_prompt_of

STOCK = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 100}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image()


@pytest.fixture(scope="module")
def omni():
    return tiny_z_image_omni()


def stock_steps(pipe, seed=0, **call):
    """Everything that passed through the stock pipeline's `scheduler.step`: (velocity, latents)."""
    steps, scheduler = [], pipe.scheduler

    def step(velocity, t, x, **kwargs):
        steps.append((velocity.clone(), x.clone()))
        return type(scheduler).step(scheduler, velocity, t, x, **kwargs)

    scheduler.step = step
    try:
        pipe(**{**STOCK, "guidance_scale": 0.0, **call}, generator=torch.Generator().manual_seed(seed))
    finally:
        del scheduler.step
    return steps


@torch.no_grad()
def velocity(pipe, x, sigma, condition):
    return Z_IMAGE.velocity(pipe.transformer, x, torch.as_tensor(sigma).expand(len(x)), condition)


def test_one_transformer_takes_both_layouts_and_the_condition_says_which(omni):
    """The same weights, prompt and state: the basic and the omni layout disagree, each equals its own stock class."""
    basic = ZImagePipeline(**{k: v for k, v in omni.components.items() if not k.startswith("siglip")})
    answers = []
    for stock in (basic, omni):
        v, x = stock_steps(stock, prompt=PROMPT)[0]
        answers.append(velocity(stock, x, 1.0, GenerationPipeline(stock, Z_IMAGE, CALL).conditions([PROMPT])))
        close(answers[-1], v)
    assert (answers[0] - answers[1]).abs().max() > 0.05


def test_a_model_with_siglip_generates_through_the_omni_pipeline_and_a_plain_one_does_not(pipe, omni):
    assert generation_pipe(omni) is omni
    editing = editing_pipe(pipe)
    assert editing.siglip is None and family_of(editing) is Z_IMAGE
    back = generation_pipe(editing)
    assert type(back) is ZImagePipeline and back.transformer is pipe.transformer


@pytest.mark.parametrize("other", [(96, 64), (64, 112)])
def test_sources_of_another_shape_than_the_picture(omni, pipe, other):
    for stock in (omni, source_only(pipe)):
        image = random_image(3, *other)
        condition = EditingPipeline(stock, Z_IMAGE, CALL).conditions([PROMPT], [image])
        v, x = stock_steps(stock, prompt=PROMPT, image=image)[2]
        close(velocity(stock, x, stock.scheduler.sigmas[2], condition), v)
        square = EditingPipeline(stock, Z_IMAGE, CALL).conditions([PROMPT], [random_image(3)])
        with pytest.raises(UserError, match="cannot share a batch"):
            stack([condition, square])


def test_several_sources(omni):
    images = [random_image(1, 96, 64), random_image(2), random_image(3, 64, 80)]
    condition = record(omni, Z_IMAGE, prompt=PROMPT, image=images, **STOCK)[0]
    assert condition.fixed["sources"] == [[8, 12], [8, 8], [10, 8]] and condition.kwargs["cap_lengths"].shape == (1, 5)
    v, x = stock_steps(omni, prompt=PROMPT, image=images)[1]
    close(velocity(omni, x, omni.scheduler.sigmas[1], condition), v)


def test_source_features_have_an_effect(omni):
    """Without this, SigLIP2 features could be recorded and never used."""
    condition = EditingPipeline(omni, Z_IMAGE, CALL).conditions([PROMPT], [random_image(1)])
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    deaf = {**condition.kwargs, "siglip_feats": condition.kwargs["siglip_feats"].flip(1)}
    gap = velocity(omni, x, 0.5, replace(condition, kwargs=deaf)) - velocity(omni, x, 0.5, condition)
    assert gap.abs().max() > 1e-3


def test_padding_of_ragged_captions_is_never_read(pipe):
    """Rows keep their own lengths: the padding after them in the stacked tensor may hold anything."""
    ours = GenerationPipeline(pipe, Z_IMAGE, CALL)
    batch = ours.conditions([PROMPT, PROMPT + " with two yellow star below the black square"])
    lengths, words = batch.kwargs["cap_lengths"], batch.kwargs["cap_feats"]
    assert lengths[0, 0] < lengths[1, 0] == words.shape[1]
    x = ours.noise([1, 2])
    before = velocity(pipe, x, 0.5, batch)
    words[0, lengths[0, 0] :] = 100.0
    assert torch.equal(velocity(pipe, x, 0.5, batch), before)
    words[0, lengths[0, 0] - 1] = 100.0
    assert (velocity(pipe, x, 0.5, batch)[0] - before[0]).abs().max() > 1e-3


def test_prompts_of_the_caller_are_left_alone(pipe, omni):
    for stock in (pipe, omni):
        prompts = [PROMPT, "two star"]
        record(stock, Z_IMAGE, prompt=prompts, **STOCK)
        Z_IMAGE.encode_prompts(stock, prompts, None, max_sequence_length=100)
        GenerationPipeline(stock, Z_IMAGE, CALL).conditions(prompts)
        assert prompts == [PROMPT, "two star"]


@pytest.mark.parametrize("task", ["generation", "editing", "omni"])
def test_a_prompt_that_just_fits_is_not_cut(pipe, omni, task):
    stock = {"generation": pipe, "editing": editing_pipe(pipe), "omni": omni}[task]
    ours, images = GenerationPipeline, {}
    if task == "editing":
        ours, images = EditingPipeline, {"images": [random_image(0)]}
    length = Z_IMAGE.prompt_lengths(stock, [PROMPT])[0]
    tight = ours(stock, Z_IMAGE, {**CALL, "max_sequence_length": length}).conditions([PROMPT], **images)
    wide = ours(stock, Z_IMAGE, CALL).conditions([PROMPT], **images)
    assert torch.equal(tight.kwargs["cap_lengths"], wide.kwargs["cap_lengths"])
    assert wide.kwargs["cap_lengths"].max() == length
    with pytest.raises(UserError, match="would be cut"):
        ours(stock, Z_IMAGE, {**CALL, "max_sequence_length": length - 1}).conditions([PROMPT], **images)


def test_a_null_prompt_of_the_other_layout_is_refused(pipe):
    editing = editing_pipe(pipe)
    drawn = GenerationPipeline(pipe, Z_IMAGE, CALL).conditions([PROMPT])
    edited = EditingPipeline(editing, Z_IMAGE, CALL).conditions([PROMPT], [random_image(0)])
    x = torch.randn(1, 16, 8, 8)
    for condition, words in ((drawn, edited), (edited, drawn)):
        with pytest.raises(ValueError, match="another layout"):
            velocity(pipe, x, 0.5, replace(condition, kwargs=words.kwargs))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_null_prompt_guides_edits_of_any_number_of_sources(pipe, count):
    ours = EditingPipeline(editing_pipe(pipe), Z_IMAGE, CALL)
    sources = [random_image(i, 64 + 16 * i) for i in range(count)]
    one = sources if count > 1 else sources[0]
    null, condition = null_prompt(ours, "edits"), ours.conditions([PROMPT], [sources])
    guided = {**STOCK, **Z_IMAGE.guidance_on(3.0)}
    for sigma, (v, x) in zip(ours.sigmas(), stock_steps(ours.pipe, prompt=PROMPT, image=one, **guided), strict=False):
        v_null = velocity(pipe, x, sigma, with_prompt_of(condition, null))
        close(Z_IMAGE.guide(velocity(pipe, x, sigma, condition), v_null, 3.0), v, 1e-4)


def test_an_editing_pipe_reads_sources_in_bfloat16_and_leaves_its_pipe_alone(pipe, omni, tmp_path):
    """The stock class casts a source to bfloat16 before the VAE: it cannot edit with an fp32 one."""
    omni.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    image = random_image(4)
    with pytest.raises(RuntimeError, match="BFloat16"):
        loaded(**STOCK, prompt=PROMPT, image=image)
    editing = editing_pipe(loaded)
    assert loaded.vae.dtype == torch.float32 and editing.vae.dtype == torch.bfloat16
    assert editing.transformer is loaded.transformer and editing_pipe(editing) is editing
    ours = EditingPipeline(editing, Z_IMAGE, CALL).conditions([PROMPT], [image])
    close(ours.context, EditingPipeline(omni, Z_IMAGE, CALL).conditions([PROMPT], [image]).context, 0)
    plain = ZImagePipeline(**{**pipe.components, "vae": loaded.vae})
    ready = editing_pipe(plain)
    v, x = stock_steps(ready, prompt=PROMPT, image=image)[0]
    close(velocity(pipe, x, 1.0, EditingPipeline(ready, Z_IMAGE, CALL).conditions([PROMPT], [image])), v)
    assert plain.vae.dtype == torch.float32 and not hasattr(plain, "prepare_siglip_embeds")


def test_siglip_is_read_from_another_folder_or_the_error_says_so(omni, tmp_path):
    basic = ZImagePipeline(**{k: v for k, v in omni.components.items() if not k.startswith("siglip")})
    with pytest.raises(UserError, match="has no siglip; set editing_base"):
        editing_pipe(basic)
    omni.save_pretrained(tmp_path)
    editing = editing_pipe(basic, tmp_path)
    ours, stock = (EditingPipeline(p, Z_IMAGE, CALL).conditions([PROMPT], [random_image(0)]) for p in (editing, omni))
    close(ours.kwargs["siglip_feats"], stock.kwargs["siglip_feats"])


def test_a_bfloat16_model_starts_from_the_stock_noise_unrounded():
    pipe = tiny_z_image()
    pipe.transformer.bfloat16(), pipe.text_encoder.bfloat16()
    ours = GenerationPipeline(pipe, Z_IMAGE, CALL)
    steps = stock_steps(pipe, seed=5, prompt=PROMPT)
    assert torch.equal(ours.noise([5]), steps[0][1])
    condition = ours.conditions([PROMPT])
    assert condition.kwargs["cap_feats"].dtype == torch.bfloat16
    for sigma, (v, x) in zip(ours.sigmas(), steps, strict=False):
        assert torch.equal(velocity(pipe, x, sigma, condition), v)


@pytest.mark.parametrize("scale", [1.0, 1.5, 6.0])
def test_our_scale_is_theirs_plus_one(pipe, scale):
    null = record(pipe, Z_IMAGE, prompt="", **STOCK)[0]
    condition = record(pipe, Z_IMAGE, prompt=PROMPT, **STOCK)[0]
    v, x = stock_steps(pipe, prompt=PROMPT, **Z_IMAGE.guidance_on(scale))[0]
    close(Z_IMAGE.guide(velocity(pipe, x, 1.0, condition), velocity(pipe, x, 1.0, null), scale), v, 2e-5 * scale)


def test_lora_targets_are_the_blocks_of_every_kind_and_nothing_else(omni):
    linears = [name for name, module in omni.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    hits = [name for name in linears if re.fullmatch(Z_IMAGE.lora_targets, name)]
    kinds = {name.split(".")[0] for name in hits}
    assert kinds == {"layers", "noise_refiner", "context_refiner", "siglip_refiner"} and len(hits) == 7 * 5
    assert all("adaLN" in name for name in set(linears) - set(hits) if name.split(".")[0] in kinds)
