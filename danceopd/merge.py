"""`merge(recipe)`: distil the recipe's teachers into one student, and prove it through the stock pipeline.

Everything that can be refused is refused before the base is loaded: recipe, output folder, every tensor name and shape
of every adapter, every row of data. Then one backbone carries all adapters, the trainer runs with its callbacks, and
the student's EMA is exported, loaded back by stock diffusers, and compared. Running the same recipe again continues, or
says that it is finished. Of several processes the first checks, encodes and writes; all train.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from danceopd.adapters.load import load_student
from danceopd.assembly import (
    initial_student,
    open_base,
    place,
    recorded_start,
    routed_teacher,
    teacher_weights,
    warn_of_scenes,
)
from danceopd.bench.results import Benched, open_picture
from danceopd.common.console import progress_bar
from danceopd.common.distributed import Processes
from danceopd.common.signals import Interrupts
from danceopd.common.system import out_of_memory
from danceopd.data.dataset import TeacherData, open_datasets
from danceopd.data.encode import Encoder, free_encoders, park_components
from danceopd.drawing import draw_sources
from danceopd.engine.callbacks import Reporter, own_callbacks
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.optimizer import Diverged
from danceopd.engine.teachers import TeacherWeights, check_teachers
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.engine.warm_start import StudentInit
from danceopd.errors import UserError
from danceopd.kernels.autotune import install_if_faster
from danceopd.labelfree.audit.check import check_audit
from danceopd.labelfree.contrast import contrasted
from danceopd.labelfree.hooks import query_hook
from danceopd.labelfree.monitor import MonitorCallback, Rollback
from danceopd.labelfree.probes import FrozenFields, probe_sets
from danceopd.models.base import base_fingerprint, base_folder
from danceopd.models.cuda_graphs import with_cuda_graphs
from danceopd.models.fields import AdapterField, BaseField, MergedField
from danceopd.models.fsdp import ShardedForwards, shard
from danceopd.pipelines.registry import family_of
from danceopd.planning.cards import card_here
from danceopd.planning.checks import check_streamed
from danceopd.planning.settings import prepare
from danceopd.recipe.recipe import AUTO, Recipe
from danceopd.run.checkpoints import Checkpoints
from danceopd.run.directory import RunDirectory
from danceopd.run.early_stopping import EarlyStopping
from danceopd.run.export import NotFinite, Origin, write_student
from danceopd.run.limits import Limits, memory_error
from danceopd.run.logger import MetricsLog, Throughput
from danceopd.run.many.need import NeedRouting
from danceopd.run.provenance import check_data, check_weights, record_plugins, refuse_unequal, shared_facts
from danceopd.run.samples import SampleGrid, Samples
from danceopd.run.validation import validation_error

_log = logging.getLogger("danceopd")
Report = Callable[[StepMetrics, int], None]
"""``report(metrics, steps)``, called after every update."""


@dataclass(frozen=True)
class Student(Benched):
    """A merged student: its run folder, its steps, and the seconds this call took (0: it was finished before).

    Of several processes the `first` wrote it; the others know no more of it than this. `student.bench(...)` scores it;
    then it has `scores` and `report`.
    """

    folder: Path
    steps: int
    seconds: float
    first: bool = True

    def pipeline(self, **how: Any) -> Any:
        """The stock diffusers pipeline with the student in it (see `load_student`)."""
        return load_student(self.folder, **how)

    @property
    def grid(self) -> Image.Image | None:
        """The contact sheet of its bench, else the last sample grid of the run, RGB; None where there is neither."""
        drawn = sorted((self.folder / "samples").glob("step-*.png"))
        return super().grid or (open_picture(drawn[-1]) if drawn else None)


@dataclass(frozen=True)
class _Opened:
    """What was checked and opened before the base is loaded.

    `run` is the first process's alone; `sharded`: each process has its share of the base, not the whole.
    """

    recipe: Recipe
    base: Path
    teachers: list[TeacherWeights]
    init: StudentInit
    datasets: Mapping[str, TeacherData]
    run: RunDirectory | None
    processes: Processes
    sharded: bool
    saved: str | None  # in which kind the base was saved quantised
    began: float


def merge(recipe: Recipe | str | os.PathLike | Mapping[str, Any], report: Report | None = None) -> Student:
    """Merge the recipe's teachers into one LoRA; returns the `Student` with its folder.

    ``recipe`` is a `Recipe`, the path of its YAML file, or its keys as a mapping. ``report(metrics, steps)`` is called
    after every update, with the loss and its parts as floats; without it, a progress bar with the time left is drawn.
    The same recipe again continues, or returns at once.

    Raises UserError for anything that is wrong with the input, before a model is loaded; ExportError when the written
    file is not the student. SIGTERM and Ctrl-C end the update at hand and save it; then it raises SystemExit(143) or
    KeyboardInterrupt.
    """
    if isinstance(recipe, Mapping):
        recipe = Recipe(**recipe)
    elif isinstance(recipe, str | os.PathLike):
        recipe = Recipe.from_yaml(Path(recipe))
    elif not isinstance(recipe, Recipe):
        raise UserError(
            f"merge got a {type(recipe).__name__}; give a Recipe, the path of a recipe.yaml, or a mapping of its keys"
        )
    began = time.monotonic()
    processes = Processes(recipe.device)
    with processes.watched():
        return _merge(recipe, report, processes, began)


def _merge(recipe: Recipe, report: Report | None, processes: Processes, began: float) -> Student:
    run: RunDirectory | None = None
    offers = True
    precision = torch.get_float32_matmul_precision()
    sharded = recipe.parallel == "fsdp" and processes.world_size > 1
    refuse_unequal(processes, shared_facts(recipe), "recipe")
    card = min(processes.all_gather(card_here(processes.device)), key=lambda one: one.memory)
    try:
        if processes.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # what stays fp32 is multiplied in TF32
        with processes.main_first():
            base = base_folder(recipe.base)
            teachers = check_teachers(recipe.teachers, base, fast=recipe.fast)
            prepared = prepare(recipe, base, teachers, card, processes.world_size)
            recipe, offers = prepared.recipe, prepared.run is None or prepared.run.may_be_stored_otherwise
            whole = any(one.checkpoint is not None for one in teachers)  # its difference is taken in the run folder
            init = None if whole else initial_student(recipe, teachers, base)
            if processes.is_main:
                run = RunDirectory(recipe.output, recipe)
            if run is not None and run.moved and prepared.run is None:  # ended; what it is asked for may be another
                check_data(run.path, recipe, open_datasets(recipe, family_of(base, recipe.family).alpha), record=False)
                check_weights(run.path, recipe, base, teachers, record=False)
                run.settle()
            if prepared.run is not None:
                datasets = prepared.run.datasets
                if run is not None:
                    check_data(run.path, recipe, datasets)
                teachers = [teacher_weights(recipe, one, base, processes.device) for one in teachers]
                check_streamed(recipe, teachers, sharded)
                init = init or initial_student(recipe, teachers, base)
        if processes.broadcast(prepared.run is None):
            return Student(recipe.output, recipe.steps, 0.0, processes.is_main)
        assert init is not None and prepared.run is not None
        settled = (*AUTO, "rollout.steps", "call")  # the first process read them from the run folder
        recipe = recipe.replaced(processes.broadcast({key: recipe.value(key) for key in settled}))
        opened = _Opened(recipe, base, teachers, init, datasets, run, processes, sharded, prepared.run.saved, began)
        if report is not None or not processes.is_main:
            return _train(opened, report or (lambda metrics, steps: None))
        print(*prepared.said, init.sentence, sep="\n", file=sys.stderr, flush=True)
        print(f"encoding prompts and images, then {recipe.steps} steps", file=sys.stderr, flush=True)
        with progress_bar("merging", ends=True) as bar:
            return _train(
                opened,
                lambda metrics, steps: bar(metrics.step, steps, f"loss {metrics.loss:.4f}"),
                lambda done, total, note: bar(done, total, f"drawing sources of edits {note}".strip()),
            )
    except _Stopped as stopped:
        if processes.is_main:
            print(f"\nstep {stopped.step} of {recipe.steps} is saved in {recipe.output}", file=sys.stderr, flush=True)
            if stopped.signal == signal.SIGINT:
                raise KeyboardInterrupt from None
            print("stopped; run the same command again to continue", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped.signal) from None
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise memory_error(error, recipe, run, offers) from None
    finally:
        torch.set_float32_matmul_precision(precision)
        if run is not None:
            run.close()


def _train(
    opened: _Opened, report: Report, drawing: Callable[[int, int, str], None] = lambda done, total, note: None
) -> Student:
    recipe, processes, run = opened.recipe, opened.processes, opened.run
    device, sharded = processes.device, opened.sharded
    fingerprint = base_fingerprint(opened.base, recipe.gguf)
    hashes = {one.teacher.name: one.sha256 for one in opened.teachers}
    own = own_callbacks(recipe.callbacks)
    refuse_unequal(processes, {"base": fingerprint, "teachers": hashes}, "sha256")
    with processes.main_first():
        weights = {}
        if run is not None:
            weights = check_weights(run.path, recipe, opened.base, opened.teachers)
            record_plugins(run.path, recipe)
            run.settle()
            run.logger.start()
            warn_of_scenes(recipe)
            if recipe.objective == "nft":
                _say(check_audit(recipe, recipe.nft, fingerprint, hashes), processes)

    # what `data: auto` draws first; then the base, whose transformer is on the CPU until its encoders have left
    with processes.main_first():
        draw_sources(recipe, opened.base, opened.teachers, opened.datasets, device, drawing, opened.saved, sharded)
    capabilities = [teacher.capability for teacher in recipe.teachers]
    loaded = open_base(recipe, opened.base, opened.saved, device, capabilities)
    pipe, transformer, family, backbone = loaded.pipe, loaded.transformer, loaded.family, loaded.backbone
    if sharded:
        shard(transformer, processes)
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"merged": False})})

    # teachers, their data, and what is measured and drawn on the way
    measures = sharded or run is not None  # all processes run a sharded backbone, or none
    error = probes = None
    with processes.main_first():
        encoder = Encoder(opened.base, family, loaded.pipelines, recipe.editing_base)
        teachers = [
            routed_teacher(recipe, one, opened.datasets[one.teacher.name], encoder, backbone, fingerprint, device)
            for one in opened.teachers
        ]
        fields, bare = {t.name: t.field for t in teachers}, BaseField(backbone)
        teachers = contrasted(recipe, teachers, bare)
        grid = SampleGrid(recipe, encoder, device, opened.datasets)
        if recipe.validation.every and measures:
            nulls = {t.name: (t.field, t.null) for t in teachers}
            error = validation_error(recipe, encoder, opened.datasets, nulls, bare, device)
        if recipe.monitored_every and measures:
            probes = probe_sets(recipe, encoder, opened.datasets, FrozenFields(fields, bare), device)
    free_encoders(encoder, pipe)
    park_components(encoder)
    if not sharded and (said := place(recipe, loaded, device)):
        _say(said, processes)
    rolled, verdict = recipe.rollout, None
    usable = bool(rolled.merged) and not rolled.cache_source and recipe.offload == "none"
    tried_graphs = usable and rolled.cuda_graphs == "auto"
    if recipe.kernels == "auto" and not (sharded or recipe.compile):
        with processes.main_first():
            tried = teachers[0].dataset.rows([0] * min(recipe.batch, 2))
            verdict = install_if_faster(transformer, tried, device, lambda line: _say(line, processes), tried_graphs)
    graphs = rolled.cuda_graphs is True or (tried_graphs and verdict is not None and verdict.graphs)
    with processes.main_first():
        rows = {name: data.rows for name, data in opened.datasets.items()}
        init = recorded_start(recipe, opened.init, opened.teachers, teachers, rows, backbone)
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init.adapter)
    all_reduce = processes.all_reduce
    if sharded:
        all_reduce = ShardedForwards(backbone, processes, teachers[0].dataset.rows([0]), STUDENT).add

    # the trainer and its callbacks, in their order
    field = with_cuda_graphs(
        (MergedField if recipe.rollout.merged else AdapterField)(backbone, STUDENT), device,
        enabled=graphs, compiled=recipe.compile, source_cached=rolled.cache_source,
    )  # fmt: skip
    hook, beside = query_hook(recipe, backbone, teachers, device, None if run is None else run.path)
    validation = EarlyStopping(recipe.validation, processes, error, run)
    need = [NeedRouting(recipe, validation)] if recipe.routing.per == "need" else []
    monitor = MonitorCallback(recipe.monitor, recipe.monitored_every, probes, run, processes, sharded)
    facts = {"recipe": opened.recipe.identity(), "weights": weights, "modules": backbone.modules(STUDENT)}
    checkpoints = Checkpoints(run, processes, recipe.save_every, [validation, monitor, *own], facts)
    rollback = Rollback(monitor, checkpoints)
    checkpoints.parts.append(rollback)
    logger = None if run is None else run.logger
    samples = Samples(grid if measures else None, logger, recipe.samples.every)
    with Interrupts() as interrupts:
        limits = Limits(processes, interrupts, recipe.time_limit, opened.began)
        trainer = Trainer(
            recipe, backbone, teachers, device, processes.rank, processes.world_size, all_reduce, field, hook,
            callbacks=[
                *beside, Throughput(), validation, *need, monitor, *own, MetricsLog(logger, opened.began), rollback,
                samples, limits, checkpoints, Reporter(report),
            ],
        )  # fmt: skip
        checkpoints.restore(trainer)
        try:
            trainer.train()
        except Exception as error:
            if out_of_memory(error):
                checkpoints.rescue(trainer)
            if isinstance(error, Diverged):
                raise checkpoints.back_off(error, recipe.optimizer.lr) from None
            raise
    came = limits.signal or (interrupts.caught if processes.world_size == 1 else 0)  # during the last update, too
    if came:
        raise _Stopped(came, trainer.step)

    # the student's EMA, proven
    step, ema = validation.exported(trainer)
    student = trainer.ema_adapter(ema)
    del ema  # the proof needs the memory
    if validation.chosen is not None and processes.broadcast(run is not None and not run.logger.picture(step).exists()):
        samples.draw(trainer, step, trainer.ema_field(student))
    known = {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}
    origin = Origin(opened.base, fingerprint, loaded.call, known, init.sentence, opened.saved)
    sentences = [*filter(None, [validation.sentence()]), *monitor.sentences(), *(run.sentences() if run else [])]
    sentences += [sentence for part in (*beside, *own) for sentence in part.sentences()]
    try:
        write_student(trainer, recipe, student, step, origin, run, processes, None if sharded else pipe, sentences)
    except NotFinite as error:
        raise checkpoints.back_off(Diverged(str(error), step), recipe.optimizer.lr) from None
    seconds = time.monotonic() - opened.began
    if run is not None:
        patience = recipe.validation.patience if validation.exhausted else None
        run.finish(
            trainer.step, seconds=round(seconds, 1), stopped=rollback.ended, exported=step, patience=patience
        )
    return Student(recipe.output, trainer.step, seconds, processes.is_main)


def _say(line: str, processes: Processes) -> None:
    if processes.is_main:
        print(line, file=sys.stderr, flush=True)


@dataclass(eq=False)
class _Stopped(Exception):
    """A signal came, and the step that it came in is saved."""

    signal: int
    step: int
