"""`report.html` of a bench: one self-contained page that opens offline, on a phone, in print and in dark mode.

Reads a bench folder (`scores.json`, `samples.jsonl`, `images/`) and nothing else, so a report can be written again at
any time; `scores.csv`, `scores.md`, `scores.tex` (export.py) and `contact.png` are written beside it. Every item is in
the page; images are embedded worst first until a budget is spent (items.py, thumbnails.py), so that the file stays
below about 25 MB. A content security policy in the page forbids every request, and every script but its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danceopd.bench.evidence.worst import worst
from danceopd.bench.pages.contact import NAME as CONTACT_SHEET
from danceopd.bench.pages.contact import write_contact_sheet
from danceopd.bench.pages.render import render, script_of
from danceopd.bench.report import charts, facts, table
from danceopd.bench.report.evidence import drift_lines, judges
from danceopd.bench.report.export import export
from danceopd.bench.report.items import PAGE, REASON, embed_images, failures, highlights, items_of
from danceopd.bench.report.thumbnails import Thumbnails
from danceopd.bench.report.training import GRID_SIDE
from danceopd.bench.report.verdict import SIGN, subject, verdict_of
from danceopd.bench.results import load
from danceopd.common.files import disk_errors, write_atomic

BUDGET = 16_000_000
"""Characters of embedded images."""
FAILURES = 500
"""Failures that are listed in the page."""
OPTIONAL = (
    *("judge", "judging", "subsets", "metrics", "pictures", "ceiling", "probes", "blend_grid", "base", "seed"),
    *("call", "limit", "categories", "machine", "seconds", "versions", "command", "monitor", "validation", "recipe"),
    *("comparison", "recipe_yaml", "samples", "skills", "drift", "second_judge"),
)
"""Keys of `scores.json` that older benches or other programs may have left out."""


def report(folder: str | Path, budget: int = BUDGET) -> Path:
    """Write `report.html` and the tables beside it into a finished bench's folder; returns the report's path.

    `budget`: characters of embedded images; items beyond it are listed without images. UserError if the folder holds
    no finished bench.
    """
    folder = Path(folder)
    scores, rows = load(folder)
    if "interference" not in scores:  # an older bench
        scores["interference"] = _interference(scores, rows)
    export(folder, scores)
    write_contact_sheet(folder, scores, highlights(scores, items_of(scores, rows)))
    html = page(scores, rows, Thumbnails(folder), budget)
    path = folder / "report.html"
    with disk_errors(path):
        write_atomic(path, html.encode("utf-8"))
    return path


def _interference(scores: dict, rows: Sequence[dict]) -> dict | None:
    from danceopd.bench.interference import interference

    def names(role: str) -> list[str]:
        return [m["name"] for m in scores["models"] if m["role"] == role]

    suite, student = scores["suite"], facts.student_of(scores)["name"]
    scales = {c: facts.scale(scores, c) for c in facts.CAPABILITIES}
    return interference(
        rows, student, facts.base_of(scores), names("teacher"), names("blend"), suite.get("share"), scales
    )


def page(scores: dict, rows: Sequence[dict], thumbnails: Thumbnails, budget: int = BUDGET) -> str:
    """The report of a bench as HTML."""
    scores = dict.fromkeys(OPTIONAL) | scores
    scores["models"] = [{c: None for c in facts.CAPABILITIES} | model for model in scores["models"]]
    charts.assign_colours(scores["models"])
    capabilities = facts.capabilities(scores)
    items = items_of(scores, rows)
    picked = highlights(scores, items)
    twice = [item for found in picked.values() for _, item in found]
    embedded = embed_images(items, thumbnails.fetch, budget, twice)
    failed = failures(items)
    views = facts.measures(scores)
    gaps = {key: found for key, view in views.items() if (found := charts.differences(*view))}
    radars = {key: found for key, view in views.items() if (found := charts.radar(*view))}
    context = {
        "scores": scores,
        "student": facts.student_of(scores),
        "mine": subject(scores),
        "noise": _noise(scores, rows),
        "highlights": picked,
        "worst": worst(scores, items),
        "sheet": (thumbnails.folder / CONTACT_SHEET).is_file(),
        "samples": _grids(scores, thumbnails),
        "drift": drift_lines(scores, thumbnails),
        "judges": judges(scores),
        "who": {m["name"]: m for m in scores["models"]},
        "capabilities": capabilities,
        "measures": list(views),
        "titles": {key: facts.CAPABILITIES[c] for key, (_, c) in views.items()},
        "measure": {key: facts.measure(*view) for key, view in views.items()},
        "own": {key: facts.student_of(of)[c] for key, (of, c) in views.items()},
        "comparisons_of": {key: (of["comparison"] or {}).get(c) for key, (of, c) in views.items()},
        "exact": [c for c in capabilities if facts.exact_of(scores, c)],
        "shares": {c: facts.is_share(scores, c) for c in facts.CAPABILITIES},
        "models": {key: [m for m in of["models"] if m[c]] for key, (of, c) in views.items()},
        "verdict": verdict_of(scores),
        "sign": SIGN,
        "overall": facts.overall_sentence(scores),
        "judge_name": facts.judge_name(scores["judge"]),
        "gaps": gaps,
        "comparisons": sum(len(row["marks"]) for found in gaps.values() for row in found["rows"][1:]),
        "radars": radars,
        "panels": {key: charts.bars(*view) for key, view in views.items()},
        "lines": {key: facts.score_table(*view) for key, view in views.items()},
        "unscored": {key: facts.unscored(*view) for key, view in views.items()},
        "matrix": charts.matrix(scores),
        "validation": charts.validation_curve(scores["validation"]),
        "subsets": facts.subsets(scores),
        "separate": facts.separate(scores),
        "metrics": facts.metrics(scores),
        "items": items,
        "embedded": embedded,
        "choices": _choices(scores, items),
        "page": PAGE,
        "reason": REASON,
        "thumbnail": thumbnails,
        "failures": failed,
        "failures_shown": FAILURES,
        "statuses": list(dict.fromkeys(f["status"] for f in failed)),
        "tally": Counter((f["model"], f["status"]) for f in failed),
        "gap": table.gap_sentence,
        "percent": table.percent,
    }
    script = script_of("danceopd.bench.report", "script.js.j2")
    return render("danceopd.bench.report", "report.html.j2", context, script, ("style", "charts", "images"))


def _grids(scores: Mapping[str, Any], thumbnails: Thumbnails) -> list[dict]:
    """The run's sample grids that are there: {step, image, picture}."""
    found = scores["samples"] or []
    for grid in found:
        thumbnails.fetch([grid["image"]], GRID_SIDE)
    return [grid | {"picture": picture} for grid in found if (picture := thumbnails(grid["image"]))]


def _noise(scores: Mapping[str, Any], rows: Sequence[dict]) -> str:
    """Which models started an item from the same noise: those that generated here; "" where fewer than two did."""
    made = {row["model"] for row in rows if row.get("seed") is not None}
    here = [m["label"] for m in scores["models"] if m["name"] in made]
    if len(here) < 2:
        return ""
    whose = "Every model" if len(here) == len(scores["models"]) else facts.listed(here)
    return f"{whose} generated here, an item from the same noise."


def _choices(scores: Mapping[str, Any], items: Sequence[dict]) -> dict:
    """The choices of the filters: the values that occur, in the order of the suite."""
    ordered = sorted(items, key=lambda item: item["number"])
    return {
        "capability": list(dict.fromkeys(i["capability"] for i in ordered)),
        "category": list(dict.fromkeys(i["category"] for i in ordered)),
        "subset": list(dict.fromkeys(name for i in ordered for name in i["subsets"])),
        "probe": list(dict.fromkeys(i["probe"] for i in ordered if i["probe"])),
        "heldout": len({i["heldout"] for i in items}) > 1,
        "unscored": any(i["unscored"] for i in items),
        "teacher": any(i["teacher"]["gain"] is not None for i in items),
        "base": any(i["base"]["gain"] is not None for i in items),
        "wrong": "wrong" if all(facts.is_share(scores, i["capability"]) for i in items) else "below the middle",
    }
