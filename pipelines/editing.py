"""Prompt + source image → Condition → denoising states → pictures.

Stock editing pipelines read a list of images as several references of ONE prompt, so they cannot batch
edits. Here the instructions are encoded in batches by the stock `encode_prompt`, each row is recorded with
its own source image, and the rows are stacked; the rest is `GenerationPipeline`.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image

from danceopd.errors import UserError

from .families import family_of
from .family import Family
from .generation import GenerationPipeline, check_prompts
from .record import Condition, record, stack


class EditingPipeline(GenerationPipeline):
    """A stock editing pipeline as conditions, schedule, noise and pictures; same `call` as for generation."""

    @torch.no_grad()
    def conditions(self, prompts: list[str], images: list[Image]) -> Condition:  # type: ignore[override]
        """Conditions of the edits `(prompts[i], images[i])`, one row each, in order.

        UserError: another number of images than of prompts, an empty or a truncated prompt, a source that
        `check_image` refuses, sources of unequal sizes.
        """
        if len(prompts) != len(images):
            raise UserError(
                f"there are {len(prompts)} prompts and {len(images)} source images; give one image for each prompt"
            )
        check_prompts(self.pipe, self.family, prompts, self.call)
        for number, image in enumerate(images, start=1):
            check_image(image, self.family, f"source image {number} of {len(images)}")
        rows = []
        for start in range(0, len(prompts), self.chunk):
            words, sources = prompts[start : start + self.chunk], images[start : start + self.chunk]
            calls = self.family.encode(self.pipe, words, sources, **self.call)
            rows += [
                record(self.pipe, self.family, **{**self.call, "image": image, **call})[0]
                for image, call in zip(sources, calls, strict=True)
            ]
        return stack(rows)


def editing_pipe(pipe: Any) -> Any:
    """The family's stock editing pipeline on the same weights; for one class that does both, `pipe` itself."""
    import diffusers

    family = family_of(pipe)
    name = family.editing
    if name is None:
        raise UserError(f"{family.name} has no editing pipeline in diffusers; give it generation teachers only")
    return pipe if type(pipe).__name__ == name else getattr(diffusers, name).from_pipe(pipe)


def check_image(image: Image, family: Family, name: str = "the source image") -> None:
    """UserError for a source that is no PIL image, has an alpha channel, is too small or too long.

    `name` is what the sentence calls the image, such as its path.
    """
    if not isinstance(image, Image):
        raise UserError(f"{name} is a {type(image).__name__}, not a PIL image; open it with PIL.Image.open")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        raise UserError(f"{name} has an alpha channel; flatten it, for example with image.convert('RGB')")
    width, height = image.size
    if min(width, height) < family.smallest_source:
        raise UserError(
            f"{name} is {width}x{height} pixels; give one with at least {family.smallest_source} pixels a side"
        )
    if max(width, height) > 8 * min(width, height):
        raise UserError(f"{name} is {width}x{height} pixels; crop it to at most 8 times as long as wide")
