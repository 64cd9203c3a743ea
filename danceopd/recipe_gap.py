"""The held-out field gap of a recipe: how often it is measured, on how much, and what it decides.

    gap: {every: 100, patience: 5}          stop when it no longer falls, and export the best
    gap: {every: 100, select: best}         run to the end, and export the best

`field_gap` says what is measured, `gap_course` what follows from it. Nothing here changes what a step computes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .recipe_parts import Part, Unit

SHOWING, DECIDING = 16, 32
"""Held-out rows of a teacher: enough to see a course, and to choose by it. A few rows' gaps are most of the sum."""


class Gap(Part):
    """Measured at the start, every so many steps, and at the end.

    With `patience` the run stops once so many checks in a row were no better than the best before them by a share
    `min_delta` of it. `select` says which check's average is exported; None: the best with `patience`, else the last.
    """

    every: int = Field(200, ge=0)  # steps; 0: never
    rows: PositiveInt | None = None  # held out, for each teacher; None: DECIDING where the gap decides, else SHOWING
    patience: PositiveInt | None = None  # checks; None: the run takes all its steps
    min_delta: Unit = 0.01
    select: Literal["last", "best"] | None = None

    @property
    def best(self) -> bool:
        """Whether the best check's average is exported."""
        return self.select == "best" or (self.select is None and self.patience is not None)

    @property
    def held(self) -> int:
        """Held-out rows of each teacher."""
        return self.rows or (DECIDING if self.best or self.patience else SHOWING)

    def due(self, step: int, steps: int) -> bool:
        """Whether there is a check after update `step` of `steps`."""
        return self.every > 0 and (step == steps or step % self.every == 0)

    def looks(self, steps: int) -> int:
        """Checks of a run, with its start and the look at the base that says what 1 is."""
        return 2 + -(-steps // self.every) if self.every else 0

    def agree(self) -> None:
        """ValueError for what would never happen."""
        wish = f"patience {self.patience}" if self.patience else "select best" if self.select == "best" else None
        if wish and not self.every:
            raise ValueError(f"gap.{wish} needs the gap, and gap.every is 0; set it, such as 100")
