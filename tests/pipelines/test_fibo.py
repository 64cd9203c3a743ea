"""Bria FIBO: text layers for every block, prompts as JSON, text padded on any side, several references."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import random_image
from tiny_fibo import CALL, TINY, editing, tiny_fibo
from tiny_parts import close, recorded_steps

from danceopd.errors import UserError
from danceopd.pipelines import EditingPipeline, GenerationPipeline, generation_pipe, stack
from danceopd.pipelines.registry import FAMILIES

FAMILY = FAMILIES[TINY.family]
STOCK = {"guidance_scale": 1.0, "num_inference_steps": 1, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe():
    return tiny_fibo()


@pytest.mark.parametrize(("text_layers", "kept"), [(1, 2), (3, 4), (6, 4)])
def test_every_block_reads_the_layer_that_the_stock_pipeline_gives_it(text_layers, kept):
    """Fewer states of the encoder than blocks, as many, and more."""
    pipe = tiny_fibo(text_layers=text_layers)
    ours = GenerationPipeline(pipe, FAMILY, CALL)
    _, steps = recorded_steps(pipe, **STOCK, prompt="a {red} circle", generator=torch.Generator().manual_seed(1))
    condition = ours.conditions(["a {red} circle"])
    assert condition.kwargs["text_encoder_layers"].shape[2] == kept
    close(FAMILY.velocity(pipe.transformer, ours.noise([1]), torch.ones(1), condition), steps[0][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_may_be_padded_on_either_side(pipe, side):
    padded = copy.copy(pipe)
    padded.tokenizer = copy.deepcopy(pipe.tokenizer)
    padded.tokenizer.padding_side = side
    prompts, x, sigma = ["a red circle", "a"], torch.randn(2, 16, 16), torch.tensor([0.9, 0.4])
    together = GenerationPipeline(padded, FAMILY, CALL).conditions(prompts)
    alone = stack([GenerationPipeline(pipe, FAMILY, CALL).conditions([prompt]) for prompt in prompts])
    a, b = (FAMILY.velocity(pipe.transformer, x, sigma, condition) for condition in (together, alone))
    close(a, b)


def test_instructions_become_json_and_broken_json_is_refused(pipe):
    assert FAMILY.prompt("a cat", False) == "a cat"
    assert json.loads(FAMILY.prompt('paint "hi" on it', True)) == {"edit_instruction": 'paint "hi" on it'}
    given = '{"edit_instruction": "make it red", "objects": []}'
    assert FAMILY.prompt(given, True) == given
    ours = EditingPipeline(editing(pipe), FAMILY, CALL)
    for broken, reason in (('{"text": "a"}', "has no edit_instruction"), ('{"edit_instruction": ', "is broken")):
        with pytest.raises(UserError, match=f"prompt 1 of 1 is JSON that {reason}.*plain words"):
            ours.conditions([broken], [random_image(0)])


def test_several_sources_of_unlike_sizes_are_references_in_their_order(pipe):
    edit, images = editing(pipe), [random_image(1), random_image(2, 128, 64)]
    ours = EditingPipeline(edit, FAMILY, CALL)
    prompt = FAMILY.prompt("both", True)
    stock = {**STOCK, "prompt": prompt, "image": images, "generator": torch.Generator().manual_seed(2)}
    _, steps = recorded_steps(edit, **stock)
    condition = ours.conditions(["both"], [images])
    assert condition.context.shape[1] == 16 + 32
    v = FAMILY.velocity(pipe.transformer, ours.noise([2]), torch.ones(1), condition)
    close(v, steps[0][0][:, :16])


def test_a_base_saved_as_the_editing_pipeline_generates(pipe):
    plain = generation_pipe(editing(pipe), FAMILY)
    assert type(plain) is type(pipe) and plain.transformer is pipe.transformer
