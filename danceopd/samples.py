"""The fixed grid of a run: the same prompts, sources and noise at every look, so that eyes can compare.

One row of generation and one of editing for each source of work, and for each size of picture among its first
rows; drawn by the student as it would be exported.
"""

from __future__ import annotations

import torch
from PIL import Image

from danceopd.backbone import Backbone
from danceopd.data import Edits, edits_from, open_image, prompts_from
from danceopd.fields import AdapterField, MergedField, VelocityField
from danceopd.grid import grid
from danceopd.lora import Adapter
from danceopd.recipe import Recipe
from danceopd.work import Encoder

EMA = "ema"  # the averaged student on the backbone: drawn, measured and exported


class SampleGrid:
    """Conditions and noise of the grid, recorded once; `draw` costs one rollout for each capability.

    Drawn with W + BA, or with `merged` False through the LoRA layers (a sharded backbone has no whole W).
    """

    def __init__(
        self, recipe: Recipe, encoder: Encoder, backbone: Backbone, device: torch.device, merged: bool = True
    ) -> None:
        self.backbone, self.count, self.merged = backbone, recipe.samples.count, merged
        self.parts = []
        for capability in dict.fromkeys(t.capability for t in recipe.teachers):
            spec = next(recipe.work(t) for t in recipe.teachers if t.capability == capability)
            read = edits_from if capability == "editing" else prompts_from
            data = read(spec, self.count, recipe.seed + 1, check=False)
            first = range(min(self.count, len(data)))
            steps = encoder.draw[capability].call["num_inference_steps"]
            questions = encoder.questions(capability, data, first, steps)
            for layout in dict.fromkeys(map(questions.layout, first)):
                rows = [row for row in first if questions.layout(row) == layout]
                drawer = encoder.sized(capability, questions.size(rows[0]))
                noise = drawer.noise(rows).to(device)
                found = [data[row] for row in rows]
                words, sources = found, list[Image.Image]()
                if isinstance(data, Edits):
                    words, sources = [w for w, _ in found], [open_image(image) for _, image in found]
                self.parts.append((drawer, questions.rows(rows).to(noise.device), noise, words, sources))

    def draw(self, student: Adapter) -> Image.Image:
        """The grid as ``student`` draws it: a picture for each prompt, source and result for each edit."""
        field = looking(self.backbone, student, self.merged)
        rows: list[list[Image.Image | None]] = []
        labels: list[str] = []
        for drawer, condition, noise, words, sources in self.parts:
            *_, last = drawer.denoise(condition, noise, field)
            made = drawer.images(last.x)
            if not sources:
                rows.append(list(made))
                labels.append("generation: " + "; ".join(words))
                continue
            rows += [list(sources), list(made)]
            labels += ["editing, source", "edited: " + "; ".join(words)]
        return grid(rows, labels)


def looking(backbone: Backbone, student: Adapter, merged: bool) -> VelocityField:
    """The averaged `student` as a field; one adapter on the backbone serves for drawing, measuring and exporting it."""
    if EMA in backbone.adapters:
        backbone.assign(EMA, student)
    else:
        backbone.add_adapter(EMA, student)
    return (MergedField if merged else AdapterField)(backbone, EMA)
