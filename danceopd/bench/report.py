"""One self-contained `report.html` of a bench: it opens offline, on a phone, in print, in dark mode.

Reads a bench folder (`scores.json`, `samples.jsonl`, `images/`) and nothing else, so a report can be made
again at any time. Pictures are inlined as PNG data URIs; so that the file stays below a few megabytes, a
category shows its worst items first and the page says how many it leaves out. The templates draw the bars as
SVG and carry the only script: filter and sort. A content policy in the page forbids every request.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench import table
from danceopd.bench.scores import load
from danceopd.disk import disk_faults, replace_file

PER_CATEGORY = 12
BUDGET = 5_000_000
"""Bytes of inlined pictures; fewer items a category are shown until they fit."""
LIMIT = {"generation": 1.0, "editing": 10.0}
HUES = {"base": "base", "blend": "blend", "student": "student"}


class _Pictures:
    """Data URIs of a bench's pictures, each encoded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict | None] = {}

    def __call__(self, path: str | None) -> dict | None:
        """{uri, width, height}, or None where there is no such picture."""
        if path is None:
            return None
        if path not in self.found:
            self.found[path] = self._read(self.folder / path)
        return self.found[path]

    @staticmethod
    def _read(file: Path) -> dict | None:
        if not file.is_file():
            return None
        with Image.open(file) as image:
            size, stream = image.size, io.BytesIO()
            image.convert("RGB").save(stream, "PNG", optimize=True)
        text = base64.b64encode(stream.getvalue()).decode()
        return {"uri": f"data:image/png;base64,{text}", "width": size[0], "height": size[1]}


def _items(scores: dict, rows: Sequence[dict], capability: str) -> list[dict]:
    """One record an item: its words and every model's row, with the student's standing."""
    student, teachers = scores["student"], [m["name"] for m in scores["models"] if m["role"] == "teacher"]
    found: dict[str, dict] = {}
    for row in rows:
        if row["capability"] != capability:
            continue
        item = found.setdefault(
            row["key"],
            {k: row.get(k) for k in ("key", "category", "prompt", "capability", "source", "target", "seed", "probe")}
            | {"cells": {}},
        )
        item["cells"][row["model"]] = row
    for number, item in enumerate(found.values()):
        mine = item["cells"].get(student)
        best = max((item["cells"][t]["score"] for t in teachers if t in item["cells"]), default=None)
        item["number"] = number
        item["score"] = mine["score"] if mine else None
        item["gain"] = None if mine is None or best is None else mine["score"] - best
        item["failed"] = bool(mine) and not mine["correct"]
        item["worse"] = item["gain"] is not None and item["gain"] < -1e-9
    return [item for item in found.values() if item["score"] is not None]


def _worst_first(item: dict) -> tuple:
    return (not item["failed"], item["score"], item["gain"] if item["gain"] is not None else 0.0, item["number"])


def _chosen(items: Sequence[dict], per_category: int) -> list[dict]:
    """The worst items of each category, worst first over all of them."""
    by_category: dict[str, list[dict]] = {}
    for item in items:
        by_category.setdefault(item["category"], []).append(item)
    kept = [item for group in by_category.values() for item in sorted(group, key=_worst_first)[:per_category]]
    return sorted(kept, key=_worst_first)


def _weight(items: Sequence[dict], pictures: _Pictures) -> int:
    paths = {p for i in items for p in (i["source"], i["target"], *(c["image"] for c in i["cells"].values())) if p}
    return sum(len(found["uri"]) for path in paths if (found := pictures(path)))


def _shown(by_capability: dict[str, list[dict]], pictures: _Pictures, per_category: int, budget: int) -> dict:
    """capability -> items to show, as many a category as the budget allows."""
    for number in range(per_category, 0, -1):
        shown = {capability: _chosen(items, number) for capability, items in by_capability.items()}
        if _weight([i for items in shown.values() for i in items], pictures) <= budget:
            break
    return shown


def _panels(scores: dict, capability: str) -> list[dict]:
    """One small chart a category and one for the overall score: bars of all models."""
    models = [m for m in scores["models"] if m.get(capability)]
    ceiling = (scores.get("ceiling") or {}).get(capability)
    if not models:
        return []
    panels = []
    for category in (None, *models[0][capability]["categories"]):
        bars = []
        for model in models:
            found = model[capability]
            value = found["overall"] if category is None else found["categories"].get(category)
            if value:
                bars.append({"label": model["who"], "hue": model["hue"], "student": model["role"] == "student"} | value)
        top = ceiling and (ceiling["overall"] if category is None else ceiling["categories"].get(category))
        panels.append({"title": category or "overall", "bars": bars, "ceiling": top, "limit": LIMIT[capability]})
    return panels


def _hues(models: Sequence[dict]) -> None:
    """Gives each model the name of its colour in the style sheet, and a short name for tight places."""
    count = {"teacher": 0, "other": 0}
    for model in models:
        model["who"] = "student" if model["role"] == "student" else model["label"]
        if model["role"] in count:
            count[model["role"]] += 1
            model["hue"] = f"{model['role']}{(count[model['role']] - 1) % 3 + 1}"
        else:
            model["hue"] = HUES[model["role"]]


def _sentence(scores: dict) -> str:
    """What came out, in one sentence."""
    closed, stands = [], []
    for capability, found in scores["comparison"].items():
        gap, best = found["gap_closed"], found["best_teacher"]
        if gap and gap["share"] is not None:
            closed.append(f"{table.percent(gap['share'])} in {capability}")
        elif best and best in found["deltas"]:
            stands.append(f"stands at {found['deltas'][best]['mean']:+.2f} against {best} in {capability}")
    parts = [f"closes {' and '.join(closed)} of the gap between the base and the best teacher"] if closed else []
    return f"The student {' and '.join(parts + stands) or 'was measured on its own'}."


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("danceopd.bench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"short": table.short, "percent": table.percent, "number": table.number}
    environment.filters["signed"] = lambda value: f"{value:+.2f}"
    return environment


def report(folder: str | Path, per_category: int = PER_CATEGORY, budget: int = BUDGET) -> Path:
    """Write `report.html` into a finished bench's folder and return its path.

    At most `per_category` items of each category are shown, fewer where their pictures exceed `budget` bytes.
    Raises UserError when the folder holds no finished bench.
    """
    folder = Path(folder)
    scores, rows = load(folder)
    _hues(scores["models"])
    pictures = _Pictures(folder)
    capabilities = [c for c in ("generation", "editing") if any(m.get(c) for m in scores["models"])]
    items = {c: _items(scores, rows, c) for c in capabilities}
    items = {c: found for c, found in items.items() if found}
    shown = _shown(items, pictures, max(1, per_category), budget)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            scores=scores,
            capabilities=capabilities,
            items=items,
            shown=shown,
            picture=pictures,
            panels={c: _panels(scores, c) for c in capabilities},
            sentence=_sentence(scores),
            limit=LIMIT,
            gap=table.gap_sentence,
            worst=table.worst_sentence,
        )
    )
    path = folder / "report.html"
    with disk_faults(path):
        replace_file(path, html.encode("utf-8"))
    return path
