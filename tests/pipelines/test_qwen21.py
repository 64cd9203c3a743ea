"""What only Qwen-Image-2.1 has: alpha, a cache in the stock call, places behind ragged prompts, steps of its own.

Velocities, rollouts, guidance, batches and several sources against the stock pipeline, which fills its cache, are in
`test_families.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_adapter, random_image
from tiny_parts import calls_of, close, recorded_steps
from tiny_qwen21 import CALL, tiny_qwen21

from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField
from danceopd.models.source_cache import with_cached_source
from danceopd.pipelines import EditingPipeline, GenerationPipeline, stack
from danceopd.pipelines.families.qwen21 import QWEN_IMAGE_21

WORDS = ["make it red", "remove the blue star above", "add a ring"]
STOCK = {"height": 64, "width": 64, "num_inference_steps": 4, "output_resolution": 64}


@pytest.fixture(scope="module")
def pipe():
    return tiny_qwen21()


@pytest.fixture(scope="module")
def edit(pipe):
    return EditingPipeline(pipe, QWEN_IMAGE_21, CALL)


def with_alpha(seed: int) -> Image.Image:
    image = random_image(seed).convert("RGBA")
    image.putalpha(random_image(seed + 50).convert("L"))
    return image


def test_the_alpha_channel_of_a_source_is_read_as_the_stock_pipeline_reads_it(pipe, edit):
    field, source = BaseField(Backbone(pipe.transformer, QWEN_IMAGE_21)), with_alpha(1)
    call = {**STOCK, "prompt": WORDS[0], "image": source, "output_type": "latent"}
    _, steps = recorded_steps(pipe, **call, generator=torch.Generator().manual_seed(3))
    for sigma, (velocity, x, _) in zip(edit.sigmas(), steps, strict=False):
        close(field(x, sigma.expand(1), edit.conditions(WORDS[:1], [source])), velocity)
    opaque = edit.conditions(WORDS[:1], [source.convert("RGB")])
    x = steps[0][1]
    assert (field(x, torch.ones(1), opaque) - steps[0][0]).abs().max() > 1e-3
    drawn = edit.images(torch.randn(1, *opaque.shape))[0]
    assert drawn.mode == "RGBA" and edit.encode_images([drawn, drawn.convert("RGB")]).shape == (2, *opaque.shape)


@pytest.mark.parametrize("task", ["generation", "editing"])
def test_a_batch_of_unlike_prompts_is_not_moved_by_its_padding(pipe, edit, task):
    """The stock forward counts a short prompt's padding as places before the picture; here no row is moved."""
    field, pipeline = BaseField(Backbone(pipe.transformer, QWEN_IMAGE_21)), edit
    if task == "generation":
        pipeline = GenerationPipeline(pipe, QWEN_IMAGE_21, CALL)
    given = [] if task == "generation" else [[[random_image(i), random_image(9, 96, 64)] for i in range(3)]]
    batch = pipeline.conditions(WORDS, *given)
    x, sigma = pipeline.noise([1, 2, 3]), torch.tensor([0.9, 0.5, 0.2])
    together = field(x, sigma, batch)
    calls = calls_of(pipe.transformer, lambda: field(x, sigma, batch))
    assert len(calls) == 1 and not calls[0]["encoder_hidden_states_mask"].all()
    for i in range(3):
        close(field(x[i : i + 1], sigma[i : i + 1], batch.rows([i])), together[i : i + 1])


@pytest.mark.parametrize("adapter", [False, True])
def test_kept_keys_and_values_give_the_same_rollout(pipe, edit, adapter):
    """Prompts of unlike lengths, two sources each, rows that leave; the source is computed once."""
    backbone = Backbone(tiny_qwen21().transformer, QWEN_IMAGE_21)
    backbone.add_adapter("student", random_adapter(backbone.transformer, targets=QWEN_IMAGE_21.lora_targets, size=0.1))
    field = AdapterField(backbone, "student") if adapter else BaseField(backbone)
    condition = edit.conditions(WORDS, [[random_image(i), random_image(i + 7, 96, 64)] for i in range(3)])
    noise, sigmas, stop = edit.noise([1, 2, 3]), edit.sigmas(), torch.tensor([1, 4, 3])
    plain = rollout(field, noise, sigmas, stop, condition)
    kept = with_cached_source(field, condition)
    calls = calls_of(backbone.transformer, lambda: close(rollout(field, noise, sigmas, stop, kept), plain))
    assert {call["kv_cache_mode"] for call in calls} == {"cached"}
    sources = [[random_image(i + 3), random_image(i)] for i in range(3)]
    other = with_cached_source(field, edit.conditions(WORDS, sources))
    assert (rollout(field, noise, sigmas, stop, other) - plain).flatten(1).abs().amax(1).min() > 1e-3


def test_a_base_that_is_not_causal_equals_the_stock_pipeline_and_cannot_keep(edit):
    pipe = tiny_qwen21(causal_condition=False)
    field, ours = BaseField(Backbone(pipe.transformer, QWEN_IMAGE_21)), EditingPipeline(pipe, QWEN_IMAGE_21, CALL)
    call = {**STOCK, "prompt": WORDS[0], "image": random_image(1), "output_type": "latent"}
    _, steps = recorded_steps(pipe, **call, generator=torch.Generator().manual_seed(3))
    condition = ours.conditions(WORDS[:1], [random_image(1)])
    for sigma, (velocity, x, _) in zip(ours.sigmas(), steps, strict=False):
        close(field(x, sigma.expand(1), condition), velocity)
    with pytest.raises(UserError, match=r"rollout\.cache_source: .*causal_condition is false"):
        with_cached_source(field, condition)


def test_the_steps_of_the_base_are_those_of_its_configuration():
    pipe = tiny_qwen21(sample_sigmas=[1.0, 0.6, 0.2])
    ours = GenerationPipeline(pipe, QWEN_IMAGE_21, CALL)
    pipe(**STOCK, prompt="a ring", output_type="latent")
    assert torch.equal(ours.sigmas(), pipe.scheduler.sigmas) and len(ours.sigmas()) == 4


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1024, 1024), (100, 700), (1920, 1080)])
def test_the_size_of_an_edit_is_what_the_stock_pipeline_draws(pipe, size):
    from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions

    width, height, _ = calculate_dimensions(1024 * 1024, size[0] / size[1])
    assert QWEN_IMAGE_21.size_of(pipe, Image.new("RGB", size), {}) == (height, width)
    assert QWEN_IMAGE_21.edited_size(pipe, [(64, 64), size], {"height": 512, "width": 2048}) == (height, width)


def test_a_picture_of_another_shape_and_sources_of_other_sizes(pipe, edit):
    wide = EditingPipeline(pipe, QWEN_IMAGE_21, {**CALL, "height": 64, "width": 128})
    field, sources = BaseField(Backbone(pipe.transformer, QWEN_IMAGE_21)), [random_image(1, 128, 64)]
    call = {**STOCK, "width": 128, "prompt": WORDS[1], "image": sources[0], "output_type": "latent"}
    _, steps = recorded_steps(pipe, **call, generator=torch.Generator().manual_seed(3))
    condition = wide.conditions(WORDS[1:2], sources)
    close(field(steps[1][1], wide.sigmas()[1].expand(1), condition), steps[1][0])
    assert QWEN_IMAGE_21.grid(condition) == (4, 8)
    with pytest.raises(UserError, match="cannot share a batch"):
        stack([condition, wide.conditions(WORDS[1:2], [random_image(1)])])


def test_latents_decode_in_bf16_as_the_stock_pipeline_does():
    pipe = tiny_qwen21().to(torch.bfloat16)
    latents, images = (
        pipe(**STOCK, prompt="a ring", generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pil")
    )
    ours = GenerationPipeline(pipe, QWEN_IMAGE_21, CALL)
    assert np.array_equal(np.asarray(ours.images(latents)[0]), np.asarray(images[0]))
    assert torch.equal(ours.noise([0])[0].bfloat16(), recorded_noise(pipe))


def recorded_noise(pipe):
    call = {**STOCK, "prompt": "a ring", "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return recorded_steps(pipe, **call)[1][0][1][0].bfloat16()
