"""Held-out rows, of the field gap and the watch's panels: prompts and edits that the run never learns from, and who
judges their pictures.

Of the exact world, tasks of its validation split; of other data, rows that no update draws. They are encoded once,
like the run's own, into the same store. Edits keep their sizes; prompts of one layout stand together, and each is
contrasted with the next one.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from danceopd.anchors import Alike, Denoiser, Exact, Judge, Similarity
from danceopd.data import Edits, Prompts, is_made, made_tasks, open_image
from danceopd.errors import UserError
from danceopd.fields import VelocityField
from danceopd.images import Source
from danceopd.panels import Framed, Held, Panel
from danceopd.paraphrase import paraphrases
from danceopd.pipelines.record import Condition
from danceopd.questions import unprompted
from danceopd.recipe import Recipe, Teacher
from danceopd.scenes.edits import Edit
from danceopd.scenes.grammar import IMAGE
from danceopd.scenes.prompts import Prompt
from danceopd.scenes.render import render
from danceopd.tables import MadeTable
from danceopd.variants import other_words
from danceopd.work import Asked, Encoder, StoredQuestions

LOOKED = 40
"""Rows of a table that are looked at for each that is wanted: some are drawn, said before, or faulty."""
NOISE = 1 << 20
"""Seed of the first picture; those of the sample grid begin at 0."""
_log = logging.getLogger("danceopd")


@dataclass(frozen=True)
class Row:
    """One held-out prompt, or instruction with its source; `task` is what the exact world's scorer asks."""

    words: str
    source: Source | None = None
    task: Prompt | Edit | None = None
    framings: Sequence[str] = ()


@dataclass(frozen=True)
class Fields:
    """The frozen fields by teacher's name, and the bare base's."""

    teachers: Mapping[str, VelocityField]
    base: VelocityField


def panels(
    recipe: Recipe, encoder: Encoder, asked: Mapping[str, Asked], fields: Fields, device: torch.device
) -> tuple[list[Panel], str]:
    """A panel for each teacher with held-out rows, and who judges them, in words."""
    knobs, found, said = recipe.watch, [], dict[str, None]()
    model = None if knobs.judge is None else Similarity(knobs.judge, device)
    for teacher in recipe.teachers:
        rows = held_rows(recipe, teacher, asked[teacher.name], max(2, knobs.prompts // len(recipe.teachers)))
        maker = _Maker(recipe, teacher, encoder, fields, device, model)
        held = [one for members in maker.layouts(rows) if (one := maker.held(members)) is not None]
        if not held:
            _log.warning("the watch has no prompts for %s: no two of its held-out rows are of one size", teacher.name)
            continue
        said |= dict.fromkeys(maker.said)
        panel = Panel(teacher.name, fields.teachers[teacher.name], held, device, maker.chunk)
        panel.progress = recipe.gates.evidence is not None
        found.append(panel)
    return found, " and ".join(said)


def held_rows(recipe: Recipe, teacher: Teacher, asked: Asked, count: int) -> list[Row]:
    """`count` rows at most for one teacher that no update draws; where there are not two, some that are drawn."""
    spec = recipe.work(teacher)
    if is_made(spec):
        tasks = made_tasks(spec, teacher.capability, "val", count, recipe.seed)
        return [_made(task) for task in tasks]
    data, drawn, found = asked.data, set(asked.rows), dict[str, Row]()
    looked = random.Random(f"watch/{recipe.seed}").sample(range(len(data)), min(len(data), LOOKED * count))
    for row in sorted(looked, key=drawn.__contains__):
        if len(found) == count or (row in drawn and len(found) > 1):
            break
        try:
            words, source = data[row] if isinstance(data, Edits) else (data[row], None)
            if isinstance(data, Edits):
                data.size(row)
            found.setdefault(words, Row(words, source, None, other_words(data, row)))
        except UserError:
            continue
    if drawn.issuperset(looked):
        _log.warning(
            "teacher %s: the updates learn from every row of %s, so it is watched on rows that are learnt from; a few "
            "rows more would be held out", teacher.name, spec,
        )  # fmt: skip
    elif len(found) < count:
        _log.warning(
            "teacher %s: of %s only %d rows are not learnt from, where %d were to be held out to watch it by",
            teacher.name, spec, len(found), count,
        )  # fmt: skip
    return list(found.values())


def encoded(
    recipe: Recipe, teacher: Teacher, encoder: Encoder, rows: Sequence[Row], words: Sequence[str] | None = None
) -> StoredQuestions:
    """The rows as a teacher is asked them, numbered as they stand; under other `words`, where given."""
    words = [row.words for row in rows] if words is None else words
    if teacher.capability != "editing":
        data = Prompts(MadeTable("held-out rows", [{"prompt": said} for said in words]))
    else:
        cells = [
            {"instruction": said, "source": row.source if isinstance(row.source, Image.Image) else str(row.source)}
            for said, row in zip(words, rows, strict=True)
        ]
        data = Edits(MadeTable("held-out rows", cells))
    return encoder.questions(teacher.capability, data, range(len(words)), recipe.rollout.steps)


def by_layout(questions: StoredQuestions, rows: Iterable[int]) -> list[list[int]]:
    """The rows by layout and schedule."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        key = questions.layout(row), tuple(questions.sigmas(row).tolist())
        groups.setdefault(key, []).append(row)
    return list(groups.values())


class _Maker:
    """Makes one teacher's rows into what a panel asks; `said` are its judges, in words."""

    def __init__(
        self, recipe: Recipe, teacher: Teacher, encoder: Encoder, fields: Fields, device: torch.device,
        model: Similarity | None,
    ) -> None:  # fmt: skip
        self.recipe, self.teacher, self.encoder = recipe, teacher, encoder
        self.fields, self.device, self.model = fields, device, model
        self.chunk = max(recipe.micro_batch or recipe.batch, recipe.watch.seeds)
        self.said: list[str] = []

    def layouts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows, encoded, by layout and schedule."""
        self.rows = rows
        self.questions = encoded(self.recipe, self.teacher, self.encoder, rows)
        return by_layout(self.questions, range(len(rows)))

    def held(self, members: list[int]) -> Held | None:
        """Rows of one layout; None for a single one, which has no other to be contrasted with."""
        if len(members) < 2:
            return None
        seeds, rows = self.recipe.watch.seeds, [self.rows[i] for i in members]
        drawer = self.encoder.sized(self.teacher.capability, self.questions.size(members[0]))
        noise = drawer.noise([NOISE + i * seeds + s for i in members for s in range(seeds)])
        condition, sigmas = self.questions.rows(members), self.questions.sigmas(members[0])
        contrast = unprompted(condition, self.questions.rows(members[1:] + members[:1]))
        tasks = [row.task for row in rows if row.task is not None]
        judge: Judge
        if self.model is not None:
            sources = [open_image(row.source) for row in rows if row.source is not None]
            judge, said = Alike(self.model, drawer.images, [row.words for row in rows], sources), self.model.sentence
        elif len(tasks) == len(rows) and (drawer.height, drawer.width) == (IMAGE, IMAGE):
            judge = Exact(drawer.images, tasks)
            said = judge.sentence
        else:
            field, whose = self._stranger()
            level = float(sigmas[(len(sigmas) - 1) // 2])
            again = drawer.noise([2 * NOISE + i * seeds + s for i in members for s in range(seeds)])
            judge = Denoiser(field, condition, contrast, again, level, self.chunk)
            said = f"{whose} (a weak judge; give watch.judge a similarity model)"
        self.said.append(said)
        return Held(condition, contrast, noise, sigmas, judge, self._framed(members))

    def _stranger(self) -> tuple[VelocityField, str]:
        """A frozen field that is asked about none of these rows in training, and whose it is."""
        mine = {t.name for t in self.recipe.teachers if t.capability == self.teacher.capability}
        if all(t.adapter != "base" for t in self.recipe.teachers if t.name in mine):
            return self.fields.base, "how the base denoises the pictures"
        other = next((t.name for t in self.recipe.teachers if t.name not in mine), None)
        if other is None:
            return self.fields.base, "how the base, a teacher itself, denoises the pictures"
        return self.fields.teachers[other], f"how teacher {other} denoises the pictures"

    def _framed(self, members: list[int]) -> Framed | None:
        """Answers to the framings of a consensus gate: other words."""
        knobs = self.recipe.gates.consensus
        if knobs is None:
            return None
        said = [[self.rows[i].words, *self.rows[i].framings][: knobs.framings] for i in members]
        framings: list[Condition] = []
        for place in range(max(map(len, said))):
            mine = [some[min(place, len(some) - 1)] for some in said]
            words = encoded(self.recipe, self.teacher, self.encoder, [self.rows[i] for i in members], mine)
            if any(words.layout(i) != self.questions.layout(members[0]) for i in range(len(members))):
                return None
            framings.append(words.rows(list(range(len(members)))))
        counts = torch.tensor([len(some) for some in said])

        def reworded(field: VelocityField, x: Tensor, sigma: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            answers = torch.stack([field(x, sigma, one.rows(rows).to(self.device)) for one in framings])
            return answers, torch.arange(len(framings))[:, None] < counts[rows]

        return reworded


def _made(task: Prompt | Edit) -> Row:
    if isinstance(task, Prompt):
        return Row(task.prompt, None, task, paraphrases(task.prompt))
    return Row(task.instruction, Image.fromarray(render(task.source)), task, paraphrases(task.instruction))
