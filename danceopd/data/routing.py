"""Which teacher a row of an update is routed to, and which sample it draws: pure functions of (seed, step, row).

Rows of one update are spread evenly over the teachers' shares with one random offset an update, so that every update
sees each capability in proportion (``per="row"``); or all rows of an update go to one teacher, drawn by its share
(``per="step"``, as in DanceOPD's released code) or in turn, ``turn`` updates each (``per="turn"``). No counter and no
state: every process and every resumed run agree. ``per="need"`` is ``row`` with shares of the moment, which the latest
check of the validation error gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from danceopd.common.rng import stream
from danceopd.recipe.sampling import Sampling

OVER, COUNTED = 24, 100_000
LEAST, MOST = 1 / 3, 3.0
"""How far `per: need` changes a teacher's share, before all are scaled to sum to 1: at most by MOST / LEAST."""


def route(seed: int, step: int, row: int, rows: int, shares: Sequence[float], per: str = "row", turn: int = 1) -> int:
    """Index of the teacher of ``row`` of ``rows``; ``shares`` sum to 1 (and do not matter where teachers take turns).
    """
    if per == "turn":
        return step // turn % len(shares)
    offset = stream(seed, step, "route").random()
    place = (offset + row / rows) % 1.0 if per == "row" else offset
    return min(int(np.searchsorted(np.cumsum(shares), place, side="right")), len(shares) - 1)


def sample_batch(
    sampling: Sampling, step: int, lengths: Sequence[int], shares: Sequence[float] | None = None
) -> tuple[list[int], list[int]]:
    """Teacher index and sample index of each group of update `step`; `lengths` are the sizes of the teachers' data.

    `shares` are the present ones of `per: need` (None: the recipe's own).
    """
    seed, groups, routing = sampling.seed, sampling.groups_per_step, sampling.routing
    step = sampling.drawn_at(step)
    if routing.per in ("row", "need"):  # as `route` for each group, with the numbers that a step shares drawn once
        now = sampling.shares if shares is None else shares
        places = (stream(seed, step, "route").random() + np.arange(groups) / groups) % 1.0
        found = np.searchsorted(np.cumsum(now), places, side="right")
        teachers = np.minimum(found, len(now) - 1).tolist()
    else:
        teachers = [route(seed, step, 0, groups, sampling.shares, routing.per, routing.groups)] * groups
    if routing.per == "need":
        mine = [iter(rows) for rows in samples_by_need(sampling, step, lengths)]
        return teachers, [next(mine[teacher]) for teacher in teachers]
    drawn = stream(seed, step, "data")
    return teachers, [int(drawn.integers(lengths[teacher])) for teacher in teachers]


def samples_by_need(sampling: Sampling, step: int, lengths: Sequence[int]) -> list[list[int]]:
    """For each teacher, the rows of its data that update `step` samples at most, in their order.

    They do not depend on the shares of the moment, so a run's rows are known before it begins.
    """
    found = []
    for teacher, (length, share) in enumerate(zip(lengths, sampling.shares, strict=True)):
        count = int(sampling.groups_per_step * min(1.0, share * MOST / LEAST)) + 2
        found.append(stream(sampling.seed, step, f"data/{teacher}").integers(length, size=count).tolist())
    return found


def draws_all(sampling: Sampling, share: float, length: int) -> bool:
    """Whether the updates draw so often, a `share` of their rows, from data of a `length` that all of it is wanted.

    `OVER` times over, no row is left out; where there are more than `COUNTED` updates to count, once over is enough.
    """
    draws = sampling.steps * sampling.distinct / sampling.round * sampling.groups_per_step * share
    return draws >= length * (OVER if sampling.steps <= COUNTED else 1)
