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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from danceopd import heldout
from danceopd.attention import install
from danceopd.attention.trial import install_where_better
from danceopd.backbone import Backbone
from danceopd.base_model import base_fingerprint, base_folder, empty_transformer, load_base
from danceopd.blocks import compile_blocks
from danceopd.data_record import remember_data
from danceopd.errors import UserError
from danceopd.exporting import Origin, averaged, stock, write_student
from danceopd.field_gap import field_gap
from danceopd.fields import BaseField, VelocityField
from danceopd.figures import Pace, Progress
from danceopd.gap_course import Course
from danceopd.interrupts import Interrupts
from danceopd.loop import STUDENT, Loop, Source
from danceopd.lora import read_adapter
from danceopd.objectives import needs_targets
from danceopd.pipelines.families import family_of
from danceopd.pipelines.hollow import hollow
from danceopd.processes import Processes
from danceopd.recipe import Recipe
from danceopd.reuse import refuse_reuse
from danceopd.run import RunFolder, differences
from danceopd.samples import SampleGrid, looking
from danceopd.saving import ROLLED, Saving
from danceopd.sharded import Sharded, shard
from danceopd.shipped import SHIPPED
from danceopd.student import load_student
from danceopd.teachers import Known, contrast_null, look, null_condition, prepare, remember
from danceopd.variants import KEEP, kept
from danceopd.warm_start import Start, warm_start
from danceopd.watch import Watch, recall
from danceopd.watching import Watching
from danceopd.work import Asked, Encoder, call_of, drawers, open_work, release_encoders

_log = logging.getLogger("danceopd")


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
    _agree(processes, _said(recipe), "recipe")
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
                if run is not None:
                    remember_data(run.path, recipe, asked)
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
            print("stopped; run the same command again to continue", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped.signal) from None
    finally:
        if run is not None:
            run.close()


def _say(line: str, processes: Processes) -> None:
    if processes.main:
        print(line, file=sys.stderr, flush=True)


def _run(job: _Job, report: Report) -> Student:
    recipe, processes, run = job.recipe, job.processes, job.run
    device, split = processes.device, _split(recipe, processes)
    if processes.main:
        _warn_of_scenes(recipe)
    fingerprint = base_fingerprint(job.base)
    _agree(processes, {"base": fingerprint, "teachers": {k.teacher.name: k.sha256 for k in job.known}}, "sha256")
    with processes.first():
        whose = remember(run.path, fingerprint, job.known) if run is not None else {}
    pipe = load_base(job.base, stock(recipe))
    transformer = pipe.transformer
    pipe.transformer = hollow(transformer, next(transformer.parameters()))  # pipelines only record calls
    pipe.to(device)  # its encoders; the transformer follows when they have left, or goes there in shares
    family = family_of(pipe, recipe.family)
    call = call_of(job.base, recipe.call, family)
    draw = drawers(pipe, family, call, (t.capability for t in recipe.teachers), recipe.editing_base)
    backbone = Backbone(transformer, family)
    if recipe.gradient_checkpointing:
        backbone.checkpoint_gradients()
    if recipe.kernels is True:
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
            sources.append(Source(teacher.name, field, questions, null, also))
        grid = SampleGrid(recipe, encoder, backbone, device, merged=not split)
        panels, gap, bare = None, None, BaseField(backbone)
        looks = split or run is not None  # a sharded backbone answers to all processes or to none
        if recipe.gap.every and looks:
            gap = field_gap(recipe, encoder, job.asked, {s.name: (s.field, s.null) for s in sources}, bare, device)
        if recipe.watch.steps(recipe.gates.on) and looks:
            frozen = heldout.Fields({s.name: s.field for s in sources}, bare)
            panels = heldout.panels(recipe, encoder, job.asked, frozen, device)
    release_encoders(encoder, pipe)
    if not split:
        transformer.to(device)
    if recipe.kernels == "auto" and not (split or recipe.compile):
        with processes.first():
            rows = sources[0].questions.rows([0] * min(recipe.batch, 2))
            install_where_better(transformer, rows, device, lambda line: _say(line, processes))
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, job.start.adapter)
    add = Sharded(backbone, processes, sources[0].questions.rows([0]), STUDENT).add if split else processes.add
    loop = Loop(recipe, backbone, sources, device, processes.rank, processes.count, add)

    def look_at(step: int, average: Sequence[Tensor]) -> None:
        if looks:
            picture = grid.draw(averaged(backbone, average))
            if run is not None:
                run.image(step, picture)

    def student() -> VelocityField:
        return looking(backbone, averaged(backbone, loop.average), merged=not split)

    course = Course(recipe, loop, processes, gap, run, student)
    saving = Saving(run, loop, course, processes, {"recipe": job.recipe.identity(), "weights": whose})
    restored = saving.restore()
    if restored is None:
        look_at(0, loop.average)
    course.begin()
    watch = None
    if panels is not None:
        seen = [] if run is None else recall(run.path, loop.step, ROLLED in (restored or {}))
        watch = Watch(recipe.watch, *panels, None if run is None else run.path, processes.said(seen) if split else seen)
    watching = Watching(recipe, loop, saving, watch, run, student, restored or {})
    pace = Pace(loop.parameters, recipe.batch, device)

    def after(done: Progress) -> None:
        seconds, figures = time.monotonic() - job.began, {**done.scalars(), **pace.figures()}
        marks = {**course.look(done.step), **watching.look(done)}
        if run is not None:
            run.log(done.step, **figures, **marks, seconds=seconds, skipped=float(done.skipped))
        if watching.settle(done.step):
            if watching.ended:
                raise _Enough
            pace.start()
            return
        every, last = recipe.samples.every, done.step == recipe.steps
        if last or (every and done.step % every == 0):
            look_at(done.step, loop.average)
        over = recipe.time_limit is not None and seconds > 60 * recipe.time_limit
        late, caught = processes.highest([over, interrupts.caught])
        if late or caught or last or course.ended or done.step % recipe.save_every == 0:
            saving.save(watching.facts)
        report(done, recipe.steps)
        if caught:
            raise _Stopped(caught, done.step)
        if (late or course.ended) and not last:
            raise _Enough
        pace.start()

    with Interrupts() as interrupts, suppress(_Enough):
        if not (watching.ended or course.ended):
            pace.start()
            loop.run(after)
    step, average = course.exported
    if course.chosen is not None and processes.said(run is not None and not run.picture(step).exists()):
        look_at(step, average)
    hashes = {one.teacher.name: one.sha256 for one in job.known if one.sha256 is not None}
    origin = Origin(job.base, fingerprint, call, hashes, job.start.sentence)
    said = [] if watch is None else watch.sentences()
    write_student(
        averaged(backbone, average), step, recipe, loop, origin, run, processes, split, course.sentence(), said
    )
    seconds = time.monotonic() - job.began
    if run is not None:
        over = recipe.gap.patience if course.ended else None
        run.finish(loop.step, seconds=round(seconds, 1), stopped=watching.ended, exported=step, patience=over)
    return Student(recipe.output, loop.step, seconds, processes.main)


def _said(recipe: Recipe) -> dict[str, Any]:
    """What several processes must have been told alike: all but where things are on their machines."""
    told = recipe.resolved()
    for place in ("output", "device", "base", "editing_base", "data"):
        del told[place]
    told["teachers"] = [{k: v for k, v in one.items() if k not in ("adapter", "data")} for one in told["teachers"]]
    return {**told, "rows": recipe.data.rows}


def _agree(processes: Processes, mine: dict[str, Any], what: str) -> None:
    """UserError in the first process, and a quiet end of the others, where they have different facts."""
    told = processes.all(mine)
    for rank, theirs in enumerate(told):
        for key, first, other in differences(told[0], theirs):
            if not processes.main:
                raise SystemExit(2)
            raise UserError(
                f"process {rank} was given another {what} than the first ({key} is {other!r}, not {first!r}); give "
                "all of them the same"
            )


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


def _warn_of_scenes(recipe: Recipe) -> None:
    """The exact world's prompts suit the shipped base; another one deserves work of its own."""
    if recipe.resolved()["base"] in SHIPPED:
        return
    for key in sorted({t.capability for t in recipe.teachers if recipe.work(t).startswith("scenes")}):
        _log.warning("data.%s is the exact world of 64-pixel shapes; name your own prompts or pairs for this base", key)


class _Enough(Exception):
    """The time limit, the watch or the gap ends the run here: export what there is."""


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
