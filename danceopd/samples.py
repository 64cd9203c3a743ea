"""The fixed grid of a run: the same prompts, sources and noise at every look, so that eyes can compare.

One row of generation and one of editing for each source of work; drawn by the student as it would be exported.
"""

from __future__ import annotations

from PIL import Image

from danceopd.backbone import Backbone
from danceopd.data import edits_from, open_image, prompts_from
from danceopd.fields import MergedField
from danceopd.grid import grid
from danceopd.lora import Adapter
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.recipe import Recipe

LOOK = "look"  # the adapter on the backbone that the grid is drawn with


class SampleGrid:
    """Conditions and noise of the grid, recorded once; `draw` costs one rollout for each capability."""

    def __init__(self, recipe: Recipe, draw: dict[str, GenerationPipeline], backbone: Backbone) -> None:
        self.backbone, self.count = backbone, recipe.samples.count
        self.parts = []
        for capability in dict.fromkeys(t.capability for t in recipe.teachers):
            drawer = draw[capability]
            spec = next(recipe.work(t) for t in recipe.teachers if t.capability == capability)
            sources: list[Image.Image] = []
            if isinstance(drawer, EditingPipeline):
                pairs = edits_from(spec, self.count, recipe.seed + 1)[: self.count]
                words, sources = [w for w, _ in pairs], [open_image(image) for _, image in pairs]
                condition = drawer.conditions(words, sources)
            else:
                words = prompts_from(spec, self.count, recipe.seed + 1)[: self.count]
                condition = drawer.conditions(words)
            noise = drawer.noise(list(range(len(words)))).to(backbone.transformer.device)
            self.parts.append((drawer, condition.to(noise.device), noise, words, sources))

    def draw(self, student: Adapter) -> Image.Image:
        """The grid as ``student`` draws it: a picture for each prompt, source and result for each edit."""
        if LOOK in self.backbone.adapters:
            self.backbone.assign(LOOK, student)
        else:
            self.backbone.add_adapter(LOOK, student)
        field = MergedField(self.backbone, LOOK)
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
