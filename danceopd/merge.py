"""The front door: `merge(recipe)` makes one student out of several teachers.

Everything that can be refused is refused before weights are loaded: recipe, output folder, every tensor name and
shape of every adapter. Then one backbone carries all adapters, the loop runs with a progress line, a sample grid
and a checkpoint every so often, and the averaged student is exported, loaded back by stock diffusers, and
compared. Running the same recipe again continues, or says that it is finished. Of several processes the first
checks, encodes and writes; all learn.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd import heldout
from danceopd.attention import install
from danceopd.backbone import Backbone
from danceopd.base_model import base_fingerprint, base_folder, empty_transformer, load_base
from danceopd.blocks import compile_blocks
from danceopd.card import load_snippet, write_card
from danceopd.errors import UserError
from danceopd.fields import AdapterField, BaseField, VelocityField
from danceopd.figures import Progress
from danceopd.formats import DTYPES
from danceopd.interrupts import Interrupts
from danceopd.loop import STUDENT, Loop, Source
from danceopd.lora import Adapter, read_adapter
from danceopd.objectives import needs_targets
from danceopd.pipelines.families import family_of
from danceopd.pipelines.hollow import hollow
from danceopd.processes import Processes
from danceopd.questions import alike
from danceopd.random_state import RandomState
from danceopd.recipe import Recipe
from danceopd.reuse import refuse_reuse
from danceopd.run import RunFolder
from danceopd.samples import SampleGrid, looking
from danceopd.sharded import Sharded, shard
from danceopd.shipped import SHIPPED
from danceopd.student import Probe, export, load_student
from danceopd.teachers import Known, at_strengths, contrast_null, look, null_condition, prepare, remember
from danceopd.variants import KEEP, kept
from danceopd.warm_start import Start, warm_start
from danceopd.watch import Watch, recall
from danceopd.watching import ROLLED, Watching
from danceopd.work import Asked, Encoder, call_of, drawers, open_work, release_encoders

_log = logging.getLogger("danceopd")
EXPORTED = "exported"  # the averaged student's name on the backbone


@dataclass(frozen=True)
class Student:
    """A merged student: its run folder, its steps, and the seconds this call took (0: it was finished before).

    Of several processes the `first` wrote it; the others know no more of it than this.
    """

    folder: Path
    steps: int
    seconds: float
    first: bool = True

    def pipeline(self, **how: Any) -> Any:
        """The stock diffusers pipeline with the student in it (see `load_student`)."""
        return load_student(self.folder, **how)


Report = Callable[[Progress, int], None]


@dataclass(frozen=True)
class _Job:
    """What was checked and opened before weights are loaded. `run` is the first process's alone."""

    recipe: Recipe
    base: Path
    known: list[Known]
    start: Start
    asked: dict[str, Asked]
    run: RunFolder | None
    processes: Processes
    began: float


def merge(recipe: Recipe, report: Report | None = None) -> Student:
    """Merge the recipe's teachers; ``report(progress, steps)`` is called after every update.

    Without ``report`` a progress line with the time left is drawn. Raises UserError for anything that is wrong
    with the input, ExportError when the written file is not the student. SIGTERM and Ctrl-C end the update at hand
    and save it; then it raises SystemExit(143) or KeyboardInterrupt.
    """
    began = time.monotonic()
    processes, run = Processes(recipe.device), None
    try:
        with processes.first():
            folder = base_folder(recipe.base)
            if recipe.rollout.keep_source:
                refuse_reuse(family_of(folder, recipe.family))
            known = look(recipe.teachers, folder)
            whole = any(teacher.checkpoint is not None for teacher in known)  # its difference is taken in the folder
            start = None if whole else _start(recipe, known, folder)
            if processes.main:
                run = RunFolder(recipe.output, recipe)
            finished = run is not None and run.finished
            if not finished:
                asked = open_work(recipe)
                cache, init = recipe.output / "cache", recipe.student.init
                starters = [k.teacher.name for k in known if init in ("blend", k.teacher.name)]
                known = [prepare(k, folder, cache, processes.device, k.teacher.name in starters) for k in known]
                _refuse_streamed(recipe, known, processes)
                start = start or _start(recipe, known, folder)
        if processes.said(finished):
            return Student(recipe.output, recipe.steps, 0.0, processes.main)
        assert start is not None
        job = _Job(recipe, folder, known, start, asked, run, processes, began)
        if report is not None or not processes.main:
            return _run(job, report or (lambda done, steps: None))
        from danceopd.progress import progress_line

        print(start.sentence, file=sys.stderr, flush=True)
        print(f"encoding what the teachers will be asked, then {recipe.steps} steps", file=sys.stderr, flush=True)
        with progress_line("merging") as line:
            return _run(job, lambda done, steps: line(done.step, steps, done.loss))
    except _Stopped as stopped:
        if processes.main:
            print(f"\nstep {stopped.step} of {recipe.steps} is saved in {recipe.output}", file=sys.stderr, flush=True)
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt from None
        if processes.main:
            print("stopped; run the same command again to continue", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped.signal) from None
    finally:
        if run is not None:
            run.close()


def _run(job: _Job, report: Report) -> Student:
    recipe, processes, run = job.recipe, job.processes, job.run
    device, split = processes.device, _split(recipe, processes)
    if processes.main:
        _warn_of_scenes(recipe)
    fingerprint = processes.said(base_fingerprint(job.base) if processes.main else "")
    with processes.first():
        whose = remember(run.path, fingerprint, job.known) if run is not None else {}
    pipe = load_base(job.base, _stock(recipe))
    transformer = pipe.transformer
    if split:  # it goes to the device block by block
        pipe.transformer = hollow(transformer, next(transformer.parameters()))  # pipelines only record calls
    pipe.to(device)
    family = family_of(pipe, recipe.family)
    call = call_of(job.base, recipe.call, family)
    draw = drawers(pipe, family, call, (t.capability for t in recipe.teachers), recipe.editing_base)
    backbone = Backbone(transformer, family)
    if recipe.gradient_checkpointing:
        backbone.checkpoint_gradients()
    if recipe.kernels:
        install(transformer)
    if recipe.compile:
        compile_blocks(transformer)
    if split:
        shard(transformer, processes)
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"merged": False})})
    sources = []
    away = recipe.guidance.unconditional > 0 or recipe.rollout.guidance != 1  # then the student meets the null prompt
    with processes.first():
        encoder = Encoder(job.base, family, draw, recipe.editing_base)
        for one in job.known:
            teacher, drawer, null = one.teacher, draw[one.teacher.capability], None
            if away or teacher.guidance is not None:
                null = null_condition(drawer, teacher, fingerprint, recipe.output / "cache").to(device)
            plain = recipe.rollout.merged and not recipe.compile
            field = one.field(backbone, null, plain)
            data, rows = job.asked[teacher.name].data, job.asked[teacher.name].rows
            questions = encoder.questions(
                teacher.capability, data, rows, recipe.rollout.steps, targets=needs_targets(recipe)
            )
            other = dict(job.asked[teacher.name].also)
            if null is None and recipe.gates.null(teacher.capability):
                null = contrast_null(drawer, teacher)
                null = null if null is None else null.to(device)
                other |= {} if null is not None else {KEEP: kept(data, rows)}
            also = {
                name: encoder.questions(teacher.capability, *variant, recipe.rollout.steps)
                for name, variant in other.items()
            }
            strengths = [at.field(backbone, null, plain) for at in at_strengths(one, recipe.gates.consensus)]
            sources.append(Source(teacher.name, field, questions, null, also, strengths))
        grid = SampleGrid(recipe, encoder, backbone, merged=not split)
        panels = None
        if recipe.watch.steps(recipe.gates.on) and (split or run is not None):  # like the grid
            stronger = {s.name: s.strengths for s in sources}
            frozen = heldout.Fields({s.name: s.field for s in sources}, stronger, BaseField(backbone))
            panels = heldout.panels(recipe, encoder, job.asked, frozen, device)
    release_encoders(encoder, pipe)
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, job.start.adapter)
    add = Sharded(backbone, processes, sources[0].questions.rows([0]), STUDENT).add if split else processes.add
    loop = Loop(recipe, backbone, sources, device, processes.rank, processes.count, add)

    def look_at(step: int) -> None:
        if split or run is not None:  # a sharded backbone answers to all processes or to none
            picture = grid.draw(_averaged(backbone, loop.average))
            if run is not None:
                run.image(step, picture)

    def student() -> VelocityField:
        return looking(backbone, _averaged(backbone, loop.average), merged=not split)

    restored = _restore(job, loop)
    if restored is None:
        look_at(0)
    watch = None
    if panels is not None:
        seen = [] if run is None else recall(run.path, loop.step, ROLLED in (restored or {}))
        watch = Watch(recipe.watch, *panels, None if run is None else run.path, processes.said(seen) if split else seen)
    facts = {"recipe": job.recipe.identity(), "weights": whose}
    watching = Watching(recipe, loop, processes, watch, run, student, facts, restored or {})

    def after(done: Progress) -> None:
        seconds, marks = time.monotonic() - job.began, watching.look(done)
        if run is not None:
            run.log(done.step, **done.scalars(), **marks, seconds=seconds, skipped=float(done.skipped))
        if watching.settle(done.step):
            if watching.ended:
                raise _OutOfTime
            return
        every, last = recipe.samples.every, done.step == recipe.steps
        if last or (every and done.step % every == 0):
            look_at(done.step)
        over = recipe.time_limit is not None and seconds > 60 * recipe.time_limit
        late, caught = processes.highest([over, interrupts.caught])
        if late or caught or last or done.step % recipe.save_every == 0:
            random = processes.all(RandomState.now())
            if run is not None:
                run.save(done.step, loop.state(), watching.facts, random)
        report(done, recipe.steps)
        if caught:
            raise _Stopped(caught, done.step)
        if late and not last:
            raise _OutOfTime

    with Interrupts() as interrupts, suppress(_OutOfTime):
        if not watching.ended:
            loop.run(after)
    _export(job, backbone, loop, fingerprint, call, [] if watch is None else watch.sentences())
    seconds = time.monotonic() - job.began
    if run is not None:
        run.finish(loop.step, seconds=round(seconds, 1), stopped=watching.ended)
    return Student(recipe.output, loop.step, seconds, processes.main)


def _restore(job: _Job, loop: Loop) -> dict[str, Any] | None:
    """Continue from the newest whole checkpoint, which the first process reads: its facts, None when there is none."""
    saved = None if job.run is None else job.run.load()
    found = (None, [], {}) if saved is None else (saved.step, saved.random, saved.meta)
    step, random, facts = job.processes.said(found)
    if step is None:
        return None
    if ROLLED in facts:
        loop.ungate()
    loop.restore(step, job.processes.shared(None if saved is None else saved.tensors))
    if job.processes.rank < len(random):
        random[job.processes.rank].restore()
    return facts


def _split(recipe: Recipe, processes: Processes) -> bool:
    """Whether each process has its share of the base, not the whole."""
    return recipe.parallel == "fsdp" and processes.count > 1


def _refuse_streamed(recipe: Recipe, known: list[Known], processes: Processes) -> None:
    name = next((k.teacher.name for k in known if k.streamed), None)
    if name is not None and _split(recipe, processes):
        raise UserError(
            f"teacher {name!r} is a whole model that is streamed through the base, which parallel: fsdp has in shares; "
            "raise the teacher's rank or residual so that it is kept as a difference, or use parallel: ddp"
        )


def _stock(recipe: Recipe) -> torch.dtype | None:
    """What `load_base` is asked for: the stock default is fp32."""
    return None if recipe.dtype == "fp32" else DTYPES[recipe.dtype]


def _warn_of_scenes(recipe: Recipe) -> None:
    """The exact world's prompts suit the shipped base; another one deserves work of its own."""
    if recipe.resolved()["base"] in SHIPPED:
        return
    for key in sorted({t.capability for t in recipe.teachers if recipe.work(t).startswith("scenes")}):
        _log.warning("data.%s is the exact world of 64-pixel shapes; name your own prompts or pairs for this base", key)


class _OutOfTime(Exception):
    """The recipe's time limit is reached: export what there is."""


@dataclass(eq=False)
class _Stopped(Exception):
    """A signal came, and the step that it came in is saved."""

    signal: int
    step: int


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
    job: _Job, backbone: Backbone, loop: Loop, fingerprint: str, call: dict[str, Any], watched: list[str]
) -> None:
    """Write the averaged student, proven through the stock pipeline, and its card."""
    recipe, run = job.recipe, job.run
    student = _averaged(backbone, loop.average)
    if EXPORTED not in backbone.adapters:
        backbone.add_adapter(EXPORTED, student)
    else:
        backbone.assign(EXPORTED, student)
    field = AdapterField(backbone, EXPORTED)
    proof = torch.device("cpu") if _split(recipe, job.processes) else loop.device  # where the whole base fits
    probes = []
    for source in loop.sources:
        condition = source.questions.rows(alike(source.questions, 4)).to(loop.device)
        generator = torch.Generator().manual_seed(recipe.seed)
        x = torch.randn(len(condition), *condition.shape, generator=generator).to(loop.device)
        sigma = torch.linspace(1.0, 0.25, len(condition), device=loop.device)
        answer = field(x, sigma, condition)
        probes.append(Probe(x.to(proof), sigma.to(proof), condition.to(proof), answer.to(proof)))
    with job.processes.first():
        if run is None:
            return
        facts = {"steps": str(loop.step), "seed": str(recipe.seed)}
        load = partial(load_base, job.base, _stock(recipe))
        export(student, run.path, recipe.base, probes, metadata=facts, load=load)
        hashes = {one.teacher.name: one.sha256 for one in job.known if one.sha256 is not None}
        # The student is trained without guidance; stock pipelines would add it unasked.
        snippet = load_snippet(str(recipe.resolved()["base"]), {**call, **backbone.family.unguided})
        grid = run.path / "samples" / f"step-{loop.step:06d}.png"
        write_card(
            run.path,
            recipe,
            hashes=hashes | {"base": fingerprint, "student": student.sha256},
            snippet=snippet,
            grid=grid if grid.exists() else None,
            start=job.start.sentence,
            watched=watched,
        )
