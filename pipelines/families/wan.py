"""The family `wan`: Wan 2.1 and 2.2, one pipeline class, generation only; latents are frames of a grid.

Wan 2.2 A14B has two transformers: rows whose time is below `boundary` are asked of the second, which hangs on the first
as its child `transformer_2` (pipelines/two_transformers.py).

A picture is a video of one frame (`call.num_frames: 1`, the default here); `5`, `9`, … draw a short video, which is
shown as its frames side by side. Prompts are UMT5 states, trimmed and then padded with zeros, without a mask. The
stock class gives the 5B model its time once for each token; here once for a row, since all tokens of a picture from
text have the same. Times are 0 to 1000; UniPC, the scheduler of the released models, rounds them down to whole numbers,
and so does a condition that was recorded with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype
from danceopd.errors import UserError

from ..condition import Condition
from ..family import Family, side_by_side
from ..two_transformers import SECOND

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT = "encoder_hidden_states"
WHOLE = "whole_times"  # a key of `Condition.fixed`: times are rounded down


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    size = (rows, 1, pipe.transformer.config.text_dim)
    return {"prompt_embeds": torch.zeros(size, device=pipe._execution_device, dtype=pipe.transformer.dtype)}


def _side(pipe: Any) -> int:
    return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]


def _drawn(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of whole tokens; UserError for a size that the stock class refuses."""
    if height % 16 or width % 16:
        raise UserError(f"call.height {height} and call.width {width} must be multiples of 16 for Wan; change them")
    side = _side(pipe)
    return max(side, height // side * side), max(side, width // side * side)


def _frames(pipe: Any, call: dict[str, Any]) -> int:
    """Frames of latents; UserError for a number of frames that the stock class would round."""
    frames, each = call.get("num_frames", 1), pipe.vae_scale_factor_temporal
    if frames % each != 1:
        raise UserError(
            f"call.num_frames is {frames}, which Wan cannot draw; give 1 for a picture, or {each} more for each "
            f"further frame of latents: {each + 1}, {2 * each + 1}, …"
        )
    return 1 + frames // each


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    x, first = call["hidden_states"], float(call["timestep"].flatten()[0])
    whole = first < 1000 and first.is_integer()  # UniPC begins at 999, other schedulers at 1000
    return x, Condition("wan", tuple(x.shape[1:]), {TEXT: call[TEXT]}, fixed={WHOLE: whole})


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    time = sigma * 1000
    if condition.fixed[WHOLE]:
        time = (time + 1e-3).floor()  # an fp32 sigma may be just below its whole time
    second = getattr(transformer, SECOND, None)
    if second is None:
        return _run(transformer, x, time, condition)
    low = (time < 1000 * transformer.boundary).cpu()
    if low.all() or not low.any():
        return _run(second if low.any() else transformer, x, time, condition)
    rows = [(~low).nonzero()[:, 0].to(x.device), low.nonzero()[:, 0].to(x.device)]
    parts = [_run(m, x[at], time[at], condition.rows(at)) for m, at in zip((transformer, second), rows, strict=True)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _run(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    x = x.to(compute_dtype(transformer.proj_out))
    return transformer(hidden_states=x, timestep=time, return_dict=False, **condition.kwargs)[0].float()


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    mean, std = _statistics(pipe)
    grid = x.to(pipe.vae.dtype)
    grid = grid / (1 / std).to(grid) + mean.to(grid)  # by the reciprocal: rounded as the stock pipeline does
    videos = pipe.video_processor.postprocess_video(pipe.vae.decode(grid, return_dict=False)[0], output_type="pil")
    return [side_by_side(frames) for frames in videos]


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
    mean, std = (stat.to(grid) for stat in _statistics(pipe))
    return (grid - mean) / std


def _statistics(pipe: Any) -> tuple[Tensor, ...]:
    config = pipe.vae.config
    return tuple(torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))


WAN = Family(
    name="wan",
    generation="WanPipeline",
    editing=None,
    lora_targets=r"(transformer_2\.)?blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    prompt_kwargs=(TEXT,),
    text_components=("text_encoder",),
    call=("max_sequence_length", "num_frames"),
    usual={"num_frames": 1, "output_type": "pil"},
    video=True,
    prompt_lengths=lambda pipe, prompts: [len(ids) for ids in pipe.tokenizer(prompts)["input_ids"]],
    dummy_prompt=_dummy_prompt,
    drawn=_drawn,
    token_side=_side,
    frames=_frames,
    split=_split,
    velocity=_velocity,
    decode=_decode,
    encode_images=_encode_images,
)
