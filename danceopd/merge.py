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
from danceopd.blend import blend
from danceopd.card import load_snippet, write_card
from danceopd.errors import UserError
from danceopd.fields import AdapterField
from danceopd.loop import STUDENT, Loop, Progress, Source
from danceopd.lora import Adapter, read_adapter
from danceopd.pipelines.families import family_of
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.recipe import Recipe
from danceopd.run import RunFolder
from danceopd.samples import SampleGrid
from danceopd.shipped import SHIPPED
from danceopd.student import Probe, export, load_student
from danceopd.work import call_of, conditions_of, drawers

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
    adapters = {t.name: _teacher(t.adapter, folder) for t in recipe.teachers}
    init = _init(recipe, adapters, folder)
    with RunFolder(recipe.output, recipe) as run:
        if run.finished:
            return Student(run.path, recipe.steps, 0.0)
        if report is not None:
            return _run(recipe, folder, adapters, init, run, report, began)
        from danceopd.progress import progress_line

        print(f"encoding what the teachers will be asked, then {recipe.steps} steps", file=sys.stderr, flush=True)
        with progress_line("merging") as line:
            drawn = lambda done, steps: line(done.step, steps, done.loss)  # noqa: E731
            return _run(recipe, folder, adapters, init, run, drawn, began)


def _run(
    recipe: Recipe,
    folder: Path,
    adapters: dict[str, Adapter | None],
    init: Adapter | None,
    run: RunFolder,
    report: Report,
    began: float,
) -> Student:
    _warn_of_scenes(recipe)
    device = _device(recipe.device)
    pipe = load_base(folder).to(device)
    family = family_of(pipe)
    call = call_of(folder, recipe.call)
    draw = drawers(pipe, family, call)
    fingerprint = base_fingerprint(folder)
    backbone = Backbone(pipe.transformer, family)
    sources = []
    for teacher in recipe.teachers:
        adapter = adapters[teacher.name]
        if adapter is not None:
            backbone.add_adapter(teacher.name, adapter, teacher.scale)
        field = AdapterField(backbone, None if adapter is None else teacher.name)
        work = conditions_of(recipe, teacher, draw[teacher.capability], fingerprint, run.path / "cache")
        sources.append(Source(teacher.name, field, work))
    grid = SampleGrid(recipe, draw, backbone)
    walk = GenerationPipeline(pipe, family, {**call, "steps": recipe.rollout.steps})
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init)
    loop = Loop(recipe, backbone, sources, walk.sigmas(), device)
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
            run.save(done.step, loop.state(), {"recipe": recipe.identity()})
        report(done, recipe.steps)
        if late and done.step < recipe.steps:
            raise _OutOfTime

    with suppress(_OutOfTime):
        loop.run(after)
    _export(recipe, folder, run, backbone, loop, adapters, fingerprint, call)
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


def _teacher(path: str, base: Path) -> Adapter | None:
    return None if path == "base" else read_adapter(path, empty_transformer(base))


def _init(recipe: Recipe, adapters: dict[str, Adapter | None], base: Path) -> Adapter | None:
    """The adapter that the student starts as; None for the bare base."""
    init = recipe.student.init
    if init == "base" or (init in adapters and adapters[init] is None):
        return None
    if init in adapters:
        return adapters[init]
    if init != "blend":
        return read_adapter(init, empty_transformer(base))
    given = recipe.student.init_weights
    even = 1 / len(adapters)
    parts = {name: a for name, a in adapters.items() if a is not None}
    return blend(list(parts.values()), [given.get(n, even) for n in parts], rank=recipe.student.rank)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and this machine has no CUDA device that torch can use; give --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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
    adapters: dict[str, Adapter | None],
    fingerprint: str,
    call: dict[str, Any],
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
        condition = source.conditions.rows(slice(0, 4)).to(loop.device)
        generator = torch.Generator().manual_seed(recipe.seed)
        x = torch.randn(len(condition), *condition.shape, generator=generator).to(loop.device)
        sigma = torch.linspace(1.0, 0.25, len(condition), device=loop.device)
        probes.append(Probe(x, sigma, condition, field(x, sigma, condition)))
    export(student, run.path, recipe.base, probes, metadata={"steps": str(loop.step), "seed": str(recipe.seed)})
    hashes = {name: a.sha256 for name, a in adapters.items() if a is not None}
    # The student is trained without guidance; stock pipelines would add it unasked.
    snippet = load_snippet(str(recipe.resolved()["base"]), {**call, **backbone.family.unguided})
    grid = run.path / "samples" / f"step-{loop.step:06d}.png"
    write_card(
        run.path,
        recipe,
        hashes=hashes | {"base": fingerprint, "student": student.sha256},
        snippet=snippet,
        grid=grid if grid.exists() else None,
    )
