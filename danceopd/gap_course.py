"""The field gap over a run: the checks so far, which was the best, whether to stop, and whose average is exported.

Every process keeps the same course, though one alone may measure. Checks, and the best one's averaged weights where
the recipe exports the best, are part of every checkpoint: a run that is killed, or that the watch takes back, goes on
with the course that it had there. The run folder shows all checks in `gap.json` and, as curves, in `gap.png`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from danceopd.disk import disk_faults, replace_file
from danceopd.field_gap import FieldGap, Gaps, relative, units
from danceopd.fields import VelocityField
from danceopd.gap_plot import curves
from danceopd.loop import Loop
from danceopd.processes import Processes
from danceopd.recipe import Recipe
from danceopd.run import RunFolder

GAP, BEST = "gap", "best."
"""Key of a checkpoint's facts that holds the checks; what the names of the best average's tensors begin with."""
SUMMARY = "gap.json"
UNIT = "0: the teachers; 1: the start or the bare base, whichever is further; in equal parts of the query law"
_log = logging.getLogger("danceopd")


class Course:
    """Ties a field gap to a run. `gap` is None in processes that do not measure, `run` in all but the first.

    `student` is what is measured: the average, as it would be exported.
    """

    def __init__(
        self,
        recipe: Recipe,
        loop: Loop,
        processes: Processes,
        gap: FieldGap | None,
        run: RunFolder | None,
        student: Callable[[], VelocityField],
    ) -> None:
        self.knobs, self.steps, self.loop, self.processes = recipe.gap, recipe.steps, loop, processes
        self.gap, self.run, self.student = gap, run, student
        self.words = processes.said(None if gap is None else gap.words) if self.knobs.every else None
        self.base: Gaps = {}
        self.checks: list[dict[str, Any]] = []
        self._best: list[Tensor] = []

    def begin(self) -> None:
        """Measure the base and the start, unless a checkpoint knew them."""
        if not self.knobs.every or self.checks:
            return
        self.base = self.processes.said(None if self.gap is None else self.gap.look(self.gap.base))
        marks = self._check()
        if self.run is not None:
            self.run.log(self.loop.step, **marks)

    def look(self, step: int) -> dict[str, float]:
        """Measure if it is time to; the figures for the log, where there are any."""
        return self._check() if self.knobs.due(step, self.steps) else {}

    @property
    def relative(self) -> list[dict[str, float]]:
        """G by teacher, at each check."""
        unit = units(self.base, self.checks[0]["levels"]) if self.checks else {}
        return [relative(check["levels"], unit) for check in self.checks]

    @property
    def values(self) -> list[float]:
        """G at each check; NaN where there was nothing to measure."""
        found = self.relative
        return [sum(one.values()) / len(one) if one else math.nan for one in found]

    @property
    def ended(self) -> bool:
        """Whether the gap no longer falls, as the recipe's patience has it."""
        return self.knobs.patience is not None and waited(self.values, self.knobs.min_delta) >= self.knobs.patience

    @property
    def chosen(self) -> int | None:
        """The step whose average is exported; None for the last one."""
        best = lowest(self.values)
        return self.checks[best]["step"] if best is not None and self._best else None

    @property
    def exported(self) -> tuple[int, list[Tensor]]:
        """The step and the averaged weights that are exported."""
        return (self.loop.step, self.loop.average) if self.chosen is None else (self.chosen, self._best)

    # -- checkpoints ----------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """For a checkpoint's facts."""
        checks = [{key: check[key] for key in ("step", "levels")} for check in self.checks]
        return {GAP: {"words": self.words, "base": self.base, "checks": checks}} if checks else {}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint's tensors: the best average, where it may be exported."""
        return {f"{BEST}{i}": tensor for i, tensor in enumerate(self._best)}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint holds; measured on other rows, its checks do not count."""
        found, seconds = facts.get(GAP, {}), {check["step"]: check.get("seconds") for check in self.checks}
        same = bool(self.knobs.every) and bool(found) and found["words"] == self.words
        best = [tensors[f"{BEST}{i}"] for i in range(len(self.loop.average)) if f"{BEST}{i}" in tensors]
        if self.knobs.every and found and not same and self.run is not None:
            _log.warning("the field gap's held-out rows are no longer the same, so its course begins anew")
        if not same or (self.knobs.best and not best):  # what was best before is not there to be exported
            self.base, self.checks, self._best = {}, [], []
        else:
            self.base, self._best = found["base"], best if self.knobs.best else []
            self.checks = [{**check, "seconds": seconds.get(check["step"])} for check in found["checks"]]
            if self.gap is not None and self.run is not None:
                self._write(self.gap)

    # -- looking --------------------------------------------------------------------------------------

    def _check(self) -> dict[str, float]:
        began = time.monotonic()
        levels = self.processes.said(None if self.gap is None else self.gap.look(self.student()))
        seconds = round(time.monotonic() - began, 3)
        self.checks.append({"step": self.loop.step, "levels": levels, "seconds": seconds})
        if self.knobs.best and lowest(self.values) == len(self.checks) - 1:
            self._best = [tensor.detach().cpu().clone() for tensor in self.loop.average]
        if self.gap is None or self.run is None:
            return {}
        if self.ended:
            ends = "the field gap is no better after %d checks: the run ends at step %d, its student is step %d's"
            _log.warning(ends, self.knobs.patience, self.loop.step, self.exported[0])
        self._write(self.gap)
        return self._figures(self.gap)

    def _figures(self, gap: FieldGap) -> dict[str, float]:
        """Flat names for metrics.jsonl and TensorBoard: G, G by teacher, and the plain gap by noise level."""
        levels = self.checks[-1]["levels"]
        found = {"gap": self.values[-1]} | {f"gap/{name}": g for name, g in self.relative[-1].items()}
        for pupil in gap.pupils:
            for name, values in by_level(pupil.sigmas, levels[pupil.name]).items():
                found[f"gap/{pupil.name} sigma {name}"] = values
        return found

    def _write(self, gap: FieldGap) -> None:
        assert self.run is not None
        folder, values, best = self.run.path, self.values, lowest(self.values)
        start = self.checks[0]["levels"]
        checks = []
        for check, value, g in zip(self.checks, values, self.relative, strict=True):
            teachers = {
                name: {
                    "gap": g[name],
                    "mean_square": mean_square,
                    "of_start": [a / b if b else None for a, b in zip(mean_square, start[name], strict=True)],
                }
                for name, mean_square in check["levels"].items()
            }
            checks.append({"step": check["step"], "gap": value, "teachers": teachers, "seconds": check["seconds"]})
        summary = {
            "unit": UNIT,
            "rows": {pupil.name: pupil.rows for pupil in gap.pupils},
            "sigmas": {pupil.name: pupil.sigmas for pupil in gap.pupils},
            "base": self.base,
            "checks": checks,
            "best": None if best is None else {"step": self.checks[best]["step"], "gap": values[best]},
            "exports": "best" if self.knobs.best else "last",
        }
        with disk_faults(folder / SUMMARY):
            replace_file(folder / SUMMARY, json.dumps(_plain(summary), indent=1).encode())
        if best is not None:
            lines = {pupil.name: [g[pupil.name] for g in self.relative] for pupil in gap.pupils}
            picture = curves([check["step"] for check in self.checks], {"mean": values, **lines}, self.chosen)
            with disk_faults(folder / "gap.png"):
                replace_file(folder / "gap.png", picture)

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
            f"Held-out field gap {values[at]:.3g} after step {self.checks[at]['step']}{why} ({values[0]:.3g} after "
            f"step {self.checks[0]['step']}; 0 is the teachers, 1 the start or the bare base, whichever is further)."
        )


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


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinities as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
