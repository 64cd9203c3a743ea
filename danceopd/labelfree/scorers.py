"""Scorers of pictures that no training ever uses, so that a run's confidence can be compared with something else.

The built-in scenes have an exact scorer. Elsewhere a similarity model (CLIP, SigLIP) says how well a picture fits its
prompt, and an edited one how much better its instruction fits the result than the source; a model without a text tower
(DINO) says how like the teacher's own picture from the same noise it is. With neither, a frozen field that teaches none
of the rows denoises the picture under its prompt and under another: the better the right prompt helps, the better the
picture (a diffusion classifier, arXiv 2303.16203). Scores compare within one probe set only.
"""

from __future__ import annotations

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
from danceopd.worlds.scenes.prompts import Prompt
from danceopd.worlds.scenes.read import read_many
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
    """The built-in scenes' exact scorer: 1 or 0 for a prompt, O / 10 for an edit."""

    sentence = "the exact scorer of the scenes world"

    def __init__(self, decode: Decode, tasks: Sequence[Prompt | Edit]) -> None:
        self.decode, self.tasks = decode, tasks

    def __call__(self, clean: Tensor) -> Tensor:
        readings = read_many(self.decode(clean))
        seeds = len(clean) // len(self.tasks)
        scores = []
        for row, reading in enumerate(readings):
            task = self.tasks[row // seeds]
            if isinstance(task, Prompt):
                scores.append(float(score_prompt(task, reading).correct))
            else:
                scores.append(score_edit(task, reading).o / 10)
        return torch.tensor(scores)

    def calibrate(self, clean: Tensor) -> None:
        """Nothing to calibrate: it knows what is right."""


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
