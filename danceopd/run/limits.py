"""What ends a run from outside: a time limit, SIGTERM, Ctrl-C, memory that is full.

But for the last, the update at hand ends, and is saved, first.
"""

from __future__ import annotations

import time

import torch

from danceopd.common.distributed import Processes
from danceopd.common.signals import Interrupts
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.run.directory import RunDirectory


class Limits(Callback):
    """Stops the trainer after `minutes` since `began` (None: no limit), or when a signal came to any process.

    `signal` is then that signal's number; 0 where none came.
    """

    def __init__(self, processes: Processes, interrupts: Interrupts, minutes: float | None, began: float) -> None:
        self.processes, self.interrupts, self.minutes, self.began = processes, interrupts, minutes, began
        self.signal = 0

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        late = self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes
        stop, self.signal = self.processes.all_max([late, self.interrupts.caught])
        trainer.should_stop |= bool(stop or self.signal)


def memory_error(error: BaseException, recipe: Recipe, run: RunDirectory | None, offers: bool = True) -> UserError:
    """What to say where memory ran out: what was asked for, what takes less, and from where the run continues.

    `offers`: whether the base could be offloaded (it was not saved quantised, no teacher is streamed).
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    rows, less = recipe.micro_batch, []
    if (rows if isinstance(rows, int) else recipe.batch) > recipe.group_size:
        less.append(f"micro_batch: {recipe.group_size}")
    if recipe.gradient_checkpointing is not True:
        less.append("gradient_checkpointing: true")
    if recipe.rollout.merged:
        less.append("rollout: {merged: false}")
    plain = offers and recipe.base_dtype is None and recipe.offload == "none"
    plain = plain and recipe.parallel != "fsdp" and not recipe.compile
    if plain and torch.cuda.is_available() and recipe.device != "cpu":
        less.append("offload: blocks")
    advice = f"set {' or '.join(less)} in the recipe" if less else "take smaller pictures (call.height, call.width)"
    saved = None if run is None else run.checkpoints.latest()
    where = "" if saved is None else f" to continue after step {int(saved.name.removeprefix('step-'))}"
    return UserError(
        f"memory ran out ({said}); {advice} and run this again{where}; `danceopd plan` says what takes how much"
    )
