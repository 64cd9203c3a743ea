"""What is special about FLUX.1 with Kontext, FLUX.2-dev and SD3: sizes, sources, guidance as a number, base classes."""

from __future__ import annotations

import pytest
import torch
from tiny import random_image, tiny_klein
from tiny_flux1 import CALL, tiny_flux1, tiny_kontext
from tiny_flux2_dev import tiny_flux2_dev
from tiny_parts import recorded_steps
from tiny_sd3 import tiny_sd3

from danceopd.data.encode import open_pipelines
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.base import pipeline_call
from danceopd.models.fields import BaseField
from danceopd.pipelines import EditingPipeline, GenerationPipeline, editing_pipe, family_of, generation_pipe, record
from danceopd.pipelines.condition import stack
from danceopd.pipelines.registry import FAMILIES

FLUX1 = FAMILIES["flux1"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_flux1()


@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
def test_a_bucket_of_another_shape_equals_the_stock_kontext(pipe, size):
    """Target and source have their own shapes; the picture has the size of the call, not a megapixel."""
    height, width = size
    stock, call = tiny_kontext(pipe), {**CALL, "height": height, "width": width, "steps": 2}
    ours = EditingPipeline(stock, FLUX1, call)
    sources = [random_image(i, 96, 64) for i in range(2)]
    condition = ours.conditions(["make it red", "add a ring"], sources)
    assert condition.shape[0] == height * width // 256 and condition.context.shape[1] == 6 * 4
    final = recorded_steps(
        stock,
        **{"prompt": "make it red", "image": sources[0], "height": height, "width": width, "num_inference_steps": 2},
        **{"max_area": height * width, "_auto_resize": False, "max_sequence_length": CALL["max_sequence_length"]},
        generator=torch.Generator().manual_seed(1),
    )[1][-1][2]
    *_, last = ours.denoise(condition.rows([0]), ours.noise([1]), BaseField(Backbone(tiny_flux1().transformer, FLUX1)))
    torch.testing.assert_close(last.x, final, rtol=0, atol=1e-4)
    assert ours.images(last.x)[0].size == (width, height)


def test_edits_of_a_base_in_bfloat16_share_a_batch():
    """Positions are in the base's dtype, which numpy does not have."""
    ours = EditingPipeline(tiny_kontext(tiny_flux1().to(torch.bfloat16)), FLUX1, {**CALL, "steps": 2})
    batch = ours.conditions(["make it red", "add a ring"], [random_image(i) for i in range(2)])
    assert len(batch) == 2 and batch.shared["img_ids"].dtype == torch.bfloat16
    wide = ours.conditions(["make it red"], [random_image(1, 128, 64)])
    with pytest.raises(UserError, match="cannot share a batch"):
        stack([batch, wide])


@pytest.mark.parametrize(
    ("source", "asked", "tokens"),
    [
        ((96, 64), (64, 64), 6 * 4),  # keeps its shape
        ((90, 70), (64, 64), 5 * 4),  # floored to whole tokens
        ((1400, 1000), (64, 64), (1184 // 16) * (880 // 16)),  # above a megapixel: the nearest trained size
        ((96, 64), (1024, 1024), (1248 // 16) * (832 // 16)),  # a trained size is asked for: as the stock pipeline
    ],
)
def test_what_kontext_makes_of_a_source(pipe, monkeypatch, source, asked, tokens):
    kontext = tiny_kontext(pipe)
    monkeypatch.setattr(kontext, "_encode_vae_image", lambda image, generator: image[:, [0, 1, 2, 0], ::8, ::8])
    call = {"prompt": "x", "height": asked[0], "width": asked[1], "image": random_image(0, *source)}
    assert record(kontext, FLUX1, **call)[0].context.shape == (1, tokens, 16)
    if asked == (1024, 1024):  # by our settings and by its own alike
        stock = dict(FLUX1.extra(kontext, call))
        assert stock == {"max_area": 1024**2, "_auto_resize": True}


@pytest.mark.parametrize(
    ("size", "call", "expected"),
    [
        ((1000, 1000), {}, (1024, 1024)),
        ((1600, 900), {}, (752, 1392)),
        ((900, 1600), {"height": 512, "width": 512}, (688, 368)),
        ((100, 100), {"height": 2048, "width": 2048}, (1024, 1024)),
    ],
)
def test_size_of_a_source_for_kontext(pipe, size, call, expected):
    assert FLUX1.size_of(pipe, random_image(0, *size), call) == expected


@pytest.mark.parametrize("build", [tiny_klein, tiny_flux2_dev])
@pytest.mark.parametrize("size", [(64, 64), (90, 70), (200, 64)])
def test_size_of_a_source_is_that_of_the_stock_pipeline(build, size):
    pipe, image = build(), random_image(0, *size)
    family = family_of(pipe)
    height, width = family.size_of(pipe, image, {})
    condition = record(pipe, family, prompt="x", image=image, max_sequence_length=24)[0]
    target = condition.kwargs["img_ids"][0][: condition.shape[0]].amax(0)
    assert (16 * (int(target[1]) + 1), 16 * (int(target[2]) + 1)) == (height, width)
    assert family.size_of(pipe, random_image(0, 1600, 800), {"height": 64, "width": 64}) == (32, 80)


@pytest.mark.parametrize("build", [tiny_flux1, tiny_flux2_dev])
def test_guidance_is_a_number_the_transformer_reads(build):
    pipe = build()
    family = family_of(pipe)
    field = BaseField(Backbone(pipe.transformer, family))
    answers = []
    for scale in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 6.0}):
        ours = GenerationPipeline(pipe, family, {**CALL, **scale})
        condition = ours.conditions(["a red circle", "a ring"])
        default = {"flux1": 3.5, "flux2-dev": 4.0}[family.name]
        assert condition.kwargs["guidance"].tolist() == [scale.get("guidance_scale", default)] * 2
        answers.append(field(ours.noise([1, 2]), torch.tensor([0.5, 0.6]), condition))
    assert min((a - b).abs().max() for a, b in zip(answers, answers[1:], strict=False)) > 1e-3


def test_pipelines_over_one_base_cast_nothing(pipe):
    half = tiny_flux1()
    half.transformer.to(torch.bfloat16)
    for made in (editing_pipe(half), generation_pipe(editing_pipe(half))):
        assert made.transformer is half.transformer and made.transformer.dtype == torch.bfloat16
        assert made.vae.dtype == torch.float32
    kontext = tiny_kontext(pipe)
    assert generation_pipe(pipe) is pipe and editing_pipe(kontext) is kontext
    assert type(generation_pipe(kontext)).__name__ == "FluxPipeline"


def test_a_base_may_be_saved_as_its_editing_pipeline(pipe, tmp_path):
    from diffusers import DiffusionPipeline

    tiny_kontext(pipe).save_pretrained(tmp_path)
    base = DiffusionPipeline.from_pretrained(tmp_path)
    assert family_of(tmp_path) is family_of(base) is FLUX1
    given = {("num_inference_steps" if key == "steps" else key): CALL[key] for key in CALL}
    call = pipeline_call(tmp_path, given)
    assert call == {**given, "guidance_scale": 3.5}
    made = open_pipelines(base, FLUX1, call, ["editing", "generation", "editing"])
    assert [type(d.pipe).__name__ for d in made.values()] == ["FluxKontextPipeline", "FluxPipeline"]
    theirs = open_pipelines(pipe, FLUX1, call, ["generation"])["generation"].conditions(["a ring"])
    torch.testing.assert_close(made["generation"].conditions(["a ring"]).state(), theirs.state())


def test_sd3_without_its_t5_reads_clip_alone(pipe):
    small = tiny_sd3()
    small.text_encoder_3 = small.tokenizer_3 = None
    ours = GenerationPipeline(small, FAMILIES["sd3"], CALL)
    field = BaseField(Backbone(small.transformer, FAMILIES["sd3"]))
    condition = ours.conditions(["a red circle"])
    _, steps = recorded_steps(
        small,
        **{"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0},
        max_sequence_length=CALL["max_sequence_length"],
        generator=torch.Generator().manual_seed(2),
    )
    *_, last = ours.denoise(condition, ours.noise([2]), field)
    torch.testing.assert_close(last.x, steps[-1][2], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="79 tokens and would be cut at 77"):
        GenerationPipeline(small, FAMILIES["sd3"], {**CALL, "max_sequence_length": 256}).conditions(["x" * 77])


def test_bad_families_and_settings(pipe, tmp_path):
    assert family_of("nowhere", "sd3") is FAMILIES["sd3"]
    with pytest.raises(UserError, match="there is no family 'flux'; did you mean 'flux1'"):
        family_of(pipe, "flux")
    with pytest.raises(UserError, match="sd3 has no editing pipeline"):
        editing_pipe(tiny_sd3())
    klein = tiny_klein(tmp_path)
    with pytest.raises(UserError, match="call.guidance_scale means nothing to flux2-klein"):
        pipeline_call(tmp_path, {"guidance_scale": 3.0})
    assert pipeline_call(tmp_path, {})["num_inference_steps"] == 50
    with pytest.raises(UserError, match="is a Flux2KleinPipeline; give flux1 the folder of a FluxKontextPipeline"):
        editing_pipe(pipe, tmp_path)
    assert editing_pipe(klein) is klein
    with pytest.raises(UserError, match="41 tokens and would be cut at 40"):
        GenerationPipeline(pipe, FLUX1, CALL).conditions(["x" * 39])
