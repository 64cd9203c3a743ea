"""What only Krea 2 has: prompts of several layers whose padding is left out, Turbo's schedule, guidance that adds.

Velocities, rollouts, guidance and batches against the stock pipeline are in `test_families.py`.
"""

from __future__ import annotations

import pytest
import torch
from tiny_krea2 import CALL, tiny_krea2
from tiny_parts import calls_of, recorded_steps

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import BaseField
from danceopd.pipelines import GenerationPipeline
from danceopd.pipelines.families.krea2 import KREA2

STOCK = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 160, "guidance_scale": 0.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_krea2()


def test_prompts_have_as_many_tokens_as_they_need(pipe):
    """The stock pipeline pads each to the whole length, in front of its template's end."""
    ours = GenerationPipeline(pipe, KREA2, CALL)
    words = ["a ring", "a red circle above it"]
    batch, whole = ours.conditions(words), pipe.encode_prompt(words, max_sequence_length=160)
    text, mask = (batch.kwargs[key] for key in KREA2.prompt_kwargs)
    assert text.shape[1] == whole[1].sum(dim=1).max() < whole[1].shape[1] and text.shape[2] == 3
    assert torch.equal(mask.sum(dim=1), whole[1].sum(dim=1))
    for row in range(2):
        assert torch.equal(text[row][mask[row]], whole[0][row][whole[1][row]])
    (call,) = calls_of(
        pipe.transformer, lambda: BaseField(Backbone(pipe.transformer, KREA2))(
            ours.noise([1]), torch.ones(1), batch.rows([0])
        )
    )  # fmt: skip
    assert call["encoder_attention_mask"] is None and call["position_ids"].shape == (int(mask[0].sum()) + 16, 3)


def test_prompts_are_refused_exactly_where_the_stock_pipeline_cuts(pipe):
    counted = KREA2.prompt_lengths(pipe, ["x"])[0]
    tight = GenerationPipeline(pipe, KREA2, {**CALL, "max_sequence_length": counted + 9})
    fits = tight.conditions(["x" * 10]).kwargs["encoder_hidden_states"]
    wide = GenerationPipeline(pipe, KREA2, CALL).conditions(["x" * 10]).kwargs["encoder_hidden_states"]
    assert fits.shape == wide.shape
    with pytest.raises(UserError, match=f"has {counted + 10} tokens and would be cut at {counted + 9}"):
        tight.conditions(["x" * 11])


@pytest.mark.parametrize("is_distilled", [False, True])
def test_raw_and_turbo_have_their_own_schedules(is_distilled):
    pipe = tiny_krea2(is_distilled=is_distilled)
    ours = GenerationPipeline(pipe, KREA2, {**CALL, "height": 128})
    recorded_steps(pipe, **{**STOCK, "height": 128}, prompt="a ring", output_type="latent")
    assert torch.equal(ours.sigmas(), pipe.scheduler.sigmas)
    assert (ours.sigmas()[1] - (0.9045 if is_distilled else 0.83)).abs() < 0.02


@pytest.mark.parametrize("scale", [1.0, 1.5, 5.5])
def test_our_scale_is_theirs_plus_one(scale):
    assert KREA2.guidance_on(scale)["guidance_scale"] == scale - 1 and KREA2.guidance_off == {"guidance_scale": 0.0}
