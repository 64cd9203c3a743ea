"""LongCat-Image: edits in the source's shape, prompts counted as the stock pipelines do, LoRAs of its transformer."""

from __future__ import annotations

import pytest
import torch
from tiny import random_adapter, random_image
from tiny_longcat import CALL, TINY, editing, tiny_longcat
from tiny_parts import close, recorded_steps

from danceopd.adapters.fuse import fuse
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.base import load_base
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES
from danceopd.run.card import load_snippet

FAMILY = FAMILIES[TINY.family]


@pytest.fixture(scope="module")
def pipe():
    return tiny_longcat()


@pytest.mark.parametrize("size", [(128, 64), (64, 150), (130, 100)])
def test_edits_have_the_size_and_the_velocity_of_the_stock_pipeline(pipe, size):
    edit, image = editing(pipe), random_image(1, *size)
    height, width = FAMILY.size_of(edit, image, {"height": 512, "width": 512})
    ours = EditingPipeline(edit, FAMILY, {**CALL, "height": height, "width": width})
    generator = torch.Generator().manual_seed(4)
    stock = {"prompt": "make it 'red'", "image": image, "guidance_scale": 1.0, "num_inference_steps": 1}
    pictures, steps = recorded_steps(edit, **stock, generator=generator)
    assert pictures[0].size == (width, height) and width != height
    condition = ours.conditions(["make it 'red'"], [image])
    rows, columns = FAMILY.grid(condition)
    assert (rows * 16, columns * 16) == (height, width)
    close(FAMILY.velocity(pipe.transformer, ours.noise([4]), torch.ones(1), condition), steps[0][0])


def test_a_prompt_that_would_be_cut_is_refused(pipe):
    ours = GenerationPipeline(pipe, FAMILY, CALL)
    assert FAMILY.prompt_lengths(pipe, ["a", "it's 'so' \"long\"", "x" * 512]) == [1, 16, 512]
    with pytest.raises(UserError, match="prompt 1 of 1 has 513 tokens and would be cut at 512"):
        ours.conditions(["x" * 513])


def test_a_student_is_fused_and_its_card_says_how_to_load_it(pipe, tmp_path):
    adapter = random_adapter(pipe.transformer, targets=FAMILY.lora_targets, size=0.1)
    pipe.save_pretrained(tmp_path / "base")
    write_adapter(adapter, tmp_path / "student")
    fuse(tmp_path / "student", tmp_path / "fused", base=tmp_path / "base")
    fused = load_base(tmp_path / "fused").transformer
    name = next(iter(adapter.tensors))
    wanted = pipe.transformer.get_submodule(name).weight + adapter.delta(name)
    close(fused.get_submodule(name).weight, wanted)
    said = load_snippet("meituan-longcat/LongCat-Image", CALL, family=FAMILY)
    line = next(line for line in said.splitlines() if "load_lora_adapter" in line)
    exec(line.replace("path/to/this/folder", str(tmp_path / "student")), {"pipe": fresh(tmp_path / "base")})


def fresh(folder):
    return load_base(folder)
