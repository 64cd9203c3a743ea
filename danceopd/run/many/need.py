"""`routing.per: need`: after every check, teachers whose validation error still is large get more rows.

With E_m the validation error of teacher m (0: the teacher; 1: the start or the bare base, `run/validation.py`) and s_m
its share as the recipe says, its share is in proportion to

    s_m · clip(E_m / mean(E), 1/3, 3)

so no teacher is forgotten, and none takes all. The checks are part of a checkpoint, so a run that is continued goes on
with the same shares, and all processes have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from danceopd.data.routing import LEAST, MOST
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer
from danceopd.recipe.recipe import Recipe
from danceopd.run.early_stopping import EarlyStopping


class NeedRouting(Callback):
    """Sets the shares of a trainer's batches by the latest check of `validation`; it comes after that callback."""

    def __init__(self, recipe: Recipe, validation: EarlyStopping) -> None:
        self.shares, self.validation = recipe.shares(), validation

    def on_step_start(self, trainer: Trainer) -> None:
        now = self._now()  # every time: a monitor may have gone back to an earlier check
        trainer.batches.shares = tuple(now[teacher.name] for teacher in trainer.teachers)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.validation.options.due(trainer.step, trainer.steps):
            metrics.extra |= {f"share/{name}": share for name, share in self._now().items()}

    def _now(self) -> dict[str, float]:
        checks = self.validation.relative
        return needed(self.shares, checks[-1] if checks else {})


def needed(shares: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """The shares by need, which sum to 1; a teacher without an error, or all of them, keep their own."""
    finite = {name: error for name, error in errors.items() if math.isfinite(error)}
    mean = sum(finite.values()) / len(finite) if finite else 0.0
    if not mean:
        return dict(shares)
    raw = {name: share * min(MOST, max(LEAST, finite.get(name, mean) / mean)) for name, share in shares.items()}
    return {name: share / sum(raw.values()) for name, share in raw.items()}
