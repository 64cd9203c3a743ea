"""States at all noise levels: a teacher and some of its rows go in, the states of its own rollouts come out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.common.rng import stream
from danceopd.data.dataset import Dataset
from danceopd.engine.rollout import rollout
from danceopd.models.fields import VelocityField, acting
from danceopd.pipelines.condition import Condition


@dataclass(frozen=True)
class State:
    """Latents `x (B, …)` fp32 at one noise level `sigma (B,)`, and their conditions."""

    x: Tensor
    sigma: Tensor
    condition: Condition


@dataclass(frozen=True)
class Questions:
    """Rows of a dataset that a teacher answers. `field` is the teacher; None: the adapter at hand, unguided."""

    dataset: Dataset
    rows: Sequence[int]
    field: VelocityField | None = None


def spread(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows at most, evenly spaced."""
    few = min(count, len(rows))
    return [rows[i * len(rows) // few] for i in range(few)]


def batches(questions: Questions, at_once: int) -> list[list[int]]:
    """The rows in batches of one layout and schedule."""
    groups: dict[Hashable, list[int]] = {}
    for row in questions.rows:
        key = questions.dataset.layout(row), tuple(questions.dataset.sigmas(row).tolist())
        groups.setdefault(key, []).append(row)
    return [rows[first : first + at_once] for rows in groups.values() for first in range(0, len(rows), at_once)]


def teacher_states(
    field: VelocityField, questions: Questions, seed: int, device: torch.device, at_once: int,
    report: Callable[[], None] = lambda: None,
) -> list[State]:  # fmt: skip
    """Every state of Euler rollouts of `field` at which it was queried; `report` is called after each step."""
    found: list[State] = []
    for rows in batches(questions, at_once):
        condition, sigmas = questions.dataset.rows(rows).to(device), questions.dataset.sigmas(rows[0])
        drawn = [int(stream(seed, row, "calibration").integers(2**62)) for row in rows]
        noise = [torch.randn(condition.shape, generator=torch.Generator().manual_seed(one)) for one in drawn]

        def keep(step: int, order: Tensor, x: Tensor, condition=condition, sigmas=sigmas) -> None:
            found.append(State(x.clone(), sigmas[step].to(x).expand(len(x)), condition))
            report()

        ends = torch.full((len(rows),), len(sigmas) - 1)
        with acting(field):
            rollout(field, torch.stack(noise).to(device), sigmas, ends, condition, keep)
    return found
