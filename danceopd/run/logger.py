"""The logs of a run: metrics.jsonl, sample grids, and both at the run's trackers.

`Logger` writes them and drops what was logged after a step that a run continues from. `MetricsLog` is the callback that
logs every update: its metrics, the adapter's norm, rows a second and peak memory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.common.files import disk_errors, json_safe, partial_path, write_atomic
from danceopd.common.system import peak_memory
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics, adapter_norm
from danceopd.engine.trainer import Trainer
from danceopd.run.trackers.tracker import Tracker

if TYPE_CHECKING:
    from PIL import Image

METRICS = "metrics.jsonl"


class Logger:
    """Logs below a run folder, and at its trackers."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.folder, self.trackers = folder, trackers

    def start(self) -> None:
        """Open the trackers that have a server; UserError where one does not open."""
        for tracker in self.trackers:
            tracker.start()

    def log(self, step: int, **scalars: Any) -> None:
        """One line in metrics.jsonl; the numbers go to the trackers too."""
        line = json.dumps({"step": step, **json_safe(scalars)})
        with disk_errors(self.folder / METRICS), open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        numbers = {key: float(value) for key, value in scalars.items() if isinstance(json_safe(value), (int, float))}
        with disk_errors(self.folder / "logs"):
            for tracker in self.trackers:
                tracker.log(step, numbers)

    def picture(self, step: int) -> Path:
        """Where the sample grid of a step is, or would be."""
        return self.folder / "samples" / f"step-{step:06d}.png"

    def image(self, step: int, image: Image.Image) -> Path:
        """`samples/step-000050.png` and the like, and the same picture at the trackers."""
        path = self.picture(step)
        part = partial_path(path)
        with disk_errors(path):
            image.save(part, format="PNG")
            os.replace(part, path)
            for tracker in self.trackers:
                tracker.picture(step, image, path)
        return path

    def truncate(self, step: int) -> None:
        """Keeps the metrics up to `step`; a half-written line at the end goes too."""
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        with disk_errors(path):
            write_atomic(path, "".join(kept).encode())

    def forget(self, step: int) -> None:
        """Drops what was logged after a step."""
        self.truncate(step)
        for tracker in self.trackers:
            tracker.forget()

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self.trackers:
            tracker.close()


class Throughput(Callback):
    """Adds `adapter_norm`, `samples/s` and `peak_memory` (bytes) to the metrics; the first callback, so that no other
    one's time counts."""

    def on_step_start(self, trainer: Trainer) -> None:
        self._began = time.monotonic()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        metrics.extra["adapter_norm"] = adapter_norm(trainer.optimizer.parameters)
        metrics.extra["samples/s"] = trainer.rows / seconds
        metrics.extra["peak_memory"] = float(peak_memory(trainer.device))


class MetricsLog(Callback):
    """Logs every update, with what the callbacks before it added; `began` is when the run was started."""

    def __init__(self, logger: Logger | None, began: float) -> None:
        self.logger, self.began = logger, began

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.logger is not None:
            seconds = time.monotonic() - self.began
            self.logger.log(metrics.step, **metrics.scalars(), seconds=seconds, skipped=float(metrics.skipped))
