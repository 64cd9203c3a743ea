"""DanceOPD's algorithm box: route, condition, draw the query, walk there, ask the teacher, match its velocity.

One update draws its routes, questions and query levels, gathers rows of one layout and one schedule into lessons,
whichever teacher they go to, and lets the objective learn from each (`danceopd.lesson`, `danceopd.objectives`); one
gradient step follows. Everything drawn is a function of (seed, step), so a run continues exactly where it stopped,
and each of several processes learns its own rows of the same update; their gradients are added once. Of a large
batch `micro_batch` rows at a time are walked and learnt, each slice drawing what the whole would have drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.captured import walking
from danceopd.contexts import Contexts, Update
from danceopd.errors import UserError
from danceopd.fields import AdapterField, MergedField, VelocityField
from danceopd.figures import Figures, Progress
from danceopd.lesson import Fields, Lesson
from danceopd.objectives import OBJECTIVES, needs_targets
from danceopd.pipelines.record import Condition, stack
from danceopd.query import draw
from danceopd.questions import Targets, Work, unprompted
from danceopd.recipe import Recipe
from danceopd.routing import pick, stream

STUDENT = "student"
PATIENCE = 5
"""Updates in a row whose loss may be NaN or infinite before the run gives up."""
SMALLEST = 1.0
"""The loss scale of an fp16 backbone below which an infinite gradient is no longer the scale's fault."""


@dataclass(frozen=True)
class Source:
    """One teacher at work: its velocity field, what it is asked about, and the null prompt (one row, or one each).

    For gates: the same rows asked otherwise (`also`, by name).
    """

    name: str
    field: VelocityField
    questions: Work
    null: Condition | None = None
    also: Mapping[str, Work] = dataclasses.field(default_factory=dict)


class Loop:
    """The student's parameters, their optimizer and average, and the teachers they learn from.

    As process `rank` of `ranks` it learns its own rows of each update; gradients are of the whole update's mean, so
    that their sum over the processes is the update. `add` makes a tensor that sum, in place. An update without a row
    for this process is learnt from the others' gradients.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        sources: Sequence[Source],
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        add: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        self.recipe, self.backbone, self.sources, self.device = recipe, backbone, list(sources), device
        self.rank, self.ranks, self.add = rank, ranks, add
        self._refuse()
        self.contexts = Contexts(recipe, self.sources, device) if recipe.gates.on else None
        self.shares = [recipe.shares()[s.name] for s in self.sources]
        self.parameters = backbone.parameters(STUDENT)
        self.average = [p.detach().clone() for p in self.parameters]
        knobs = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=knobs.lr, betas=knobs.betas, weight_decay=knobs.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == "fp16")
        self.scaler.scale(torch.ones((), device=device))  # makes its state now: there may be no row to scale
        self.objective = OBJECTIVES[recipe.objective]
        self.forms = recipe.rollout.merged and not recipe.compile and backbone.forms(STUDENT)
        walks = MergedField if recipe.rollout.merged else AdapterField
        self.walk = walking(recipe, walks(backbone, STUDENT), device)
        self.step, self._bad = 0, 0

    def run(self, report: Callable[[Progress], None]) -> None:
        """Update until ``recipe.steps``; ``report`` is called after each and may raise to stop the run."""
        while self.step < self.recipe.steps:
            progress = self._update()
            self.step += 1
            report(progress)

    def ungate(self) -> None:
        """From here every row counts 1; rows that gates would compare still share a question."""
        off = self.recipe.gates.model_copy(update={"evidence": None, "consensus": None, "skills": None})
        self.recipe, self.contexts = self.recipe.model_copy(update={"gates": off}), None

    def _update(self) -> Progress:
        done = Progress(self.step + 1)
        figures = Figures([source.name for source in self.sources], self.device, gated=self.contexts is not None)
        for lesson in self._lessons():
            self.objective(lesson)
            figures.count(lesson.routes, lesson.told)
        if self.ranks > 1:
            self._synchronise()
        figures.into(done, self.add)
        if self.contexts is not None:
            self.contexts.running.fold(self.add)
        self._descend(done)
        return done

    def _lessons(self) -> Iterator[Lesson]:
        """This process's part of the update: rows of one layout and schedule together, `micro_batch` at most.

        Rows are drawn in units: one row, or the walks of one question that Flow-OPD or a gate compares.
        """
        recipe = self.recipe
        unit = recipe.unit
        routes, picks, blank, levels = self._drawn()
        update = None if self.contexts is None else self.contexts.update(self.step, routes, picks, blank)
        fields = Fields(self.walk, self._student, [s.field for s in self.sources])
        start = 0
        for group in self._layouts(routes, picks, blank):
            layout = [u for members in group.values() for u in members]
            order = [row for u in layout for row in range(u * unit, (u + 1) * unit)]
            share = [place for place in range(len(order)) if (start + place) // unit % self.ranks == self.rank]
            size = max(unit, (recipe.micro_batch or recipe.batch) // unit * unit)
            for first_row in range(0, len(share), size):
                mine = share[first_row : first_row + size]
                rows = [order[place] // unit for place in mine]
                first = self.sources[routes[rows[0]]].questions
                condition = self._condition(rows, routes, picks, blank, update)
                yield Lesson(
                    recipe=recipe,
                    fields=fields,
                    step=self.step,
                    name=str(start),
                    whole=len(order),
                    mine=mine,
                    routes=[routes[u] for u in rows],
                    blank=[bool(blank[u]) for u in rows],
                    condition=condition,
                    null=self._null(rows, routes, picks) if recipe.rollout.guidance != 1 else None,
                    sigmas=first.sigmas(picks[rows[0]]).float().cpu(),
                    drawn=levels[[order[place] for place in mine]],
                    device=self.device,
                    targets=lambda rows=rows: self._targets(rows, routes, picks),
                    gates=None if update is None else update.gating(rows, layout, condition),
                )
            start += len(order)

    def _drawn(self) -> tuple[list[int], list[int], np.ndarray, Tensor]:
        """Teachers and questions of the update's units, which of them are asked with the null prompt, and the draws
        of the rows' queries."""
        recipe, step = self.recipe, self.step
        lengths = [len(source.questions) for source in self.sources]
        units, per, query = recipe.batch // recipe.unit, recipe.routing, recipe.query
        routes, picks = pick(recipe.seed, step, units, self.shares, lengths, per.per, per.groups)
        blank = stream(recipe.seed, step, "blank").random(units) < recipe.guidance.unconditional
        levels = draw(recipe.seed, step, recipe.batch, query.count, query.law, query.beta)
        if recipe.gates.group > 1:  # walks that are weighed against each other are asked at one noise level
            levels = levels[:: recipe.unit].repeat_interleave(recipe.unit, dim=0)
        return routes, picks, blank, levels

    def _layouts(
        self, routes: Sequence[int], picks: Sequence[int], blank: np.ndarray
    ) -> list[dict[tuple[int, bool], list[int]]]:
        """Units by teacher and by prompt or none; those whose questions batch together are in one group."""
        groups: dict[Hashable, dict[tuple[int, bool], list[int]]] = {}
        for u, (m, row) in enumerate(zip(routes, picks, strict=True)):
            questions = self.sources[m].questions
            key = (questions.layout(row), tuple(questions.sigmas(row).tolist()))
            groups.setdefault(key, {}).setdefault((m, bool(blank[u])), []).append(u)
        return list(groups.values())

    def _condition(
        self,
        rows: Sequence[int],
        routes: Sequence[int],
        picks: Sequence[int],
        blank: np.ndarray,
        update: Update | None = None,
    ) -> Condition:
        """The conditions of these units, in order, the blank ones with the null prompt, some with a degraded source."""
        asked = (lambda u: self.sources[routes[u]].questions) if update is None else update.work
        parts = []
        for (unasked, work), run in _runs(rows, lambda u: (bool(blank[u]), asked(u))):
            part = work.rows([picks[u] for u in run]).to(self.device)
            parts.append(unprompted(part, self._null(run, routes, picks)) if unasked else part)
        return stack(parts)

    def _null(self, rows: Sequence[int], routes: Sequence[int], picks: Sequence[int]) -> Condition:
        """The null prompt's conditions of these units, in order."""
        parts = []
        for m, run in _runs(rows, lambda u: routes[u]):
            null = self.sources[m].null
            assert null is not None  # refused when the loop was made
            parts.append(null.rows([0] * len(run) if len(null) == 1 else [picks[u] for u in run]).to(self.device))
        return stack(parts)

    def _targets(self, rows: Sequence[int], routes: Sequence[int], picks: Sequence[int]) -> Tensor:
        """Clean latents of these units, in order."""
        parts = []
        for m, run in _runs(rows, lambda u: routes[u]):
            questions = self.sources[m].questions
            assert isinstance(questions, Targets)  # refused when the loop was made
            parts.append(questions.targets([picks[u] for u in run]))
        return torch.cat(parts).float()

    def _student(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        with self.backbone.formed(STUDENT) if self.forms else self.backbone.acting_as(STUDENT):
            velocity = self.backbone.velocity(x, sigma, condition)
        if self.scaler.is_enabled():  # from here the gradient goes through fp16
            velocity.register_hook(self.scaler.scale)
        return velocity

    def _refuse(self) -> None:
        """Faults of the work that the recipe alone does not show."""
        recipe = self.recipe
        for source in self.sources:
            if needs_targets(recipe) and not isinstance(source.questions, Targets):
                raise UserError(
                    f"objective {recipe.objective} learns from finished pictures, and what teacher {source.name!r} is "
                    "asked about has none; give data with a target picture for each row"
                )
            if source.null is None and (recipe.guidance.unconditional or recipe.rollout.guidance != 1):
                knob = "guidance.unconditional" if recipe.guidance.unconditional else "rollout.guidance"
                raise UserError(f"{knob} needs the null prompt, and teacher {source.name!r} has none; leave it out")

    def _synchronise(self) -> None:
        """Add the processes' gradients, all in one tensor; a process without rows adds zeros."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.add(flat)
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _descend(self, done: Progress) -> None:
        """Clip, step, average; an update with a NaN or an infinity is skipped, and too many end the run."""
        knobs = self.recipe.optimizer
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, knobs.clip)
        done.gradient, done.rate = float(norm), self.rate(self.step)
        if self.scaler.is_enabled():
            done.scale = self.scaler.get_scale()
            self.scaler.update()
        if not (torch.isfinite(norm) and done.loss == done.loss):
            too_large = done.loss == done.loss and (done.scale or 0.0) > SMALLEST  # of the scale, which is now less
            self._bad, done.skipped = self._bad + (not too_large), True
            self.optimizer.zero_grad(set_to_none=True)
            if self._bad >= PATIENCE:
                raise UserError(
                    f"the loss was NaN or infinite {PATIENCE} updates in a row at step {self.step + 1}; "
                    f"lower optimizer.lr (now {knobs.lr:g}) or check the teachers"
                )
            return
        if float(norm) == 0.0:
            raise UserError(
                f"the student's gradient is exactly zero at step {self.step + 1}: teacher and student are the same "
                "model; give teachers that differ from the student's init"
            )
        self._bad = 0
        for group in self.optimizer.param_groups:
            group["lr"] = done.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def rate(self, step: int) -> float:
        """The learning rate of an update: warm up, and constant, or a line or a cosine to zero."""
        knobs = self.recipe.optimizer
        factor = min(1.0, (step + 1) / max(1, knobs.warmup))
        if knobs.schedule == "cosine":
            factor *= 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.recipe.steps)).item())
        elif knobs.schedule == "linear":
            factor *= 1 - step / self.recipe.steps
        return knobs.lr * factor

    def state(self) -> dict[str, Tensor]:
        """Weights, their average, the optimizer's moments and the loss scale, by flat names."""
        out: dict[str, Tensor] = {}
        for i, (weight, average) in enumerate(zip(self.parameters, self.average, strict=True)):
            out[f"weight.{i}"], out[f"average.{i}"] = weight.detach(), average
            for key, value in self.optimizer.state.get(weight, {}).items():
                out[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
        for key, value in self.scaler.state_dict().items():
            out[f"scaler.{key}"] = torch.tensor(value, dtype=torch.float64)
        out["skipped"] = torch.tensor(self._bad)
        return out if self.contexts is None else out | self.contexts.running.state()

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Put a saved ``state`` back."""
        self.step, self._bad = step, int(tensors.get("skipped", torch.tensor(0)))
        if self.contexts is not None:
            self.contexts.running.restore(tensors)
        scaler = {k.removeprefix("scaler."): v.item() for k, v in tensors.items() if k.startswith("scaler.")}
        if scaler:
            self.scaler.load_state_dict(scaler | {k: int(scaler[k]) for k in ("growth_interval", "_growth_tracker")})
        self.optimizer.state.clear()  # a state of before the first update has none
        for i, (weight, average) in enumerate(zip(self.parameters, self.average, strict=True)):
            weight.copy_(tensors[f"weight.{i}"])
            average.copy_(tensors[f"average.{i}"])
            prefix = f"optimizer.{i}."
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                placed = {k: v if k == "step" else v.to(weight) for k, v in moments.items()}
                self.optimizer.state[weight] = placed


def _runs(rows: Sequence[int], key: Callable[[int], Any]) -> Iterator[tuple[Any, list[int]]]:
    """Consecutive rows of an equal key together."""
    return ((value, list(run)) for value, run in groupby(rows, key))
