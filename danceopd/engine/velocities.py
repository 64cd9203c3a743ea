"""Whom an objective may query for a batch: the student's rollout, the routed teachers, the student with a gradient.

Each row is routed to its own teacher. Unconditional rows ask the unguided teacher. Teachers and rollouts build no
graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.engine.batches import Batch
from danceopd.engine.rollout import StudentRollout, rollout
from danceopd.models.fields import Ask, VelocityField, acting, ask_together, mean_velocity, unguided
from danceopd.pipelines.condition import Condition


@dataclass(frozen=True)
class Velocities:
    """`rollout` makes trajectories, `student_field` has a gradient, `teachers` are frozen fields by index.

    `small_steps`: of a teacher within one step of the student (`fast.teacher_steps`). `together`: teachers on one
    backbone share a forward.
    """

    rollout: StudentRollout
    student_field: VelocityField
    teachers: Sequence[VelocityField]
    small_steps: int = 1
    together: bool = True

    def student(self, batch: Batch, x: Tensor, sigma: Tensor) -> Tensor:
        """The student's velocity at `x (B, …)`, `sigma (B,)`, with a gradient to its adapter."""
        return self.student_field(x, sigma, batch.condition)

    def teacher(self, batch: Batch, x: Tensor, sigma: Tensor) -> Tensor:
        """The routed teachers' velocities at `x (B, …)`, `sigma (B,)`, or the mean ones of their small steps."""
        routes = list(self._routes(batch))
        condition = batch.condition if batch.context is None else batch.context.condition
        conditions = [condition.rows(rows) for _, rows in routes]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            found = torch.empty_like(x)
            asks = [Ask(field, x[rows], sigma[rows], c) for (field, rows), c in zip(routes, conditions)]
            answers = ask_together(asks) if self.together else [one.field(*one[1:]) for one in asks]
            for (_, rows), answer in zip(routes, answers):
                found[rows] = answer
            return found

        return mean_velocity(velocity, x, sigma, batch.sigmas, self.small_steps)

    def _routes(self, batch: Batch) -> Iterator[tuple[VelocityField, list[int]]]:
        """The batch's teachers, unguided for unconditional rows, and each one's rows."""
        instead = {} if batch.context is None else batch.context.fields
        routes = list(zip(batch.teacher_index, batch.unconditional, strict=True))
        for m, unconditional in sorted(set(routes)):
            rows = [i for i, route in enumerate(routes) if route == (m, unconditional)]
            yield unguided(self.teachers[m]) if unconditional else instead.get(m, self.teachers[m]), rows

    def teacher_under(
        self, batch: Batch, rows: list[int], condition: Condition, x: Tensor, sigma: Tensor,
        fields: Sequence[VelocityField] | None = None,
    ) -> Tensor:  # fmt: skip
        """Velocities (len(rows), …) of some `rows` of `x (B, …)`, `sigma (B,)` under another `condition`, a row each.

        `fields` answer, by teacher index; None: the teachers. Each row is routed as in the batch.
        """
        velocity = x.new_empty(len(rows), *x.shape[1:])
        for m in sorted({batch.teacher_index[row] for row in rows}):
            places = [place for place, row in enumerate(rows) if batch.teacher_index[row] == m]
            at = [rows[place] for place in places]
            field = (self.teachers if fields is None else fields)[m]
            velocity[places] = field(x[at], sigma[at], condition.rows(places))
        return velocity

    def teacher_samples(self, batch: Batch) -> Tensor:
        """Clean latents (B, …) that the routed teachers draw themselves, by Euler's steps from the rows' noise."""
        noise, last = batch.noise(), len(batch.sigmas) - 1
        clean = torch.empty_like(noise)
        for field, rows in self._routes(batch):
            with acting(field):
                ends = torch.full((len(rows),), last)
                clean[rows] = rollout(field, noise[rows], batch.sigmas, ends, batch.condition.rows(rows))
        return clean
