"""Which teacher answers for which row: hard routing as a pure function of (seed, step, row).

Rows of one update are spread evenly over the teachers' shares with one random offset an update, so that every
update sees each capability in proportion (``per="row"``); or all rows of an update go to one teacher, drawn by
its share (``per="step"``, as in DanceOPD's released code) or in turn, ``groups`` updates each (``per="turn"``).
No counter and no state: every rank and every resumed run agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stream(seed: int, step: int, name: str) -> np.random.Generator:
    """Random numbers that depend on (seed, step, name) alone."""
    return np.random.default_rng([seed, step, *name.encode()])


def route(
    seed: int, step: int, row: int, rows: int, shares: Sequence[float], per: str = "row", groups: int = 1
) -> int:
    """Index of the teacher that answers for ``row`` of ``rows``; ``shares`` sum to 1 (and do not bear on turns)."""
    if per == "turn":
        return step // groups % len(shares)
    offset = stream(seed, step, "route").random()
    place = (offset + row / rows) % 1.0 if per == "row" else offset
    return min(int(np.searchsorted(np.cumsum(shares), place, side="right")), len(shares) - 1)


def pick(
    seed: int, step: int, units: int, shares: Sequence[float], lengths: Sequence[int], per: str = "row", groups: int = 1
) -> tuple[list[int], list[int]]:
    """Which teacher each of an update's `units` goes to, and which of its `lengths` questions it is asked."""
    routes = [route(seed, step, unit, units, shares, per, groups) for unit in range(units)]
    drawn = stream(seed, step, "data")
    return routes, [int(drawn.integers(lengths[teacher])) for teacher in routes]
