"""What ends a run from outside: a time limit, SIGTERM, Ctrl-C. The update at hand ends, and is saved, first."""

from __future__ import annotations

import time

from danceopd.common.distributed import Processes
from danceopd.common.signals import Interrupts
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer


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
