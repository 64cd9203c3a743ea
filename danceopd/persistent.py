"""Walks that live over several updates, so that a sample costs a part of a walk. An experiment, off by default.

Each of the B slots of a batch holds one walk for K updates (`rollout.persistent`). In each it goes on under that
update's student to its next query, is asked there once, and rests; after the K-th it begins anew. Slot i begins anew
in the updates t with (t - i) mod K = 0, so every update sees walks of all ages. What a walk is (teacher, question,
noise, K queries from high noise to low) is drawn in the update it begins in: a pure function of (seed, update, slot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from danceopd.lesson import Lesson
from danceopd.query import draw
from danceopd.recipe import Recipe
from danceopd.routing import pick, stream
from danceopd.solvers import beside

if TYPE_CHECKING:
    from danceopd.skills import Criticality

WALK = "walk."
"""What the names of saved walks begin with."""


def life(step: int, slot: int, queries: int) -> tuple[int, int]:
    """In which update a slot's walk of this update was drawn, and which of its `queries` is due, from 0.

    Walks that would have begun before the first update begin there, and first walk to the query that is due.
    """
    due = (step - slot) % queries
    return max(step - due, 0), due


@dataclass(frozen=True)
class Walk:
    """A walk that rests: in which update it left the noise, at which grid index it is, and the last step's two ends."""

    began: int
    at: int
    behind: Tensor
    here: Tensor


class Walks:
    """The walks of this process's slots, between updates: `held`, by slot. One that is not held is still noise."""

    def __init__(self, recipe: Recipe, rank: int = 0, ranks: int = 1) -> None:
        self.recipe, self.rank = recipe, rank
        self.queries = recipe.rollout.persistent
        self.held: dict[int, Walk] = {}
        phased = sorted(range(recipe.batch), key=lambda slot: (slot % self.queries, slot))
        self._owner = {slot: place % ranks for place, slot in enumerate(phased)}

    def mine(self, slot: int) -> bool:
        """Whether a slot is this process's: for ever, and each process has walks of all ages."""
        return self._owner[slot] == self.rank

    def drawn(
        self, step: int, shares: Sequence[float], lengths: Sequence[int]
    ) -> tuple[list[int], list[int], np.ndarray, Tensor]:
        """What the slots' walks are in an update: teachers, questions, which are asked with the null prompt (B,), and
        the draws (B, 1) fp64 of the queries that are due."""
        recipe, rows, query = self.recipe, self.recipe.batch, self.recipe.query
        lives = [life(step, slot, self.queries) for slot in range(rows)]
        routes, picks = [0] * rows, [0] * rows
        blank, levels = np.zeros(rows, dtype=bool), torch.empty(rows, 1, dtype=torch.float64)
        for began in {began for began, _ in lives}:
            routed, picked = pick(recipe.seed, began, rows, shares, lengths)
            away = stream(recipe.seed, began, "blank").random(rows) < recipe.guidance.unconditional
            asked = draw(recipe.seed, began, rows, self.queries, query.law, query.beta)
            asked = asked.sort(1, descending=query.law != "paper").values  # the paper's draws are shares of the walk
            for slot, (mine, due) in enumerate(lives):
                if mine == began:
                    routes[slot], picks[slot], blank[slot] = routed[slot], picked[slot], away[slot]
                    levels[slot, 0] = asked[slot, due]
        return routes, picks, blank, levels

    def noise(self, step: int, slot: int, shape: Sequence[int]) -> Tensor:
        """The noise that a slot's walk of this update begins with."""
        began, _ = life(step, slot, self.queries)
        seed = int(stream(self.recipe.seed, began, f"walk/{slot}").integers(2**62))
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def rest(self, step: int, slot: int, walk: Walk) -> None:
        """Keep a walk for the next update, unless it was its last query."""
        if life(step, slot, self.queries)[1] < self.queries - 1:
            self.held[slot] = walk

    def forget_broken(self) -> None:
        """Drop walks with a NaN or an infinity: they begin anew, and do not break their later updates too."""
        self.held = {slot: walk for slot, walk in self.held.items() if bool(torch.isfinite(walk.here).all())}

    def state(self) -> dict[str, Tensor]:
        """The walks of this process, by flat names, on the CPU."""
        out = {}
        for slot, walk in self.held.items():
            out[f"{WALK}{slot}"] = torch.stack([walk.behind, walk.here]).cpu()
            out[f"{WALK}{slot}.place"] = torch.tensor([walk.began, walk.at])
        return out

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take this process's walks from the saved ones of all, however many processes there were."""
        self.held = {}
        for slot in filter(self.mine, range(self.recipe.batch)):
            if f"{WALK}{slot}" in tensors:
                behind, here = tensors[f"{WALK}{slot}"].to(device)
                began, at = tensors[f"{WALK}{slot}.place"].tolist()
                self.held[slot] = Walk(began, at, behind, here)


@dataclass(kw_only=True)
class Leg(Lesson):
    """A lesson whose rows, the `slots` of `walks`, go on from where they rest."""

    slots: list[int]
    walks: Walks

    def walk(self, stops: Tensor, levels: Tensor | None = None, watch: Criticality | None = None) -> Tensor:
        """The students' states (B, 1, …) at the queries that are due, one for each row; the walks then rest.

        Between two grid points the state is on the line that is Euler's step there, and the walk rests at the step's
        end. So several queries on one step, whenever they are due, ask the field for it once.
        """
        held = self.walks.held
        walks = [held.pop(slot) if slot in held else self._begin(slot) for slot in self.slots]
        self.ages = [self.step - walk.began for walk in walks]
        start, stop = torch.tensor([walk.at for walk in walks]), stops[:, 0].cpu()
        behind, here = (torch.stack([getattr(walk, end) for walk in walks]) for end in ("behind", "here"))
        before = torch.maximum(stop - 1, start)
        seen = self.walk_from(here, torch.stack([before, stop], 1), watch=watch, start=start)
        moved, here = beside((stop > start).to(here.device), here), seen[:, 1]
        behind = torch.where(moved, seen[:, 0], behind)
        for row, slot in enumerate(self.slots):
            self.walks.rest(self.step, slot, Walk(walks[row].began, int(stop[row]), behind[row], here[row]))
        if levels is None:
            return seen[:, 1:]
        low, high = self.sigmas[stop], self.sigmas[(stop - 1).clamp(min=0)]
        share = (levels[:, 0].cpu() - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.lerp(here, behind, beside(share.to(here), here)).unsqueeze(1)

    def _begin(self, slot: int) -> Walk:
        noise = self.walks.noise(self.step, slot, self.condition.shape).to(self.device)
        return Walk(self.step, 0, noise, noise)
