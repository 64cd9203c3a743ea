"""The sample grid of a run: the same prompts, sources and noise every time, so that eyes can compare.

One row of pictures for generation and two (source, result) for editing, for each picture size among the first rows of
the data; teachers that have other data or other triggers have rows of their own. Drawn by the student's EMA, as it
would be exported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from PIL import Image

from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder
from danceopd.data.images import edited_picture, flattened
from danceopd.data.sources import Edits, edits_from, prompts_from
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer
from danceopd.models.fields import VelocityField, acting, in_micro_batches
from danceopd.recipe.parts import Columns, Teacher
from danceopd.recipe.recipe import Recipe
from danceopd.run.logger import Logger
from danceopd.run.plots import grid


class SampleGrid:
    """Conditions and noise of the grid, encoded once; `draw` costs one rollout for each capability."""

    def __init__(
        self, recipe: Recipe, encoder: Encoder, device: torch.device, datasets: Mapping[str, TeacherData] | None = None
    ) -> None:
        """`samples.count` pictures of each capability, shared by the teachers whose data or triggers differ.

        The built-in scenes are others than those of training. A forward has at most `micro_batch` pictures.
        """
        self.device, self.micro_batch, count, seed = device, recipe.rows_at_once, recipe.samples.count, recipe.seed + 1
        self.parts = []
        sources = dict[tuple[str, str, Columns, str | None], Teacher]()
        for teacher in recipe.teachers:
            key = teacher.capability, recipe.data_source(teacher), recipe.columns(teacher), teacher.trigger
            sources.setdefault(key, teacher)
        of_capability = Counter(capability for capability, *_ in sources)
        for (capability, spec, columns, _), teacher in sources.items():
            read = edits_from if capability == "editing" else prompts_from
            share = max(1, count // of_capability[capability])
            data = None if datasets is None else datasets[teacher.name].data.held_out
            data = data or read(spec, share, seed, check=False, columns=columns).worded(teacher.worded)
            first = range(min(share, len(data)))
            steps = encoder.pipelines[capability].call["num_inference_steps"]
            dataset = encoder.encode(capability, data, first, steps)
            for layout in dict.fromkeys(map(dataset.layout, first)):
                rows = [row for row in first if dataset.layout(row) == layout]
                pipeline = encoder.sized(capability, dataset.size(rows[0]))
                noise = pipeline.noise(rows).cpu()
                found = [data[row] for row in rows]
                prompts, originals = found, list[Image.Image]()
                if isinstance(data, Edits):
                    prompts = [p for p, _ in found]
                    originals = [edited_picture(given) for _, given in found]
                self.parts.append((pipeline, dataset.rows(rows), noise, prompts, originals))

    def draw(self, student: VelocityField) -> Image.Image:
        """The grid as `student` draws it: a picture for each prompt, source and result for each edit."""
        rows: list[list[Image.Image | None]] = []
        labels: list[str] = []
        for pipeline, condition, noise, prompts, sources in self.parts:
            field = in_micro_batches(student, self.micro_batch)
            with acting(student):
                *_, last = pipeline.denoise(condition.to(self.device), noise.to(self.device), field)
            made = [flattened(one) for one in pipeline.images(last.x)]
            if not sources:
                rows.append(list(made))
                labels.append("generation: " + "; ".join(prompts))
                continue
            rows += [list(sources), list(made)]
            labels += ["editing, source", "edited: " + "; ".join(prompts)]
        return grid(rows, labels)


class Samples(Callback):
    """Draws the grid at the start, every so many steps (0: not between), and at the end.

    `grid` is None in processes that do not draw, `logger` in all but the first.
    """

    def __init__(self, grid: SampleGrid | None, logger: Logger | None, every: int) -> None:
        self.grid, self.logger, self.every = grid, logger, every

    def on_train_start(self, trainer: Trainer) -> None:
        if self.grid is not None and trainer.step == 0:
            self.draw(trainer, 0, trainer.ema_field())

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        due = trainer.step == trainer.steps or (self.every and trainer.step % self.every == 0)
        if self.grid is not None and due:
            self.draw(trainer, trainer.step, trainer.ema_field())

    def draw(self, trainer: Trainer, step: int, student: VelocityField) -> None:
        """Draw `student` as the grid of `step`."""
        if self.grid is not None:
            picture = self.grid.draw(student)
            if self.logger is not None:
                self.logger.image(step, picture)
