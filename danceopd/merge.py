"""The front door: `merge(recipe)` makes one student out of several teachers.

Everything that can be refused is refused before weights are loaded: recipe, output folder, every tensor name and
shape of every adapter. Then one backbone carries all adapters, the loop runs with a progress line, a sample grid
and a checkpoint every so often, and the averaged student is exported, loaded back by stock diffusers, and
compared. Running the same recipe again continues, or says that it is finished.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.base_model import base_fingerprint, base_folder, empty_transformer, load_base
from danceopd.card import load_snippet, write_card
from danceopd.extract import device_of
from danceopd.fields import AdapterField
from danceopd.loop import STUDENT, Loop, Progress, Source
from danceopd.lora import Adapter, read_adapter
from danceopd.pipelines.families import family_of
from danceopd.questions import alike
from danceopd.recipe import Recipe
from danceopd.run import RunFolder
from danceopd.samples import SampleGrid
from danceopd.shipped import SHIPPED
from danceopd.student import Probe, export, load_student
from danceopd.teachers import Known, look, null_condition, prepare, remember
from danceopd.warm_start import Start, warm_start
from danceopd.work import Asked, Encoder, call_of, drawers, open_work, release_encoders

_log = logging.getLogger("danceopd")
EXPORTED = "exported"  # the averaged student's name on the backbone


@dataclass(frozen=True)
class Student:
    """A merged student: its run folder, its steps, and the seconds this call took (0: it was finished before)."""

    folder: Path
    steps: int
    seconds: float

    def pipeline(self, **how: Any) -> Any:
        """The stock diffusers pipeline with the student in it (see `load_student`)."""
        return load_student(self.folder, **how)


Report = Callable[[Progress, int], None]


def merge(recipe: Recipe, report: Report | None = None) -> Student:
    """Merge the recipe's teachers; ``report(progress, steps)`` is called after every update.

    Without ``report`` a progress line with the time left is drawn. Raises UserError for anything that is wrong
    with the input, ExportError when the written file is not the student.
    """
    began = time.monotonic()
    folder = base_folder(recipe.base)
    known = look(recipe.teachers, folder)
    whole = any(teacher.checkpoint is not None for teacher in known)  # then its difference is taken in the run folder
    start = None if whole else _start(recipe, known, folder)
    with RunFolder(recipe.output, recipe) as run:
        if run.finished:
            return Student(run.path, recipe.steps, 0.0)
        asked = open_work(recipe)
        device, cache = device_of(recipe.device), run.path / "cache"
        starters = [k.teacher.name for k in known if recipe.student.init in ("blend", k.teacher.name)]
        known = [prepare(k, folder, cache, device, k.teacher.name in starters) for k in known]
        start = start or _start(recipe, known, folder)
        if report is not None:
            return _run(recipe, folder, known, start, asked, run, report, began)
        from danceopd.progress import progress_line

        print(start.sentence, file=sys.stderr, flush=True)
        print(f"encoding what the teachers will be asked, then {recipe.steps} steps", file=sys.stderr, flush=True)
        with progress_line("merging") as line:
            drawn = lambda done, steps: line(done.step, steps, done.loss)  # noqa: E731
            return _run(recipe, folder, known, start, asked, run, drawn, began)


def _run(
    recipe: Recipe,
    folder: Path,
    known: list[Known],
    start: Start,
    asked: dict[str, Asked],
    run: RunFolder,
    report: Report,
    began: float,
) -> Student:
    _warn_of_scenes(recipe)
    fingerprint, device = base_fingerprint(folder), device_of(recipe.device)
    whose = remember(run.path, fingerprint, known)
    pipe = load_base(folder).to(device)
    family = family_of(pipe, recipe.family)
    call = call_of(folder, recipe.call, family)
    draw = drawers(pipe, family, call, (t.capability for t in recipe.teachers), recipe.editing_base)
    backbone = Backbone(pipe.transformer, family)
    encoder = Encoder(folder, family, draw, recipe.editing_base)
    sources = []
    away = recipe.guidance.unconditional > 0 or recipe.rollout.guidance != 1  # then the student meets the null prompt
    for one in known:
        teacher, drawer, null = one.teacher, draw[one.teacher.capability], None
        if away or teacher.guidance is not None:
            null = null_condition(drawer, teacher, fingerprint, run.path / "cache").to(device)
        field = one.field(backbone, null)
        data, rows = asked[teacher.name].data, asked[teacher.name].rows
        questions = encoder.questions(teacher.capability, data, rows, recipe.rollout.steps)
        sources.append(Source(teacher.name, field, questions, null))
    grid = SampleGrid(recipe, encoder, backbone)
    release_encoders(encoder, pipe)
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, start.adapter)
    loop = Loop(recipe, backbone, sources, device)
    saved = run.load()
    if saved is not None:
        loop.restore(saved[0], saved[1])
    else:
        run.image(0, grid.draw(_averaged(backbone, loop.average)))

    def after(done: Progress) -> None:
        run.log(done.step, **done.scalars(), seconds=time.monotonic() - began, skipped=float(done.skipped))
        every = recipe.samples.every
        if done.step == recipe.steps or (every and done.step % every == 0):
            run.image(done.step, grid.draw(_averaged(backbone, loop.average)))
        late = recipe.time_limit is not None and time.monotonic() - began > 60 * recipe.time_limit
        if late or done.step == recipe.steps or done.step % recipe.save_every == 0:
            run.save(done.step, loop.state(), {"recipe": recipe.identity(), "weights": whose})
        report(done, recipe.steps)
        if late and done.step < recipe.steps:
            raise _OutOfTime

    with suppress(_OutOfTime):
        loop.run(after)
    _export(recipe, folder, run, backbone, loop, known, fingerprint, call, start)
    seconds = time.monotonic() - began
    run.finish(loop.step, seconds=round(seconds, 1))
    return Student(run.path, loop.step, seconds)


def _warn_of_scenes(recipe: Recipe) -> None:
    """The exact world's prompts suit the shipped base; another one deserves work of its own."""
    if recipe.resolved()["base"] in SHIPPED:
        return
    for key in sorted({t.capability for t in recipe.teachers if recipe.work(t).startswith("scenes")}):
        _log.warning("data.%s is the exact world of 64-pixel shapes; name your own prompts or pairs for this base", key)


class _OutOfTime(Exception):
    """The recipe's time limit is reached: export what there is."""


def _start(recipe: Recipe, known: list[Known], base: Path) -> Start:
    """Where the student starts, as `student.init` says."""
    teachers = {one.teacher.name: (one.adapter, one.teacher.scale) for one in known}
    student = recipe.student
    if student.init == "blend" and all(one.adapter is None for one in known):
        student = student.model_copy(update={"init": "base"})
    start = warm_start(
        student, teachers, lambda path: read_adapter(path, empty_transformer(base)), seed=recipe.seed
    )
    _log.info(start.sentence)
    return start


def _averaged(backbone: Backbone, average: list[Tensor]) -> Adapter:
    """The student with its averaged weights (A and B alternate, in the backbone's order)."""
    modules = backbone.modules(STUDENT)
    pairs = zip(average[::2], average[1::2], strict=True)
    return Adapter({m: (a.cpu().clone(), b.cpu().clone()) for m, (a, b) in zip(modules, pairs, strict=True)})


def _export(
    recipe: Recipe,
    base: Path,
    run: RunFolder,
    backbone: Backbone,
    loop: Loop,
    known: list[Known],
    fingerprint: str,
    call: dict[str, Any],
    start: Start,
) -> None:
    """Write the averaged student, proven through the stock pipeline, and its card."""
    student = _averaged(backbone, loop.average)
    if EXPORTED not in backbone.adapters:
        backbone.add_adapter(EXPORTED, student)
    else:
        backbone.assign(EXPORTED, student)
    field = AdapterField(backbone, EXPORTED)
    probes = []
    for source in loop.sources:
        condition = source.questions.rows(alike(source.questions, 4)).to(loop.device)
        generator = torch.Generator().manual_seed(recipe.seed)
        x = torch.randn(len(condition), *condition.shape, generator=generator).to(loop.device)
        sigma = torch.linspace(1.0, 0.25, len(condition), device=loop.device)
        probes.append(Probe(x, sigma, condition, field(x, sigma, condition)))
    export(student, run.path, recipe.base, probes, metadata={"steps": str(loop.step), "seed": str(recipe.seed)})
    hashes = {one.teacher.name: one.sha256 for one in known if one.sha256 is not None}
    # The student is trained without guidance; stock pipelines would add it unasked.
    snippet = load_snippet(str(recipe.resolved()["base"]), {**call, **backbone.family.unguided})
    grid = run.path / "samples" / f"step-{loop.step:06d}.png"
    write_card(
        run.path,
        recipe,
        hashes=hashes | {"base": fingerprint, "student": student.sha256},
        snippet=snippet,
        grid=grid if grid.exists() else None,
        start=start.sentence,
    )
