"""In hindsight: at which noise levels the good and the bad samples of one question part (after OPID, arXiv 2606.26790).

Every step of a rollout has an estimate of its clean end, `x - σ v`. How far apart the estimates of a group's winners
and losers are grows from the noise to the end, and the levels at which it grows are where the question is decided:
there the loss counts more. Kept by teacher, as a running mean over groups, in checkpoints and in `skills.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import Condition

BINS = 10
"""Equal bins of the noise level from 0 to 1."""
MEMORY = 256
"""Groups of a teacher that its mean remembers, about."""
LEAST = 16
"""Groups of a teacher below which all noise levels count alike."""
BOUNDS = (0.25, 4.0)
"""Of a level's weight."""
_STATE = "nft.parting"


class CleanEstimates:
    """`found`: the N clean estimates (B, …) of a rollout of N steps, and `states` where they were made, on the CPU; an
    `engine.rollout.Observer` of rows that all go on to the end, which is the last estimate."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.states: list[Tensor] = []

    def before(self, step: int, rows: Tensor, x: Tensor) -> None:
        self.states.append(x.to("cpu", copy=True))

    def around(self, field: VelocityField) -> VelocityField:
        """The field, observed."""

        def observed(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            velocity = field(x, sigma, condition)
            self.found.append((x - append_dims(sigma, x) * velocity).cpu())
            return velocity

        return observed


def parting(estimates: Sequence[Tensor], optimality: Tensor) -> Tensor:
    """Of each step, the share (N,) of the winners' final distance from the losers that it adds; NaN where all are
    alike.

    `estimates` are the N clean estimates (G, …) of a group, `optimality` (G,) in [0, 1]. The distance is the squared
    one between the two means, weighted by how good or bad a sample is. The first step has what the noise itself
    decides; steps that bring the two nearer add nothing.
    """
    weights = torch.stack([(optimality - 0.5).clamp(min=0), (0.5 - optimality).clamp(min=0)])
    sums = weights.sum(1, keepdim=True)
    if not bool((sums > 0).all()):
        return optimality.new_full((len(estimates),), float("nan"))
    means = [(weights / sums) @ one.flatten(1).float() for one in estimates]
    apart = torch.stack([(good - bad).square().sum() for good, bad in means])
    grown = apart.diff(prepend=apart.new_zeros(1)).clamp(min=0)
    return grown / grown.sum()


class Parting:
    """Running means of `parting` by teacher and bin of the noise level; `strength` 0 weighs all levels alike."""

    def __init__(self, teachers: Sequence[str], strength: float) -> None:
        self.teachers, self.strength = list(teachers), strength
        self.mean, self.seen = torch.zeros(len(teachers), BINS), torch.zeros(len(teachers))
        self._noted = torch.zeros(len(teachers), BINS + 1)

    def note(self, teacher: int, sigmas: Tensor, shares: Tensor) -> None:
        """Take in a group's shares of the steps from `sigmas (N,)`; folded in at the end of the update."""
        if bool(shares.isfinite().all()):
            self._noted[teacher].index_add_(0, _bins(sigmas), shares.float().cpu())
            self._noted[teacher, BINS] += 1

    def fold(self, all_reduce: Callable[[Tensor], None], device: torch.device) -> None:
        """End an update; `all_reduce` sums a tensor over the processes, in place."""
        noted = self._noted.to(device)
        all_reduce(noted)
        noted, self._noted = noted.cpu(), torch.zeros_like(self._noted)
        count = noted[:, BINS]
        self.seen += count
        share = torch.where(count > 0, count / torch.maximum(count, self.seen.clamp(max=MEMORY)), 0 * count)
        self.mean = torch.lerp(self.mean, noted[:, :BINS] / count.clamp(min=1)[:, None], share[:, None])

    def weights(self, teacher_index: Sequence[int], sigma: Tensor) -> Tensor:
        """Weight (B,) of each row's noise level, 1 on average over the levels that were seen."""
        mine = self.mean[list(teacher_index)]
        there = mine > 0
        usual = mine.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        raised = torch.where(there, mine / torch.where(usual > 0, usual, torch.ones_like(usual)), torch.ones_like(mine))
        weights = (1 + self.strength * (raised - 1)).clamp(*BOUNDS)
        weights = torch.where(self.seen[list(teacher_index), None] >= LEAST, weights, torch.ones_like(weights))
        return weights.gather(1, _bins(sigma.cpu())[:, None])[:, 0].to(sigma)

    def facts(self) -> dict[str, Any]:
        """What `skills.json` holds, by teacher: groups seen, and the share of each bin of the noise level."""
        levels = [f"{i / BINS:g}-{(i + 1) / BINS:g}" for i in range(BINS)]
        return {
            name: {
                "groups": int(seen),
                "parting": {level: round(float(s), 4) for level, s in zip(levels, mean) if s > 0},
            }
            for name, seen, mean in zip(self.teachers, self.seen, self.mean)
        }

    def sentences(self) -> dict[str, list[str]]:
        """The same in plain words, by teacher: a sentence where there are enough groups."""
        found = {}
        for name, seen, mean in zip(self.teachers, self.seen, self.mean):
            if seen >= LEAST:
                best = int(mean.argmax())
                found[name] = [
                    f"Good and bad samples of {name} part most at noise levels {best / BINS:g} to "
                    f"{(best + 1) / BINS:g}, which is {float(mean[best]):.0%} of all that tells them from each other "
                    f"({int(seen)} questions)."
                ]
        return found

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{_STATE}.mean": self.mean, f"{_STATE}.seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mean, self.seen = state[f"{_STATE}.mean"].clone(), state[f"{_STATE}.seen"].clone()
        self._noted.zero_()


def _bins(sigma: Tensor) -> Tensor:
    return (sigma * BINS).long().clamp(max=BINS - 1)
