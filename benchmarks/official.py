"""The released loop's way of making an update, on our objects: what `step.py` compares the engine with.

One sample at a time, its gradient added to the others'; the prompt (and the source) encoded for every sample; all
rollout steps walked through the LoRA layers, whichever of their states is asked about; a whole copy of the transformer
for each teacher. Each habit can be mended alone. Written from what that code does, not from its text; fp32 and the
query law are ours, so that only the way differs and the update is the same to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.lora import Adapter
from danceopd.pipelines.record import Condition
from danceopd.query import draw, place
from danceopd.routing import pick

STUDENT = "student"


@dataclass(frozen=True)
class Habits:
    """What is mended of the released loop; nothing: all as it is."""

    caches: bool = False  # prompts and sources are encoded once
    stops: bool = False  # a walk ends where it is asked about
    merges: bool = False  # walks run on W + BA


@dataclass(frozen=True)
class Route:
    """One teacher's work: conditions (rows), how one of them is encoded, and the teacher's own transformer."""

    teacher: Backbone
    condition: Condition
    encode: Callable[[int], Any]


class Official:
    """The student on its own transformer, and an update of `batch` samples."""

    def __init__(
        self, student: Backbone, routes: Sequence[Route], sigmas: Tensor, rank: int, batch: int, habits: Habits
    ) -> None:
        self.student, self.routes, self.sigmas, self.batch, self.habits = student, routes, sigmas, batch, habits
        self.parameters = student.new_student(STUDENT, rank)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)
        self.step = 0

    def update(self) -> None:
        """Samples one after another, then one gradient step."""
        lengths = [len(route.condition) for route in self.routes]
        shares = [1 / len(lengths)] * len(lengths)
        routes, picks = pick(0, self.step, self.batch, shares, lengths, "row", 1)
        stops, _ = place(draw(0, self.step, self.batch), self.sigmas)
        for m, row, stop in zip(routes, picks, stops[:, 0].tolist(), strict=True):
            self._sample(self.routes[m], row, stop)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _sample(self, route: Route, row: int, stop: int) -> None:
        if not self.habits.caches:
            route.encode(row)
        condition = route.condition.rows([row])
        x, states = torch.randn(1, *condition.shape), []
        walking = self.student.merged(STUDENT) if self.habits.merges else self.student.acting_as(STUDENT)
        with torch.no_grad(), walking:
            for k in range(stop + 1 if self.habits.stops else len(self.sigmas) - 1):
                states.append(x.clone())
                if len(states) > stop and self.habits.stops:
                    break
                velocity = self.student.velocity(x, self.sigmas[k : k + 1], condition)
                x = x + (self.sigmas[k + 1] - self.sigmas[k]) * velocity
        state, sigma = states[stop], self.sigmas[stop : stop + 1]
        with torch.no_grad():
            answer = route.teacher.velocity(state, sigma, condition)
        with self.student.acting_as(STUDENT):
            loss = (self.student.velocity(state, sigma, condition) - answer).square().mean()
        (loss / self.batch).backward()


@torch.no_grad()
def copy_with(transformer: torch.nn.Module, adapter: Adapter, family: Any) -> Backbone:
    """A whole copy of the transformer with an adapter in its weights."""
    whole = copy.deepcopy(transformer)
    for path in adapter.tensors:
        whole.get_submodule(path).weight.add_(adapter.delta(path))
    return Backbone(whole, family)
