"""Wan: the scheduler of the released models, times for each token, videos of a few frames, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import random_adapter
from tiny_parts import close, recorded_steps
from tiny_wan import CALL, TINY, tiny_transformer, tiny_wan

from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.pipelines import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES
from danceopd.sample import sample

FAMILY = FAMILIES[TINY.family]
STOCK = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 40, "guidance_scale": 1.0}


@pytest.mark.parametrize(("unipc", "expand", "frames"), [(True, True, 1), (True, False, 5), (False, True, 9)])
def test_the_stock_pipelines_velocities_on_its_own_states(unipc, expand, frames):
    """Whole times under UniPC, times for each token of the 5B, and videos; pictures are their frames side by side."""
    pipe = tiny_wan(unipc=unipc, expand_timesteps=expand)
    ours = GenerationPipeline(pipe, FAMILY, {**CALL, "num_frames": frames})
    call = {**STOCK, "num_frames": frames, "prompt": "a red circle", "generator": torch.Generator().manual_seed(3)}
    _, steps = recorded_steps(pipe, **call, output_type="latent")
    condition, noise = ours.conditions(["a red circle"]), ours.noise([3])
    assert condition.shape == (4, (frames + 3) // 4, 8, 8) and torch.equal(noise, steps[0][1])
    assert len(steps) == len(ours.sigmas()) - 1 == 4
    for sigma, (velocity, x, _) in zip(ours.sigmas(), steps, strict=False):
        close(FAMILY.velocity(pipe.transformer, x, sigma[None], condition).detach(), velocity, 2e-5)
    last = steps[-1][2]
    [whole] = ours.images(last)
    stock = pipe(**STOCK, num_frames=frames, prompt="a ring", latents=steps[0][1], output_type="pil")
    assert whole.size == (64 * frames, 64) == FAMILY.pictures(stock)[0].size
    assert np.asarray(whole).std() > 1
    drawn = FAMILY.pictures(stock)[0]
    assert np.array_equal(np.asarray(drawn)[:, -64:], np.asarray(stock.frames[0][-1]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_frames": 3}, "call.num_frames is 3, which Wan cannot draw; give 1 for a picture, or 4 more .*: 5, 9"),
        ({"num_frames": 4}, "call.num_frames is 4, which Wan cannot draw"),
        ({"height": 72}, "call.height 72 and call.width 64 must be multiples of 16 for Wan"),
    ],
)
def test_what_the_stock_class_would_round_or_refuse_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        GenerationPipeline(tiny_wan(), FAMILY, {**CALL, **call})


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student's LoRA on a base whose settings are videos of five frames."""
    folder = tmp_path_factory.mktemp("wan")
    pipe = tiny_wan(folder / "base", unipc=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 40, "num_frames": 5}
    (folder / "base" / "danceopd.json").write_text(json.dumps(settings))
    adapter = random_adapter(pipe.transformer, targets=FAMILY.lora_targets, size=0.3)
    write_adapter(adapter, folder / "student", metadata={"base": str(folder / "base")})
    return folder / "student"


def test_sample_writes_the_frames_of_a_video_side_by_side(student, tmp_path):
    from PIL import Image

    [path] = sample(student, "a ring", output=tmp_path, device="cpu")
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (64, 320, 3)
    assert not np.array_equal(drawn[:, :64], drawn[:, -64:])


def test_files_in_the_original_names_are_read(student, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = read_adapter(student)
    names = {"attn1.to_q": "self_attn.q", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0"}
    tensors = load_file(student / "pytorch_lora_weights.safetensors")
    renamed = {
        key.replace("transformer.", "diffusion_model.").replace(ours, theirs): tensor
        for key, tensor in tensors.items()
        for ours, theirs in names.items()
        if f".{ours}." in key
    }
    save_file(renamed, tmp_path / "lora.safetensors")
    found = read_adapter(tmp_path / "lora.safetensors", tiny_transformer())
    assert len(found) == 6
    assert all(torch.equal(b, adapter.tensors[name][1]) for name, (_, b) in found.tensors.items())
