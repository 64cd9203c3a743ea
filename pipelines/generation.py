"""`GenerationPipeline`: prompts → conditions → denoising states → pictures, in batches, as in the stock pipeline.

Schedule, noise and conditions are recorded from the stock pipeline (`record.py`). Only the Euler loop (`euler`) is
ours, so that any velocity field can drive it and every state can be read. States are fp32. Noise and schedule need no
text encoder, and conditions can be cached, so the text encoders may be released.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from danceopd.common.messages import clipped
from danceopd.errors import UserError

from .condition import Condition, stack
from .family import Family, image_processor
from .record import first_call, record


@dataclass(frozen=True, eq=False)
class DenoisingState:
    """One state of a denoising trajectory: latents `x (B, …)` fp32 at noise level `sigma`, before step `step`.

    `velocity` is the field's value at this state, shape of `x`; None at the last state, where sigma is 0.
    """

    x: Tensor
    sigma: float
    step: int
    velocity: Tensor | None


@torch.no_grad()
def euler(
    field: Callable[[Tensor, Tensor, Condition], Tensor], x: Tensor, sigmas: Tensor, condition: Condition
) -> Iterator[DenoisingState]:
    """Euler steps `x + (sigma_next - sigma) field(x, sigma, condition)` from noise `x (B, …)` down `sigmas (N+1,)`.

    Yields N+1 states, each before its step, the last without a velocity. Lazy: whoever stops early pays for no further
    call of `field`. Without gradients; on the device of `x`.
    """
    grid = sigmas.to(x.device, torch.float32)
    x, levels = x.float(), grid.tolist()
    for step in range(len(levels) - 1):
        velocity = field(x, grid[step].expand(len(x)), condition)
        yield DenoisingState(x, levels[step], step, velocity)
        x = x + (grid[step + 1] - grid[step]) * velocity
    yield DenoisingState(x, levels[-1], len(levels) - 1, None)


class GenerationPipeline:
    """A stock text-to-image pipeline taken apart: conditions of prompts, schedule, noise, denoising, decoding.

    `call` holds `height` and `width` in pixels, `num_inference_steps`, and any other argument of the stock call that
    is the same for every picture, such as `max_sequence_length`. `chunk` is how many prompts the text encoder reads at
    once.
    """

    def __init__(self, pipe: Any, family: Family, call: dict[str, Any], chunk: int = 64) -> None:
        call = dict(call)
        if "steps" in call:
            said = "steps in a pipeline's call is now called num_inference_steps; the old name works for one version"
            warnings.warn(said, DeprecationWarning, stacklevel=2)
            call.setdefault("num_inference_steps", call.pop("steps"))
        for key in ("height", "width", "num_inference_steps"):
            if not isinstance(call.get(key), int) or call[key] < 1:
                raise UserError(f"{key} is {call.get(key)!r} in the pipeline's call; give a whole number, 1 or more")
        self.pipe, self.family, self.chunk = pipe, family, chunk
        self.generation_pipe = pipe  # noise and schedule are recorded from it
        self.height, self.width = family.drawn(pipe, call["height"], call["width"])
        self.frames = family.frames(pipe, call)  # of latents
        self.call = call
        self._sigmas: Tensor | None = None

    @torch.no_grad()
    def conditions(self, prompts: list[str]) -> Condition:
        """Conditions of the prompts, one row each, in order. UserError for an empty or a truncated prompt."""
        check_prompts(self.pipe, self.family, prompts, self.call)
        prompts = [self.family.prompt(prompt, False) for prompt in prompts]
        chunks = [prompts[i : i + self.chunk] for i in range(0, len(prompts), self.chunk)]
        return stack([record(self.pipe, self.family, prompt=chunk, **self.call)[0] for chunk in chunks])

    def sigmas(self) -> Tensor:
        """The stock pipeline's schedule for this size and these steps: `(N+1,)` fp32, falling, last 0."""
        if self._sigmas is None:
            self._sigmas = first_call(self.generation_pipe, self.family, **self._call_without_prompt(1))[1]
        return self._sigmas.clone()

    def noise(self, seeds: list[int]) -> Tensor:
        """`(B, *shape)` fp32: row i is the stock pipeline's noise with `Generator().manual_seed(seeds[i])`."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        call = {**self._call_without_prompt(len(seeds)), "generator": generators}
        # fp32: the stock states are not rounded to the transformer's dtype
        call, _ = first_call(self.generation_pipe, self.family, torch.float32, **call)
        return self.family.split(call)[0].float().clone()

    def denoise(
        self,
        condition: Condition,
        noise: Tensor,
        field: Callable[[Tensor, Tensor, Condition], Tensor],
        sigmas: Tensor | None = None,
    ) -> Iterator[DenoisingState]:
        """`euler` from `noise (B, …)` on the stock schedule, or on `sigmas`; the last state holds the clean latents."""
        return euler(field, noise, self.sigmas() if sigmas is None else sigmas, condition)

    @torch.no_grad()
    def images(self, x: Tensor) -> list[Image]:
        """Pictures of the clean latents `x (B, …)`, decoded as the stock pipeline does, about a megapixel at once.

        RGBA where the family's decoder draws an alpha channel.

        A VAE that is kept elsewhere is on the device of `x` meanwhile.
        """
        vae, found = self.pipe.vae, list[Image]()
        home = vae.device
        try:
            vae.to(x.device)
            for part in x.split(self._per_megapixel):
                found += self.family.decode(self.pipe, part, self.height, self.width)
        finally:
            vae.to(home)
        return found

    @torch.no_grad()
    def encode_images(self, pictures: list[Image]) -> Tensor:
        """Clean latents x0 `(B, *shape)` fp32 of finished pictures, resized to this pipeline's size where they differ.

        The inverse of `images`, up to what the autoencoder loses.
        """
        size, pipe, parts = self._per_megapixel, self.generation_pipe, []
        stock = image_processor(pipe)  # which may round a size further than what the pipeline draws
        exact = type(stock).from_config(stock.config, vae_scale_factor=1)
        for start in range(0, len(pictures), size):
            part = [one.convert("RGBA" if self.family.alpha else "RGB") for one in pictures[start : start + size]]
            pixels = exact.preprocess(part, height=self.height, width=self.width)
            parts.append(self.family.encode_images(pipe, pixels.to(pipe.vae.device, pipe.vae.dtype)))
        return torch.cat(parts)

    @property
    def _per_megapixel(self) -> int:
        """Pictures that the autoencoder takes at once."""
        return max(1, min(self.chunk, 2**20 // (self.height * self.width * self.frames)))

    def _call_without_prompt(self, rows: int) -> dict[str, Any]:
        return {**self.call, **self.family.dummy_prompt(self.generation_pipe, rows, **self.call)}


def check_prompts(
    pipe: Any, family: Family, prompts: list[str], call: dict[str, Any], names: Sequence[str] | None = None,
    editing: bool = False,
) -> None:  # fmt: skip
    """UserError for no prompt, an empty one, one of an edit (`editing`) or a picture that the stock class refuses, or
    one the tokenizer would cut at `max_sequence_length`.

    `names` is how the message names each prompt, such as by file and line.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    names = names or [f"prompt {number} of {len(prompts)}" for number in range(1, len(prompts) + 1)]
    for name, prompt in zip(names, prompts, strict=True):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{name} is empty; write what the picture should show")
        try:
            family.prompt(prompt, editing)
        except UserError as error:
            raise UserError(f"{name} {error}") from error
    limit = family.prompt_limit(pipe, call)
    try:
        lengths = family.prompt_lengths(pipe, prompts)
    except ValueError as error:  # such as a tokenizer without a chat template
        raise UserError(f"the tokenizer reads no prompt ({clipped(str(error), 200)}); fetch the base again") from error
    for name, prompt, length in zip(names, prompts, lengths, strict=True):
        if length > limit:
            raise UserError(
                f"{name} has {length} tokens and would be cut at {limit} ({prompt[:40]!r}…); shorten it or raise "
                "max_sequence_length"
            )
