"""`Batches`: a step goes in, a supervised batch of synthetic scenes comes out, a function of (seed, step).

So a resumed run sees the same data. A batch is all generation or all editing (their token counts differ). Only scenes
of the training split appear, none with a held-out binding or operation. Each prompt is encoded once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from danceopd.worlds.scenes.edits import Edit, draw_edit
from danceopd.worlds.scenes.prompts import Prompt, draw_prompt
from danceopd.worlds.toy.codes import CellTable
from danceopd.worlds.toy.small import CALL


@dataclass(frozen=True)
class Mix:
    """What batches hold: relative weights of generation tags and of editing tasks, and the share of generation."""

    tags: Mapping[str, float]
    tasks: Mapping[str, float]
    generation: float


@dataclass
class Batch:
    """Clean tokens (n, 16, C), text states (n, L, D), those of the empty prompt (L, D), and source tokens (n, 16, C).

    ``source`` is None for generation.
    """

    clean: Tensor
    text: Tensor
    empty: Tensor
    source: Tensor | None


class Batches:
    """``batches(step) -> Batch`` of ``size`` rows, one row in ten with an empty prompt."""

    def __init__(
        self, pipe: Flux2KleinPipeline, table: CellTable, mix: Mix, size: int, seed: int, drop: float = 0.1
    ) -> None:
        self.pipe, self.table, self.mix, self.size, self.seed, self.drop = pipe, table, mix, size, seed, drop
        self._texts: dict[str, Tensor] = {}

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        if rng.random() < self.mix.generation:
            items: list = [self._prompt(rng) for _ in range(self.size)]
            scenes, prompts, source = [p.scene for p in items], [p.prompt for p in items], None
        else:
            items = [self._edit(rng) for _ in range(self.size)]
            scenes, prompts = [e.target for e in items], [e.instruction for e in items]
            source = self.table.encode([e.source for e in items])
        prompts = ["" if rng.random() < self.drop else prompt for prompt in prompts]
        return Batch(self.table.encode(scenes), self.text(prompts), self.text([""])[0], source)

    def _prompt(self, rng: random.Random) -> Prompt:
        while True:
            tag = rng.choices(list(self.mix.tags), list(self.mix.tags.values()))[0]
            prompt = draw_prompt(rng, tag, tail=0.5)
            if prompt.scene.split() == "train":
                return prompt

    def _edit(self, rng: random.Random) -> Edit:
        while True:
            task = rng.choices(list(self.mix.tasks), list(self.mix.tasks.values()))[0]
            edit = None
            while edit is None or not (edit.source.split() == edit.target.split() == "train"):
                edit = draw_edit(rng, task)
            return edit

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Text states (n, L, D) as the stock pipeline computes them."""
        missing = sorted({prompt for prompt in prompts if prompt not in self._texts})
        if missing:
            states, _ = self.pipe.encode_prompt(missing, max_sequence_length=CALL["max_sequence_length"])
            self._texts.update(zip(missing, states, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])
