"""The validation part of a recipe: how often the student's velocity error on held-out prompts is measured.

    validation: {every: 100, patience: 5}          stop when it no longer falls, and export the best
    validation: {every: 100, select: best}         run to the end, and export the best

`danceopd.run.validation` says what is measured. Nothing here changes what an update computes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from danceopd.recipe.parts import Part, Unit

SHOWN_ROWS, DECIDING_ROWS = 16, 32
"""Held-out rows of a teacher: enough to see a curve, and to choose a checkpoint by it."""


class Validation(Part):
    """Measured at the start, every so many steps, and at the end.

    docs/method.md says what is measured.
    """

    every: int = Field(200, ge=0)
    """Steps between checks; 0: never."""
    rows: Annotated[int, Field(gt=0, le=10**5)] | None = Field(None, examples=[32])
    """Held-out rows of each teacher; null: 32 where the error decides something, else 16."""
    patience: PositiveInt | None = Field(None, examples=[5])
    """Checks without a better one after which the run stops; null: it takes all its steps."""
    min_delta: Unit = 0.01
    """Share of the best error by which a check must be better to count."""
    select: Literal["last", "best"] | None = Field(None, examples=["best"])
    """Which check's weights are exported; null: the best with `patience`, else the last."""

    @property
    def exports_best(self) -> bool:
        """Whether the best check's EMA is exported."""
        return self.select == "best" or (self.select is None and self.patience is not None)

    @property
    def decides(self) -> str:
        """The key by which it decides something, with its value; empty where it only shows."""
        return f"patience {self.patience}" if self.patience else "select best" if self.select == "best" else ""

    @property
    def held_out_rows(self) -> int:
        """Held-out rows of each teacher."""
        return self.rows or (DECIDING_ROWS if self.exports_best or self.patience else SHOWN_ROWS)

    def due(self, step: int, steps: int) -> bool:
        """Whether there is a check after update `step` of `steps`."""
        return self.every > 0 and (step == steps or step % self.every == 0)

    def checks(self, steps: int) -> int:
        """Measurements of a run: its checks, its start, and the base."""
        return 2 + -(-steps // self.every) if self.every else 0
