"""Judges of pictures that no training ever uses, so that its confidence can be compared with something else.

In the exact world the scorer is exact. Elsewhere a similarity model (CLIP, SigLIP) says how well a picture fits its
prompt, and an edited one how much better its instruction fits the result than the source; a model without a text tower
(DINO) says how like the teacher's own picture from the same noise it is. With neither, a frozen field that teaches none
of the rows denoises the picture under its prompt and under another: the better the right prompt helps, the better the
picture (a diffusion classifier, arXiv 2303.16203). Scores compare within one panel only.
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
from danceopd.fields import VelocityField
from danceopd.pipelines.record import Condition
from danceopd.scenes.edits import Edit
from danceopd.scenes.prompts import Prompt
from danceopd.scenes.read import read_many
from danceopd.scenes.score import score_edit, score_prompt

Draw = Callable[[Tensor], Sequence[Image.Image]]
"""Clean latents (B, …) to B pictures."""
CHUNK = 32
"""Pictures that a similarity model looks at together."""


class Judge(Protocol):
    """Scores clean latents of fixed rows: prompt by prompt, the pictures of one side by side."""

    def __call__(self, clean: Tensor) -> Tensor:
        """Scores (rows,) of `clean (rows, …)`; higher is better."""
        ...

    def remember(self, clean: Tensor) -> None:
        """The teacher's own pictures of the same rows from the same noise, as latents."""
        ...


class Exact:
    """The exact world's scorer: 1 or 0 for a prompt, O / 10 for an edit."""

    sentence = "the exact scorer of the scenes world"

    def __init__(self, draw: Draw, tasks: Sequence[Prompt | Edit]) -> None:
        self.draw, self.tasks = draw, tasks

    def __call__(self, clean: Tensor) -> Tensor:
        readings = read_many(self.draw(clean))
        seeds = len(clean) // len(self.tasks)
        scores = []
        for row, reading in enumerate(readings):
            task = self.tasks[row // seeds]
            if isinstance(task, Prompt):
                scores.append(float(score_prompt(task, reading).correct))
            else:
                scores.append(score_edit(task, reading).o / 10)
        return torch.tensor(scores)

    def remember(self, clean: Tensor) -> None:
        """It knows what is right."""


class Similarity:
    """A frozen model of transformers, loaded once for all panels. UserError when it is none that can look at pictures.

    `path` is a folder or a name on the hub.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            self.model: Any = AutoModel.from_pretrained(path).requires_grad_(False).eval().to(device)
            self.processor: Any = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"watch.judge {path} does not load as a model with its processor ({reason})") from error
        self.device, self.reads = device, hasattr(self.model, "get_text_features")
        if not hasattr(self.processor, "image_processor" if self.reads else "image_mean"):
            raise UserError(f"watch.judge {path} looks at no pictures; give a folder of CLIP, SigLIP, DINO or the like")
        self.sentence = f"{type(self.model).__name__} {Path(path).name}, a frozen similarity model"

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (B, d) of pictures."""
        parts = []
        look: Any = getattr(self.processor, "image_processor", self.processor)
        for first in range(0, len(images), CHUNK):
            chunk = [image.convert("RGB") for image in images[first : first + CHUNK]]
            pixels = look(images=chunk, return_tensors="pt")["pixel_values"].to(self.device)
            parts.append(_pooled(self.model.get_image_features(pixels) if self.reads else self.model(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def words(self, texts: Sequence[str]) -> Tensor:
        """Features (B, d) of texts, cut at what the model can read."""
        longest = self.model.config.text_config.max_position_embeddings
        how: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": longest}
        tokens = self.processor.tokenizer(list(texts), return_tensors="pt", **how)
        return _pooled(self.model.get_text_features(**tokens.to(self.device)))


class Alike:
    """Scores by a similarity model: `words` (P,) and, for edits, `sources` (P,), one for each prompt."""

    def __init__(
        self, model: Similarity, draw: Draw, words: Sequence[str], sources: Sequence[Image.Image] = ()
    ) -> None:
        self.model, self.draw, self.prompts = model, draw, len(words)
        self.theirs: Tensor | None = None
        if model.reads:
            self.words = model.words(words)
            self.before = cosine_similarity(self.words, model.pictures(sources)) if sources else None

    def __call__(self, clean: Tensor) -> Tensor:
        seen, seeds = self.model.pictures(self.draw(clean)), len(clean) // self.prompts
        if not self.model.reads:
            assert self.theirs is not None  # begin() came first
            return cosine_similarity(seen, self.theirs)
        fit = cosine_similarity(seen, self.words.repeat_interleave(seeds, 0))
        return fit if self.before is None else fit - self.before.repeat_interleave(seeds, 0)

    def remember(self, clean: Tensor) -> None:
        """What a model without a text tower compares with."""
        if not self.model.reads:
            self.theirs = self.model.pictures(self.draw(clean))


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
                (self.field(x, sigma, asked.rows(rows).to(x0.device)) - (noise - x0)).square().flatten(1).mean(1)
                for asked in (self.contrast, self.condition)
            ]
            parts.append((errors[0] / errors[1]).log())
        return torch.cat(parts)

    def remember(self, clean: Tensor) -> None:
        """It compares with nobody."""


def _pooled(output: Any) -> Tensor:
    """The features of a model's output, whichever form its class gives them."""
    if isinstance(output, Tensor):
        return output.float()
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state.mean(1) if pooled is None else pooled).float()
