"""The table of `quality.py`: from learning curves and seconds of an update to the seconds until a quality is reached.

A gap is the way from the base's score to the teacher's, of one capability; closed by 1 where the student scores as the
teacher does.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from danceopd.common.system import describe_machine


def closed(points: Sequence[Sequence[float]], base: Sequence[float], teachers: Sequence[float]) -> list[list[float]]:
    """[update, share closed of the generation gap, of the editing gap], from points [update, generation, editing]."""
    return [[p[0], *((v - b) / (t - b) for v, b, t in zip(p[1:], base, teachers, strict=True))] for p in points]


def reached(curve: Sequence[Sequence[float]], share: float) -> float | None:
    """The update at which both gaps are first closed by `share`, on straight lines between the points; None: never."""
    for (n0, *before), (n1, *after) in zip(curve, curve[1:]):
        if min(after) >= share:
            crossed = [0.0 if b >= share else (share - b) / (a - b) for b, a in zip(before, after, strict=True)]
            return n0 + max(crossed) * (n1 - n0)
    return None


def mean_of(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean curve of several seeds, at the updates that all of them have."""
    scores = [{point[0]: point[1:] for point in curve} for curve in curves]
    there = sorted(set.intersection(*map(set, scores)))
    return [[n, *map(statistics.mean, zip(*(found[n] for found in scores), strict=True))] for n in there]


def curves_of(facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, list[list[list[float]]]]:
    """By curve, the shares closed of every seed: its points of all runs together, from update 0 on."""
    base, teachers, start = (facts["references"][name] for name in ("base", "teachers", "start"))
    found: dict[str, dict[int, list[list[float]]]] = {}
    for run in runs:
        found.setdefault(run["curve"], {}).setdefault(run["seed"], [[0, *start]]).extend(run["points"])
    return {
        name: [closed(sorted(points), base, teachers) for points in seeds.values()] for name, seeds in found.items()
    }


def report(curve_of: Mapping[str, str], facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown; `curve_of`: the names of its lines, and the curve that each follows."""
    base, teachers, start = (facts["references"][name] for name in ("base", "teachers", "start"))
    curves, shares = curves_of(facts, runs), facts["shares"]
    pace: dict[str, float] = facts.get("paces", {})
    rows, seeds = facts["rows"], max((len(found) for found in curves.values()), default=0)
    lines = [
        f"Updates of {rows} rows, {facts['items']} validation prompts and as many edits, up to {seeds} seeds; "
        f"{describe_machine()}, torch {torch.__version__}. Base {base[0]:.3f} / {base[1]:.2f}, generation teacher "
        f"{teachers[0]:.3f}, editing teacher {teachers[1]:.2f}; every student is initialised to their blend, "
        f"{start[0]:.3f} / {start[1]:.2f}. {facts['schedule']}.",
        "",
        "Updates until the mean curve has closed this share of both gaps, from the base's score to the teacher's (in "
        "brackets: the seeds' range; > where the mean did not), times the seconds of an update; and how many times "
        "sooner than the released loop.",
        "",
        "| | seeds | s an update | " + " | ".join(f"updates to {share:.0%} | s | sooner" for share in shares)
        + " | at the last update, gen. / edit. |",
        "|---|" + "--:|" * (3 * len(shares) + 3),
    ]  # fmt: skip
    first: dict[float, tuple[float, bool]] = {}  # by share, the seconds of the first line, and whether it got there
    for name, curve in curve_of.items():
        if curve not in curves:
            continue
        mean, cells = mean_of(curves[curve]), []
        for share in shares:
            each, there = [reached(c, share) for c in curves[curve]], reached(mean, share)
            ends = min(each, key=_late), max(each, key=_late)
            span = " to ".join("never" if n is None else f"{n:.0f}" for n in ends)
            late, updates = (">", mean[-1][0]) if there is None else ("", there)
            cells.append(f"{late}{updates:.0f}" + ("" if there is None else f" ({span})"))
            seconds = updates * pace[name] if name in pace else None
            cells.append("-" if seconds is None else f"{late}{seconds:.0f}")
            if seconds is not None:
                first.setdefault(share, (seconds, there is not None))
            if seconds is None or there is None:
                cells.append("-")
            else:
                cells.append(f"{'' if first[share][1] else '>'}{first[share][0] / seconds:.1f}x")
        paced = f"{pace[name]:.2f}" if name in pace else "-"
        last = f"{mean[-1][1]:.0%} / {mean[-1][2]:.0%} after {mean[-1][0]:.0f}"
        lines.append(f"| {name} | {len(curves[curve])} | {paced} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines) + "\n"


def _late(updates: float | None) -> float:
    return float("inf") if updates is None else updates
