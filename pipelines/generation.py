"""Prompt → Condition → denoising states → pictures, in batches, exactly as the stock pipeline draws them.

The schedule, the noise and the conditions are recorded from the stock pipeline (`record.py`); only the
Euler loop is ours, so that any velocity field can drive it and every state can be looked at. States are
fp32. Nothing here keeps a text encoder alive: noise and schedule need none, conditions can be cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from danceopd.errors import UserError

from .family import Family
from .record import Condition, first_call, record, stack


@dataclass(frozen=True, eq=False)
class DenoisingState:
    """One state of a denoising path: latents `x (B, …)` fp32 at noise level `sigma`, before step `step`.

    `velocity` is the field's answer at this state, shape of `x`; None at the last state, where sigma is 0.
    """

    x: Tensor
    sigma: float
    step: int
    velocity: Tensor | None


class GenerationPipeline:
    """A stock text-to-image pipeline as conditions, schedule, noise and pictures.

    `call` holds `height` and `width` in pixels, `steps` (denoising steps), and any other argument of the
    stock call that belongs to every picture, such as `max_sequence_length`. `chunk` is how many prompts
    the text encoder reads at once.
    """

    def __init__(self, pipe: Any, family: Family, call: dict[str, Any], chunk: int = 64) -> None:
        call = dict(call)
        for key in ("height", "width", "steps"):
            if not isinstance(call.get(key), int) or call[key] < 1:
                raise UserError(f"{key} is {call.get(key)!r} in the pipeline's call; give a whole number, 1 or more")
        self.pipe, self.family, self.chunk = pipe, family, chunk
        self._plain = pipe  # what noise and schedule are read from
        self.height, self.width = call["height"], call["width"]
        self.call = {"num_inference_steps": call.pop("steps"), **call}
        self._sigmas: Tensor | None = None

    @torch.no_grad()
    def conditions(self, prompts: list[str]) -> Condition:
        """Conditions of the prompts, one row each, in order. UserError: an empty or a truncated prompt."""
        check_prompts(self.pipe, self.family, prompts, self.call)
        chunks = [prompts[i : i + self.chunk] for i in range(0, len(prompts), self.chunk)]
        return stack([record(self.pipe, self.family, prompt=chunk, **self.call)[0] for chunk in chunks])

    def sigmas(self) -> Tensor:
        """The stock pipeline's schedule for this size and these steps: `(N+1,)` fp32, falling, last 0."""
        if self._sigmas is None:
            self._sigmas = first_call(self._plain, self.family, **self._blank(1))[1]
        return self._sigmas.clone()

    def noise(self, seeds: list[int]) -> Tensor:
        """`(B, *shape)` fp32: row i is what the stock pipeline draws with `Generator().manual_seed(seeds[i])`."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        blank = self._blank(len(seeds))  # fp32: the stock states are not rounded to the transformer's dtype
        call, _ = first_call(self._plain, self.family, torch.float32, generator=generators, **blank)
        return self.family.split(call)[0].float().clone()

    @torch.no_grad()
    def denoise(
        self,
        condition: Condition,
        noise: Tensor,
        field: Callable[[Tensor, Tensor, Condition], Tensor],
        sigmas: Tensor | None = None,
    ) -> Iterator[DenoisingState]:
        """Euler steps from `noise (B, …)` along `field`; N+1 states, the last at sigma 0 without a velocity."""
        grid = (self.sigmas() if sigmas is None else sigmas).to(noise.device, torch.float32)
        x, levels = noise.float(), grid.tolist()
        for step in range(len(levels) - 1):
            velocity = field(x, grid[step].expand(len(x)), condition)
            yield DenoisingState(x, levels[step], step, velocity)
            x = x + (grid[step + 1] - grid[step]) * velocity
        yield DenoisingState(x, levels[-1], len(levels) - 1, None)

    @torch.no_grad()
    def images(self, x: Tensor) -> list[Image]:
        """Pictures of the clean latents `x (B, …)`, decoded as the stock pipeline does, about a megapixel at once."""
        size = min(self.chunk, max(1, 2**20 // (self.height * self.width)))
        parts = (self.family.decode(self.pipe, part, self.height, self.width) for part in x.split(size))
        return [image for part in parts for image in part]

    @torch.no_grad()
    def clean(self, pictures: list[Image]) -> Tensor:
        """Clean latents x0 `(B, *shape)` fp32 of finished pictures, resized to this pipeline's size where they differ.

        What `images` would be given to draw them, but for what the autoencoder loses.
        """
        size, vae = max(1, min(self.chunk, 2**20 // (self.height * self.width))), self._plain.vae
        parts = []
        for start in range(0, len(pictures), size):
            part = pictures[start : start + size]
            pixels = self._plain.image_processor.preprocess(part, height=self.height, width=self.width)
            parts.append(self.family.clean(self._plain, pixels.to(vae.device, vae.dtype)))
        return torch.cat(parts)

    def _blank(self, rows: int) -> dict[str, Any]:
        return {**self.call, **self.family.blank(self._plain, rows, **self.call)}


def check_prompts(
    pipe: Any, family: Family, prompts: list[str], call: dict[str, Any], names: Sequence[str] | None = None
) -> None:
    """UserError for no prompt, an empty one, or one the tokenizer would cut at `max_sequence_length`.

    `names`: what it calls each prompt, a file and a line for example.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    names = names or [f"prompt {number} of {len(prompts)}" for number in range(1, len(prompts) + 1)]
    for name, prompt in zip(names, prompts, strict=True):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{name} is empty; write what the picture should show")
    limit = family.prompt_limit(pipe, call)
    for name, prompt, length in zip(names, prompts, family.prompt_lengths(pipe, prompts), strict=True):
        if length > limit:
            raise UserError(
                f"{name} has {length} tokens and would be cut at {limit} ({prompt[:40]!r}…); shorten it or raise "
                "max_sequence_length"
            )
