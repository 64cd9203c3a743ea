"""The held-out field gap: how far the student's velocity is from its teachers', where the student itself goes.

On rows that no update draws and from fixed noise, the student takes the recipe's walk (without random steps), and at
four of its states the routed teacher, guided as the recipe says, is asked what the student is asked. The four are the
medians of the quarters of what the query law draws, so their plain mean is the law's. For teacher m

    gap_m(q) = mean over rows of |v_θ(x_q, σ_q, c) − u_m(x_q, σ_q, c)|²,        q = 1 … 4, |·|² a mean over numbers
    G_m = Σ_q gap_m(q) / unit_m,      unit_m = max(Σ_q gap_m(q) of the start, of the bare base)
    G = mean over teachers of G_m

so 0 is the teachers, and 1 is where the run began or the base on its own walk, whichever is further. Neither alone is a
unit: a run may start next to a teacher, or as it (`student.init`), the base may be a teacher, and a ratio to next to
nothing would let that teacher alone decide; and a base that misses the point agrees with a teacher that only goes on
from there, so a blend that has begun to do what is asked can be further away. No unit is below a hundredth of the
largest, for a run that starts as the base and has it for a teacher. No judge, no random number of the run's own, and no
weight moves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.fields import VelocityField
from danceopd.heldout import NOISE, by_layout, encoded, held_rows
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition
from danceopd.query import LEVELS, PAPER, place
from danceopd.questions import unprompted
from danceopd.random_state import RandomState
from danceopd.recipe import Recipe
from danceopd.solvers import SOLVERS
from danceopd.store import key_of
from danceopd.work import Asked, Encoder

QUARTERS = 4
"""States of a walk at which the teacher is asked; each stands for an equal share of the query law."""
LEAST = 0.01
"""Of the largest unit: the smallest."""
_FINE = 1 << 14  # places at which a law's density is looked up
_log = logging.getLogger("danceopd")

Gaps = dict[str, list[float]]
"""`QUARTERS` mean squared velocity differences by teacher."""


@dataclass(frozen=True)
class Held:
    """Rows of one layout and schedule with their noise (B, …), and the grid indices at which they are asked."""

    condition: Condition
    noise: Tensor
    sigmas: Tensor
    asked: Sequence[int]


@dataclass(frozen=True)
class Pupil:
    """One teacher's held-out rows; `null` is the null prompt of a guided walk, one row."""

    name: str
    teacher: VelocityField
    held: Sequence[Held]
    null: Condition | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(len(held.condition) for held in self.held)

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each quarter, on average over the rows."""
        levels = sum(len(held.condition) * held.sigmas[list(held.asked)].double() for held in self.held)
        return (levels / self.rows).tolist()  # type: ignore[union-attr]


class FieldGap:
    """Measures it. `pupils` are the teachers with held-out rows, `base` the bare base, `words` what identifies the
    rows: gaps on other rows do not compare."""

    def __init__(
        self, recipe: Recipe, pupils: Sequence[Pupil], base: VelocityField, device: torch.device, words: str = ""
    ) -> None:
        self.recipe, self.pupils, self.base, self.device, self.words = recipe, list(pupils), base, device, words

    @torch.no_grad()
    def look(self, student: VelocityField) -> Gaps:
        """The gap of a field to each teacher, on its own walk."""
        random = RandomState.now()
        found = {pupil.name: (self._sum(pupil, student) / pupil.rows).tolist() for pupil in self.pupils}
        random.restore()
        return found

    def _sum(self, pupil: Pupil, student: VelocityField) -> Tensor:
        """(QUARTERS,) over the pupil's rows, float64 on the CPU."""
        chunk, total = self.recipe.micro_batch or self.recipe.batch, torch.zeros(QUARTERS, dtype=torch.float64)
        for held in pupil.held:
            for first in range(0, len(held.condition), chunk):
                rows = slice(first, first + chunk)
                condition, noise = held.condition.rows(rows).to(self.device), held.noise[rows].to(self.device)
                found = self._walk(pupil, student, condition, noise, held)
                total += torch.stack([found[index] for index in held.asked]).cpu()
        return total

    def _walk(
        self, pupil: Pupil, student: VelocityField, condition: Condition, noise: Tensor, held: Held
    ) -> dict[int, Tensor]:
        """Squared differences, summed over the rows, at each grid index that is asked."""
        grid, knobs, x = held.sigmas.to(self.device, torch.float32), self.recipe.rollout, noise.float()
        solver, found = SOLVERS[knobs.solver](), {}
        for step in range(max(held.asked) + 1):
            sigma, to = grid[step].expand(len(x)), grid[step + 1].expand(len(x))
            velocity = student(x, sigma, condition)
            if step in held.asked:
                answer = pupil.teacher(x, sigma, condition)
                found[step] = (velocity - answer).square().flatten(1).mean(1).double().sum()
            if step == max(held.asked):
                break
            if pupil.null is not None:
                away = student(x, sigma, unprompted(condition, pupil.null))
                velocity = FAMILIES[condition.family].guide(velocity, away, knobs.guidance)
            x = solver.advance(x, velocity, sigma, to, None)
            solver.remember(velocity, sigma, to)
        return found


def field_gap(
    recipe: Recipe,
    encoder: Encoder,
    asked: Mapping[str, Asked],
    teachers: Mapping[str, tuple[VelocityField, Condition | None]],
    base: VelocityField,
    device: torch.device,
) -> FieldGap:
    """The gap of a run: `teachers` are its fields, each with the null prompt of a guided walk."""
    pupils, words = [], []
    for teacher in recipe.teachers:
        rows = held_rows(recipe, teacher, asked[teacher.name], recipe.gap.held)
        questions = encoded(recipe, teacher, encoder, rows)
        held = []
        for members in by_layout(questions, range(len(rows))):
            drawer, sigmas = encoder.sized(teacher.capability, questions.size(members[0])), questions.sigmas(members[0])
            noise = drawer.noise([NOISE + row for row in members])
            held.append(Held(questions.rows(members), noise, sigmas, quarters(recipe, sigmas)))
        if not held:
            _log.warning("the field gap has no rows for %s", teacher.name)
            continue
        field, null = teachers[teacher.name]
        pupils.append(Pupil(teacher.name, field, held, null if recipe.rollout.guidance != 1 else None))
        words.append([teacher.name, [row.words for row in rows]])
    return FieldGap(recipe, pupils, base, device, key_of(words))


def quarters(recipe: Recipe, sigmas: Tensor) -> list[int]:
    """The grid index at the median of each quarter of the recipe's queries on a schedule (N+1,); they may repeat.

    Objectives that ask at every step have an even law over the grid.
    """
    steps, knobs = len(sigmas) - 1, recipe.query
    share = torch.ones(steps, dtype=torch.float64)
    if recipe.objective not in ("diffusionopd", "flowopd"):
        a, b = knobs.beta or (PAPER if knobs.law == "paper" else LEVELS[knobs.law])
        drawn = (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
        index, _ = place(drawn, sigmas, knobs.law)
        share = torch.bincount(index, drawn ** (a - 1) * (1 - drawn) ** (b - 1), minlength=steps)
    middle = (torch.arange(QUARTERS, dtype=torch.float64) + 0.5) / QUARTERS
    return torch.searchsorted(share.cumsum(0) / share.sum(), middle).clamp(max=steps - 1).tolist()


def units(*references: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What 1 is for each teacher, given the gaps of the base and of the start; NaN where no teacher differs at all."""
    sums = {name: max(sum(one[name]) for one in references) for name in references[0]}
    least = LEAST * max(sums.values(), default=0.0)
    return {name: max(value, least) or math.nan for name, value in sums.items()}


def relative(gaps: Mapping[str, Sequence[float]], unit: Mapping[str, float]) -> dict[str, float]:
    """G_m by teacher."""
    return {name: sum(values) / unit[name] for name, values in gaps.items()}


def forwards(recipe: Recipe, sigmas: Tensor) -> float:
    """Forwards of one row that a whole run takes for it; a guided teacher's answer takes two."""
    asked = quarters(recipe, sigmas)
    walk = max(asked) * (1 if recipe.rollout.guidance == 1 else 2) + 1
    rows = sum(walk + len(set(asked)) * (1 if t.guidance is None else 2) for t in recipe.teachers)
    return recipe.gap.looks(recipe.steps) * recipe.gap.held * rows
