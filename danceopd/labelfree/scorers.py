"""Scorers of pictures that no training ever uses, so that a run's confidence can be compared with something else.

The built-in scenes have an exact scorer. Elsewhere a similarity model (CLIP, SigLIP) says how well a picture fits its
prompt, and an edited one how much better its instruction fits the result than the source; a model without a text tower
(DINO) says how like the teacher's own picture from the same noise it is. With neither, a frozen field that teaches none
of the rows denoises the picture under its prompt and under another: the better the right prompt helps, the better the
picture (a diffusion classifier, arXiv 2303.16203). Scores compare within one probe set only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from danceopd.errors import UserError
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import Condition
from danceopd.worlds.scenes.edits import Edit
from danceopd.worlds.scenes.grammar import BACKGROUNDS, CELL, COLOURS
from danceopd.worlds.scenes.prompts import Prompt
from danceopd.worlds.scenes.read import Reading, read_many
from danceopd.worlds.scenes.score import score_edit, score_prompt

Decode = Callable[[Tensor], Sequence[Image.Image]]
"""Clean latents (B, …) to B pictures."""
CHUNK = 32
"""Pictures in one batch of a similarity model."""


class Scorer(Protocol):
    """Scores clean latents of fixed rows: prompt by prompt, the pictures of one side by side."""

    def __call__(self, clean: Tensor) -> Tensor:
        """Scores (rows,) of `clean (rows, …)`; higher is better."""
        ...

    def calibrate(self, clean: Tensor) -> None:
        """The teacher's own pictures of the same rows from the same noise, as latents."""
        ...


class Exact:
    """The built-in scenes' exact scorer: 1 or 0 for a prompt, O / 10 for an edit.

    `open_shift` is how far the last pictures' backgrounds, colours and places, where prompts leave them open, are
    distributed otherwise than the teacher's: total variation in [0, 1], a mean over the three; None for edits.
    """

    sentence = "the exact scorer of the scenes world"

    def __init__(self, decode: Decode, tasks: Sequence[Prompt | Edit]) -> None:
        self.decode, self.tasks = decode, tasks
        self.open_shift: float | None = None
        self._theirs: dict[str, Counter] = {}

    def __call__(self, clean: Tensor) -> Tensor:
        readings = read_many(self.decode(clean))
        seeds = len(clean) // len(self.tasks)
        mine = self._open(readings)
        shifts = [total_variation(mine[name], theirs) for name, theirs in self._theirs.items() if mine[name]]
        self.open_shift = sum(shifts) / len(shifts) if shifts else None
        scores = []
        for row, reading in enumerate(readings):
            task = self.tasks[row // seeds]
            if isinstance(task, Prompt):
                scores.append(float(score_prompt(task, reading).correct))
            else:
                scores.append(score_edit(task, reading).o / 10)
        return torch.tensor(scores)

    def calibrate(self, clean: Tensor) -> None:
        """Knows what is right, and compares what is open with the teacher's."""
        found = self._open(read_many(self.decode(clean)))
        self._theirs = {name: counts for name, counts in found.items() if counts}

    def _open(self, readings: Sequence[Reading]) -> dict[str, Counter]:
        """Counts of each background, colour and cell of the grid in pictures whose prompt does not say it."""
        seeds = len(readings) // len(self.tasks)
        found: dict[str, Counter] = {"background": Counter(), "colour": Counter(), "place": Counter()}
        for row, reading in enumerate(readings):
            task, scene = self.tasks[row // seeds], reading.scene
            if isinstance(task, Edit):
                continue
            said = set(task.prompt.split())
            if not said & set(BACKGROUNDS):
                found["background"][scene.background] += 1
            for thing in scene.things:
                if not said & set(COLOURS):
                    found["colour"][thing.colour] += 1
                if task.tag != "position":
                    found["place"][int(thing.x // CELL), int(thing.y // CELL)] += 1
        return found


def total_variation(a: Counter, b: Counter) -> float:
    """Of the shares of two counts, in [0, 1]; neither is empty."""
    return sum(abs(a[key] / a.total() - b[key] / b.total()) for key in a.keys() | b.keys()) / 2


class Similarity:
    """A frozen model of transformers, loaded once for all probe sets. UserError when it is none that can look at
    pictures.

    `path` is a folder or a name on the hub.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            self.model: Any = AutoModel.from_pretrained(path).requires_grad_(False).eval().to(device)
            self.processor: Any = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"monitor.judge {path} does not load as a model with its processor ({reason})") from error
        self.device, self.reads = device, hasattr(self.model, "get_text_features")
        if not hasattr(self.processor, "image_processor" if self.reads else "image_mean"):
            raise UserError(f"monitor.judge {path} reads no pictures; give a folder of CLIP, SigLIP, DINO or the like")
        self.sentence = f"{type(self.model).__name__} {Path(path).name}, a frozen similarity model"

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (B, d) of pictures."""
        parts = []
        processor: Any = getattr(self.processor, "image_processor", self.processor)
        for first in range(0, len(images), CHUNK):
            chunk = [image.convert("RGB") for image in images[first : first + CHUNK]]
            pixels = processor(images=chunk, return_tensors="pt")["pixel_values"].to(self.device)
            parts.append(_pooled(self.model.get_image_features(pixels) if self.reads else self.model(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (B, d) of texts, cut at what the model can read."""
        longest = self.model.config.text_config.max_position_embeddings
        how: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": longest}
        tokens = self.processor.tokenizer(list(texts), return_tensors="pt", **how)
        return _pooled(self.model.get_text_features(**tokens.to(self.device)))


class SimilarityScorer:
    """Scores by a similarity model: `prompts` (P,) and, for edits, `sources` (P,), one for each prompt."""

    def __init__(
        self, model: Similarity, decode: Decode, prompts: Sequence[str], sources: Sequence[Image.Image] = ()
    ) -> None:
        self.model, self.decode, self.prompts = model, decode, len(prompts)
        self.theirs: Tensor | None = None
        if model.reads:
            self.text = model.texts(prompts)
            self.before = cosine_similarity(self.text, model.pictures(sources)) if sources else None

    def __call__(self, clean: Tensor) -> Tensor:
        features, seeds = self.model.pictures(self.decode(clean)), len(clean) // self.prompts
        if not self.model.reads:
            assert self.theirs is not None  # calibrate() came first
            return cosine_similarity(features, self.theirs)
        fit = cosine_similarity(features, self.text.repeat_interleave(seeds, 0))
        return fit if self.before is None else fit - self.before.repeat_interleave(seeds, 0)

    def calibrate(self, clean: Tensor) -> None:
        """What a model without a text tower compares with."""
        if not self.model.reads:
            self.theirs = self.model.pictures(self.decode(clean))


class Denoiser:
    """A frozen field: the log ratio of its errors on a noised picture under another prompt and under its own.

    `condition` and `contrast` have a row for each prompt, `noise` one for each picture, `sigma` is one noise level.
    """

    def __init__(
        self, field: VelocityField, condition: Condition, contrast: Condition, noise: Tensor, sigma: float, chunk: int
    ) -> None:
        self.field, self.condition, self.contrast = field, condition, contrast
        self.noise, self.sigma, self.chunk = noise, sigma, chunk

    @torch.no_grad()
    def __call__(self, clean: Tensor) -> Tensor:
        seeds, parts = len(clean) // len(self.condition), []
        for first in range(0, len(clean), self.chunk):
            x0 = clean[first : first + self.chunk]
            noise = self.noise[first : first + self.chunk].to(x0)
            rows = [row // seeds for row in range(first, first + len(x0))]
            x, sigma = torch.lerp(x0, noise, self.sigma), torch.full((len(x0),), self.sigma, device=x0.device)
            errors = [
                (self.field(x, sigma, condition.rows(rows).to(x0.device)) - (noise - x0)).square().flatten(1).mean(1)
                for condition in (self.contrast, self.condition)
            ]
            parts.append((errors[0] / errors[1]).log())
        return torch.cat(parts)

    def calibrate(self, clean: Tensor) -> None:
        """Nothing to calibrate: it compares with no other picture."""


def _pooled(output: Any) -> Tensor:
    """The features of a model's output, whichever form its class gives them."""
    if isinstance(output, Tensor):
        return output.float()
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state.mean(1) if pooled is None else pooled).float()
