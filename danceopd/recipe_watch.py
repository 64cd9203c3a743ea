"""The watch of a recipe: how often it looks, at how much, what judges, and when an alarm rings.

    watch: {every: 100, judge: path/to/clip, rollback: plain}

docs/labelfree.md says what each figure means. Nothing here changes what a step computes until an alarm rings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from .recipe_parts import Part, existing

EVERY = 100
"""Steps between checks where a gate is on and the recipe does not say."""


def _judge(value: Any) -> Any:
    return None if value is None else existing(value, "similarity model", hub=True, shipped_names=False)


class Watch(Part):
    """On in every run with a gate, and where `every` is given.

    `judge` is a similarity model of transformers (CLIP, SigLIP; DINO compares with the teachers' own pictures). None:
    the exact scorer where the work is "scenes", else a frozen field that no row is taught by. The last six are limits
    (`watch_figures.Limits`). `rollback`: an alarm brings the last good state back, and then the run goes on without
    gates (plain), or ends there (stop).
    """

    every: int | None = Field(None, ge=0)  # steps; None: EVERY where a gate is on, else never; 0: never
    prompts: int = Field(64, ge=8)  # held out, over all teachers
    seeds: int = Field(4, ge=2)  # pictures of each prompt
    judge: Annotated[str | None, BeforeValidator(_judge)] = None
    mistakes: float = Field(0.25, ge=0, le=1)
    spearman: float = Field(0.0, ge=-1, le=1)
    checks: int = Field(3, ge=2)
    strength: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    diversity: float = Field(0.7, ge=0)
    effective: float = Field(0.5, ge=0, le=1)
    rollback: Literal["plain", "stop"] | None = None

    def steps(self, gated: bool) -> int:
        """Steps between checks, 0: none; `gated` says whether a gate is on."""
        return (EVERY if gated else 0) if self.every is None else self.every

    def forwards(self, steps: int, calls: float) -> float:
        """Forwards of one row in a check, but for what framings and a judge ask: the student's walk of `steps`, its
        answer to a wrong prompt, and the teacher's to both, which takes it `calls` each."""
        return self.prompts * self.seeds * (steps + 1 + 2 * calls)

    def agree(self, gated: bool) -> None:
        """ValueError for what would never happen."""
        if self.strength[0] >= self.strength[1]:
            raise ValueError(f"watch.strength is {list(self.strength)}; give the lower bound first")
        if self.rollback is None:
            return
        if not self.steps(gated):
            raise ValueError(f"watch.rollback is {self.rollback}, and nothing is watched; set watch.every, such as 100")
        if self.rollback == "plain" and not gated:
            raise ValueError("watch.rollback plain goes on without gates, and no gate is on; give stop")
