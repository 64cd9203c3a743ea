"""Geometry of the report's charts: `scores.json` goes in, coordinates of bars, differences, radar and curve come out.

The templates draw them as SVG. A model keeps one colour, dash and marker in every chart; the colours can be told apart
with deuteranopia, protanopia and tritanopia, and no chart relies on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from danceopd.bench.report import facts

LEFT, WIDTH = 92, 118
"""Bar charts: where the bars begin, and the width of the scale."""
MIDDLE, HALF = 214, 88
"""Charts of differences: where zero is, and the width of each side."""
RADIUS, TEXT = 100, 118
"""Radars: the outer ring, and the radius of the labels."""
RADAR = ("base", "teacher", "other", "blend", "student")
"""The roles that a radar shows, from back to front."""


def assign_colours(models: Sequence[dict]) -> None:
    """Sets `hue`, a model's colour in the style sheet."""
    count = {"teacher": 0, "other": 0}
    for model in models:
        if model["role"] in count:
            count[model["role"]] += 1
            model["hue"] = f"{model['role']}{(count[model['role']] - 1) % 3 + 1}"
        else:
            model["hue"] = model["role"] if model["role"] in ("base", "blend", "student") else "other1"


def bars(scores: Mapping[str, Any], capability: str) -> list[dict]:
    """A bar chart for the overall score and for each category: {title, count, bars, ceiling}, in SVG units."""
    models = [m for m in scores["models"] if m.get(capability)]
    low, high = facts.scale(scores, capability)
    ceiling = (scores.get("ceiling") or {}).get(capability)

    def at(value: float) -> float:
        return round(LEFT + WIDTH * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0))), 1)

    panels = []
    for category in (None, *categories(models, capability)):
        shown = []
        for model in models:
            found = model[capability]
            value = found["overall"] if category is None else found["categories"].get(category)
            if value and value.get("mean") is not None:
                shown.append(
                    {"label": model["label"], "hue": model["hue"], "mine": model["role"] == "student", "value": value}
                    | {"end": at(value["mean"]), "from": at(value["low"]), "to": at(value["high"])}
                )
        count = max((bar["value"]["n"] + (bar["value"].get("failed") or 0) for bar in shown), default=0)
        top = ceiling and (ceiling["overall"] if category is None else ceiling["categories"].get(category))
        panels.append(
            {"title": category or facts.OVERALL, "count": count, "bars": shown}
            | {"ceiling": None if top is None else {"value": top, "x": at(top)}}
        )
    return panels


def categories(models: Sequence[dict], capability: str) -> list[str]:
    """Every category of any model, in order of appearance."""
    return list(dict.fromkeys(c for m in models if m.get(capability) for c in m[capability]["categories"]))


def differences(scores: Mapping[str, Any], capability: str) -> dict | None:
    """The student minus the best teacher and minus the base, overall and by category: {rows, limit}."""
    rows = [row for row in facts.student_differences(scores, capability) if row["teacher"] or row["base"]]
    if not rows:
        return None
    ends = [abs(row[key][end]) for row in rows for key in ("teacher", "base") if row[key] for end in ("low", "high")]
    limit = _round_up(max(ends, default=0.0)) or 1.0

    def at(value: float) -> float:
        return round(MIDDLE + HALF * value / limit, 1)

    charted = []
    for row in rows:
        marks = []
        for key, shift in (("base", -4), ("teacher", 4)):
            found = row[key]
            if found:
                marks.append(
                    {"kind": key, "value": found, "against": facts.label(scores, found["against"])}
                    | {"x": at(found["mean"]), "from": at(found["low"]), "to": at(found["high"])}
                    | {"shift": shift if row["teacher"] and row["base"] else 0}
                )
        charted.append({"category": row["category"], "marks": marks, "loss": row["loss"]})
    return {"rows": charted, "limit": limit}


def _round_up(value: float) -> float:
    """The value rounded up to 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def radar(scores: Mapping[str, Any], capability: str) -> dict | None:
    """A radar of the category means: {rays, rings, shapes}; None with fewer than three categories."""
    models = [m for m in scores["models"] if m.get(capability) and m["role"] in RADAR]
    names = categories(models, capability)
    low, high = facts.scale(scores, capability)
    if len(names) < 3:
        return None
    turns = [2 * math.pi * n / len(names) - math.pi / 2 for n in range(len(names))]
    shapes = []
    for model in sorted(models, key=lambda m: RADAR.index(m["role"])):
        means = [model[capability]["categories"].get(name, {}).get("mean") for name in names]
        if any(mean is None for mean in means):
            continue
        far = [RADIUS * min(1.0, max(0.0, (mean - low) / ((high - low) or 1.0))) for mean in means]
        points = [(round(r * math.cos(t), 1), round(r * math.sin(t), 1)) for r, t in zip(far, turns)]
        shapes.append({"label": model["label"], "hue": model["hue"], "role": model["role"], "points": points})
    if not shapes:
        return None
    rays = []
    for name, turn in zip(names, turns):
        x, y = math.cos(turn), math.sin(turn)
        side = "middle" if abs(x) < 0.2 else "start" if x > 0 else "end"
        place = {"x": round(RADIUS * x, 1), "y": round(RADIUS * y, 1)}
        rays.append(place | {"name": name, "tx": round(TEXT * x, 1), "ty": round(TEXT * y + 3, 1), "side": side})
    rings = [{"r": RADIUS * part, "value": low + (high - low) * part} for part in (0.25, 0.5, 0.75, 1.0)]
    return {"rays": rays, "rings": rings, "shapes": shapes}


SIGNS = {"above": "▲", "kept": "=", "part": "▽", "lost": "▼", "harmed": "▼▼"}
"""A sign for each verdict of bench/interference.py."""


def matrix(scores: Mapping[str, Any]) -> dict | None:
    """The interference matrix as a table: for each teacher a row of all its own categories, then a row for each.

    {columns, rows: [{name, head, gain, teacher, cells}], legend: sign -> meaning}; a cell is {teacher, base, verdict,
    sign, share}: the figures against that teacher and against the base, `share` the first as a share of the scale.
    """
    found = scores.get("interference")
    if not found or not found["teachers"]:
        return None
    rows = []
    for whole in found["teachers"]:
        place = (whole["capability"], whole["teacher"])
        teacher = facts.label(scores, whole["teacher"])
        own = [r for r in found["categories"] if (r["capability"], r["teacher"]) == place]
        for row in (whole, *own):
            head = row is whole
            name = f"{teacher}: {row['capability']}, {len(own)} categories" if head else row["category"]
            cells = {}
            for model in found["models"]:
                cell = row["cells"].get(model)
                mean = cell and (cell.get("teacher") or {}).get("mean")
                if cell and mean is not None:
                    cells[model] = cell | {
                        "sign": SIGNS.get(cell["verdict"], ""),
                        "share": mean / facts.span(scores, row["capability"]),
                    }
            rows.append({"name": name, "head": head, "gain": row["gain"], "teacher": row["teacher"], "cells": cells})
    legend = {SIGNS[key]: text for key, text in found["verdicts"].items() if key in SIGNS}
    return {"columns": found["models"], "rows": rows, "legend": legend}


def validation_curve(found: Mapping[str, Any] | None) -> dict | None:
    """The validation error of the student's run: the first and the exported check, and a curve on a log scale.

    {first, chosen, checks, line, ring}; the curve is in a box of 100 x 30 with y down. Checks without a value are not
    on it.
    """
    if not found:
        return None
    checks = found["checks"]
    chosen = next(check for check in checks if check["step"] == found["exported"])
    placed = [(check["step"], math.log10(check["error"])) for check in checks if check["error"]]
    steps, heights = [step for step, _ in placed], [height for _, height in placed]

    def at(step: int, height: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(1, steps[-1] - steps[0])
        up = (height - min(heights)) / (max(heights) - min(heights) or 1.0)
        return round(3 + 94 * across, 1), round(27 - 24 * up, 1)

    line = [at(*place) for place in placed] if len(placed) > 1 else []
    ring = at(chosen["step"], math.log10(chosen["error"])) if line and chosen["error"] else None
    return {"first": checks[0], "chosen": chosen, "checks": len(checks), "line": line, "ring": ring}
