"""DanceOPD's algorithm box: route, condition, draw the query, walk there, ask the teacher, match its velocity.

The student walks on weights with its LoRA merged in; the routed teachers answer at the states where it stopped;
one gradient step follows. Rows whose conditions have one layout share a batch, whichever teacher they go to.
Everything drawn is a function of (seed, step), so a run continues exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.errors import UserError
from danceopd.fields import MergedField, VelocityField
from danceopd.gates import full_trust
from danceopd.objectives import OBJECTIVES
from danceopd.pipelines.record import Condition, stack
from danceopd.query import draw_stops
from danceopd.recipe import Recipe
from danceopd.rollout import rollout
from danceopd.routing import route, stream

STUDENT = "student"
PATIENCE = 5
"""Updates in a row whose loss may be NaN or infinite before the run gives up."""


@dataclass(frozen=True)
class Source:
    """One teacher at work: its velocity field, and the conditions it is asked about (one row each)."""

    name: str
    field: VelocityField
    conditions: Condition


@dataclass
class Progress:
    """What one update did: loss overall and by teacher, mean query level, gradient norm, learning rate."""

    step: int
    loss: float = 0.0
    by_teacher: dict[str, float] = field(default_factory=dict)
    sigma: float = 0.0
    gradient: float = 0.0
    rate: float = 0.0
    skipped: bool = False

    def scalars(self) -> dict[str, float]:
        """Flat names for the log."""
        named = {f"loss/{name}": value for name, value in self.by_teacher.items()}
        return {"loss": self.loss, **named, "sigma": self.sigma, "gradient": self.gradient, "rate": self.rate}


class Loop:
    """The student's parameters, their optimizer and average, and the teachers they learn from."""

    def __init__(
        self, recipe: Recipe, backbone: Backbone, sources: Sequence[Source], sigmas: Tensor, device: torch.device
    ) -> None:
        self.recipe, self.backbone, self.sources = recipe, backbone, list(sources)
        self.sigmas, self.device = sigmas, device
        self.shares = [recipe.shares()[s.name] for s in self.sources]
        self.parameters = backbone.parameters(STUDENT)
        self.average = [p.detach().clone() for p in self.parameters]
        knobs = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=knobs.lr, betas=knobs.betas, weight_decay=knobs.weight_decay
        )
        self.objective = OBJECTIVES[recipe.objective]
        self.walk = MergedField(backbone, STUDENT)
        self.step, self._bad = 0, 0

    def run(self, report: Callable[[Progress], None]) -> None:
        """Update until ``recipe.steps``; ``report`` is called after each and may raise to stop the run."""
        while self.step < self.recipe.steps:
            progress = self._update()
            self.step += 1
            report(progress)

    def _update(self) -> Progress:
        recipe, done = self.recipe, Progress(self.step + 1)
        rows = range(recipe.batch)
        routes = [route(recipe.seed, self.step, r, len(rows), self.shares, recipe.routing.per) for r in rows]
        drawn = stream(recipe.seed, self.step, "data")
        picks = [int(drawn.integers(len(self.sources[m].conditions))) for m in routes]
        stops = draw_stops(
            recipe.seed, self.step, len(rows), self.sigmas, recipe.query.law, recipe.query.beta
        )
        losses: list[tuple[int, Tensor]] = []
        for group in self._layouts(routes):
            condition = stack([self._conditions(m, [picks[r] for r in mine]) for m, mine in group.items()])
            order = [r for mine in group.values() for r in mine]
            losses += self._match(condition, stops[order], [routes[r] for r in order], len(losses))
        done.sigma = float(self.sigmas[stops].mean())
        for m in sorted({m for m, _ in losses}):
            done.by_teacher[self.sources[m].name] = float(torch.stack([v for k, v in losses if k == m]).mean())
        done.loss = float(torch.stack([v for _, v in losses]).mean())
        self._descend(done)
        return done

    def _layouts(self, routes: Sequence[int]) -> list[dict[int, list[int]]]:
        """Rows by teacher, teachers whose conditions stack together in one group."""
        groups: dict[object, dict[int, list[int]]] = {}
        for row, m in enumerate(routes):
            groups.setdefault(self.sources[m].conditions.layout, {}).setdefault(m, []).append(row)
        return list(groups.values())

    def _conditions(self, teacher: int, picks: list[int]) -> Condition:
        return self.sources[teacher].conditions.rows(picks).to(self.device)

    def _match(
        self, condition: Condition, stops: Tensor, routes: list[int], group: int
    ) -> list[tuple[int, Tensor]]:
        """Walk, ask, match; the gradient of the mean over the whole update is added. Losses by row."""
        seed = int(stream(self.recipe.seed, self.step, f"noise/{group}").integers(2**62))
        shape = (len(routes), *condition.shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        states = rollout(self.walk, noise, self.sigmas, stops, condition)
        sigma = self.sigmas.to(self.device)[stops.to(self.device)]
        answers = torch.empty_like(states)
        for m in sorted(set(routes)):
            mine = [i for i, r in enumerate(routes) if r == m]
            answers[mine] = self.sources[m].field(states[mine], sigma[mine], condition.rows(mine))
        with self.backbone.acting_as(STUDENT):
            velocity = self.backbone.velocity(states, sigma, condition)
        losses = self.objective(velocity, answers, full_trust(states, answers))
        (losses.sum() / self.recipe.batch).backward()
        return list(zip(routes, losses.detach(), strict=True))

    def _descend(self, done: Progress) -> None:
        """Clip, step, average; an update with a NaN or an infinity is skipped, and too many end the run."""
        knobs = self.recipe.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, knobs.clip)
        done.gradient, done.rate = float(norm), self.rate(self.step)
        if not (torch.isfinite(norm) and done.loss == done.loss):
            self._bad, done.skipped = self._bad + 1, True
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
        """The learning rate of an update: warm up, then constant or a cosine to zero."""
        knobs = self.recipe.optimizer
        factor = min(1.0, (step + 1) / max(1, knobs.warmup))
        if knobs.schedule == "cosine":
            factor *= 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.recipe.steps)).item())
        return knobs.lr * factor

    def state(self) -> dict[str, Tensor]:
        """Weights, their average and the optimizer's moments, by flat names."""
        out: dict[str, Tensor] = {}
        for i, (weight, average) in enumerate(zip(self.parameters, self.average, strict=True)):
            out[f"weight.{i}"], out[f"average.{i}"] = weight.detach(), average
            for key, value in self.optimizer.state.get(weight, {}).items():
                out[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
        return out

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Put a saved ``state`` back."""
        self.step = step
        for i, (weight, average) in enumerate(zip(self.parameters, self.average, strict=True)):
            weight.copy_(tensors[f"weight.{i}"])
            average.copy_(tensors[f"average.{i}"])
            prefix = f"optimizer.{i}."
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                placed = {k: v if k == "step" else v.to(weight) for k, v in moments.items()}
                self.optimizer.state[weight] = placed
