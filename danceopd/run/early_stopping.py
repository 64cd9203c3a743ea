"""The validation error over a run: its checks, the best one, when to stop, and whose EMA is exported.

Every process keeps the same history, though one alone may measure. The checks, and the best one's weights where the
recipe exports the best, are part of every checkpoint, so a run that is killed, or that the monitor rolls back, goes on
with the history that it had there. The run folder shows all checks in `validation.json` and, as curves, in
`validation.png`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, write_atomic, write_json
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer
from danceopd.recipe.validation import Validation
from danceopd.run.directory import RunDirectory
from danceopd.run.plots import curves
from danceopd.run.validation import Errors, ValidationError, relative, scales

KEY, BEST = "gap", "best."
"""In a checkpoint: the key of the checks, and what the names of the best EMA's tensors begin with. Older runs have
them."""
SUMMARY, PICTURE = "validation.json", "validation.png"
EXPLODED = 2.0
"""A validation error, in units of the start or the bare base, from which the student runs away from its teachers."""
UNIT = "0: the teachers; 1: the start or the bare base, whichever is further; in equal parts of the query law"
_log = logging.getLogger("danceopd")


class EarlyStopping(Callback):
    """Measures the EMA when it is due, and stops the trainer where the recipe has a patience.

    `error` is None in processes that do not measure, `run` in all but the first.
    """

    def __init__(
        self, options: Validation, processes: Processes, error: ValidationError | None, run: RunDirectory | None
    ) -> None:
        self.options, self.processes, self.error, self.run = options, processes, error, run
        self.rows_key = processes.broadcast(None if error is None else error.rows_key) if options.every else None
        self.base: Errors = {}
        self.checks: list[dict[str, Any]] = []
        self._best: list[Tensor] = []

    def on_train_start(self, trainer: Trainer) -> None:
        """Measure the base and the start, unless a checkpoint knew them."""
        if self.options.every and not self.checks:
            self.base = self.processes.broadcast(None if self.error is None else self.error.measure(self.error.base))
            figures = self._check(trainer)
            if self.run is not None:
                self.run.logger.log(trainer.step, **figures)
        trainer.should_stop |= self.exhausted

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.options.due(trainer.step, trainer.steps):
            metrics.extra |= self._check(trainer)
        trainer.should_stop |= self.exhausted

    @property
    def relative(self) -> list[dict[str, float]]:
        """E by teacher, at each check."""
        scale = scales(self.base, self.checks[0]["levels"]) if self.checks else {}
        return [relative(check["levels"], scale) for check in self.checks]

    @property
    def values(self) -> list[float]:
        """E at each check; NaN where there was nothing to measure."""
        return [sum(one.values()) / len(one) if one else math.nan for one in self.relative]

    @property
    def exhausted(self) -> bool:
        """Whether the error no longer falls, as the recipe's patience has it."""
        patience = self.options.patience
        return patience is not None and waited(self.values, self.options.min_delta) >= patience

    @property
    def chosen(self) -> int | None:
        """The step whose EMA is exported; None for the last one."""
        best = lowest(self.values)
        return self.checks[best]["step"] if best is not None and self._best else None

    def exported(self, trainer: Trainer) -> tuple[int, list[Tensor]]:
        """The step and the averaged weights that are exported."""
        return (trainer.step, trainer.optimizer.ema) if self.chosen is None else (self.chosen, self._best)

    def sentence(self) -> str | None:
        """What the model card says; None where nothing was measured."""
        values = self.values
        if lowest(values) is None:
            return None
        at = len(values) - 1 if self.chosen is None else lowest(values)
        assert at is not None
        checks = f"{len(values)} checks" if len(values) > 1 else "one check"
        why = f", chosen as the lowest of {checks}" if self.chosen is not None else ""
        return (
            f"Validation error {values[at]:.3g} after step {self.checks[at]['step']}{why} ({values[0]:.3g} after "
            f"step {self.checks[0]['step']}): the velocity error on held-out prompts, where 0 is the teachers and 1 "
            "the start or the bare base, whichever is further."
        )

    # -- checkpoints ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if not self.checks:
            return {}
        checks = [{key: check[key] for key in ("step", "levels")} for check in self.checks]
        facts = {KEY: {"words": self.rows_key, "base": self.base, "checks": checks}}
        return facts | {f"{BEST}{i}": tensor for i, tensor in enumerate(self._best)}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; measured on other rows, its checks do not count."""
        found, seconds = state.get(KEY, {}), {check["step"]: check.get("seconds") for check in self.checks}
        same = bool(self.options.every) and bool(found) and found["words"] == self.rows_key
        names = [f"{BEST}{i}" for i in range(len(trainer.optimizer.ema))]
        best = [state[name] for name in names if name in state]
        if self.options.every and found and not same and self.run is not None:
            _log.warning("the held-out rows are no longer the same, so the validation errors start anew")
        if not same or (self.options.exports_best and not best):  # what was best before is not there to be exported
            self.base, self.checks, self._best = {}, [], []
        else:
            self.base, self._best = found["base"], best if self.options.exports_best else []
            self.checks = [{**check, "seconds": seconds.get(check["step"])} for check in found["checks"]]
            if self.error is not None and self.run is not None:
                self._write(self.error)

    # -- measuring ------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer) -> dict[str, float]:
        began = time.monotonic()
        found = None if self.error is None else self.error.measure(trainer.ema_field())
        levels = self.processes.broadcast(found)
        seconds = round(time.monotonic() - began, 3)
        self.checks.append({"step": trainer.step, "levels": levels, "seconds": seconds})
        if self.options.exports_best and lowest(self.values) == len(self.checks) - 1:
            self._best = [tensor.detach().cpu().clone() for tensor in trainer.optimizer.ema]
        if self.error is None or self.run is None:
            return {}
        was, now = self.values[-2:] if len(self.checks) > 1 else (math.nan, math.nan)
        if was < EXPLODED and not now < EXPLODED:  # NaN counts, once it was measured
            _log.warning(
                "the validation error is %.3g after step %d and was %.3g after step %d: the student moves away from "
                "its teachers; start anew in another --output with optimizer.lr below %g",
                now, trainer.step, self.values[0], self.checks[0]["step"], trainer.optimizer.options.lr,
            )  # fmt: skip
        if self.exhausted:
            ends = "the validation error is no better after %d checks: the run ends at step %d and exports step %d"
            _log.warning(ends, self.options.patience, trainer.step, self.exported(trainer)[0])
        self._write(self.error)
        return self._figures(self.error)

    def _figures(self, error: ValidationError) -> dict[str, float]:
        """Flat names for the log: E, E by teacher, and the plain errors by noise level."""
        levels = self.checks[-1]["levels"]
        found = {"validation": self.values[-1]}
        found |= {f"validation/{name}": value for name, value in self.relative[-1].items()}
        for held in error.held_out:
            for sigma, value in by_level(held.sigmas, levels[held.name]).items():
                found[f"validation/{held.name} sigma {sigma}"] = value
        return found

    def _write(self, error: ValidationError) -> None:
        assert self.run is not None
        folder, values, best = self.run.path, self.values, lowest(self.values)
        start = self.checks[0]["levels"]
        checks = []
        for check, value, relative_errors in zip(self.checks, values, self.relative, strict=True):
            teachers = {
                name: {
                    "error": relative_errors[name],
                    "mean_square": mean_square,
                    "of_start": [a / b if b else None for a, b in zip(mean_square, start[name], strict=True)],
                }
                for name, mean_square in check["levels"].items()
            }
            checks.append({"step": check["step"], "error": value, "teachers": teachers, "seconds": check["seconds"]})
        summary = {
            "unit": UNIT,
            "rows": {held.name: held.rows for held in error.held_out},
            "sigmas": {held.name: held.sigmas for held in error.held_out},
            "base": self.base,
            "checks": checks,
            "best": None if best is None else {"step": self.checks[best]["step"], "error": values[best]},
            "exports": "best" if self.options.exports_best else "last",
        }
        write_json(folder / SUMMARY, summary)
        with suppress(OSError):  # the old name, for one version
            (folder / "gap.json").unlink(missing_ok=True)
            os.link(folder / SUMMARY, folder / "gap.json")
        if best is not None:
            lines = {held.name: [one[held.name] for one in self.relative] for held in error.held_out}
            picture = curves([check["step"] for check in self.checks], {"mean": values, **lines}, self.chosen)
            with disk_errors(folder / PICTURE):
                write_atomic(folder / PICTURE, picture)


def lowest(values: Sequence[float]) -> int | None:
    """The place of the lowest number, the first of equal ones; None where there is none."""
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    return min(finite, key=lambda i: values[i], default=None)


def waited(values: Sequence[float], min_delta: float) -> int:
    """How many of the last values are not below the best before them by a share `min_delta` of it."""
    best, count = math.inf, 0
    for value in values:
        if value < best * (1 - min_delta):
            best, count = value, 0
        else:
            count += 1
    return count


def by_level(sigmas: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Mean values by noise level, to two digits."""
    found: dict[str, list[float]] = {}
    for sigma, value in zip(sigmas, values, strict=True):
        found.setdefault(f"{sigma:.2f}", []).append(value)
    return {name: sum(some) / len(some) for name, some in found.items()}
