"""One self-contained `report.html` of a bench: it opens offline, on a phone, in print, in dark mode.

Reads a bench folder (`scores.json`, `samples.jsonl`, `images/`) and nothing else, so a report can be made again at
any time; `scores.csv`, `scores.md` and `scores.tex` are written beside it (bench/export.py). Every item is in the
page; pictures are inlined worst first until a budget is spent (bench/items.py, bench/thumbnails.py), so that the
file stays below about 25 MB. A content policy in the page forbids every request, and every script but its own.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from danceopd.bench import charts, standing, table
from danceopd.bench.export import export
from danceopd.bench.items import PAGE, REASON, failures, give_pictures, items_of
from danceopd.bench.scores import load
from danceopd.bench.thumbnails import Thumbnails
from danceopd.disk import disk_faults, replace_file

BUDGET = 16_000_000
"""Characters of inlined pictures."""
FAILURES = 500
"""Failures that the page lists."""
OPTIONAL = (
    *("judge", "judging", "subsets", "metrics", "pictures", "ceiling", "probes", "blend_grid", "base", "seed", "call"),
    *("limit", "categories", "machine", "seconds", "versions", "command", "watch", "field_gap"),
)
"""Keys of `scores.json` that an older bench, or another maker, may have left out."""


def report(folder: str | Path, budget: int = BUDGET) -> Path:
    """Write `report.html` and the tables beside it into a finished bench's folder; returns the report's path.

    `budget`: characters of pictures that the page may hold; items beyond it are listed in words. Raises UserError when
    the folder holds no finished bench.
    """
    folder = Path(folder)
    scores, rows = load(folder)
    if "interference" not in scores:  # a bench made before there was one
        scores["interference"] = _interference(scores, rows)
    export(folder, scores)
    html = page(scores, rows, Thumbnails(folder), budget)
    path = folder / "report.html"
    with disk_faults(path):
        replace_file(path, html.encode("utf-8"))
    return path


def _interference(scores: dict, rows: Sequence[dict]) -> dict | None:
    from danceopd.bench.interference import interference

    def names(role: str) -> list[str]:
        return [m["name"] for m in scores["models"] if m["role"] == role]

    suite, student = scores["suite"], standing.student_of(scores)["name"]
    scales = {c: standing.scale(scores, c) for c in standing.CAPABILITIES}
    return interference(
        rows, student, standing.base_of(scores), names("teacher"), names("blend"), suite.get("share"), scales
    )


def page(scores: dict, rows: Sequence[dict], pictures: Thumbnails, budget: int = BUDGET) -> str:
    """The report of a bench as HTML."""
    scores = dict.fromkeys(OPTIONAL) | scores
    scores["models"] = [{c: None for c in standing.CAPABILITIES} | model for model in scores["models"]]
    charts.hues(scores["models"])
    capabilities = standing.capabilities(scores)
    items = items_of(scores, rows)
    given = give_pictures(items, pictures.fetch, budget)
    failed = failures(items)
    gaps = {c: found for c in capabilities if (found := charts.differences(scores, c))}
    radars = {c: found for c in capabilities if (found := charts.radar(scores, c))}
    words = {
        "scores": scores,
        "student": standing.student_of(scores),
        "who": {m["name"]: m for m in scores["models"]},
        "rivals": standing.rivals(scores),
        "capabilities": capabilities,
        "titles": standing.CAPABILITIES,
        "measure": {c: standing.measure(scores, c) for c in capabilities},
        "shares": {c: standing.is_share(scores, c) for c in standing.CAPABILITIES},
        "models": {c: [m for m in scores["models"] if m[c]] for c in capabilities},
        "verdict": standing.verdict(scores),
        "overall": standing.overall_sentence(scores),
        "judge_name": _judge(scores["judge"]),
        "gaps": gaps,
        "comparisons": sum(len(row["marks"]) for found in gaps.values() for row in found["rows"][1:]),
        "radars": radars,
        "panels": {c: charts.bars(scores, c) for c in capabilities},
        "lines": {c: standing.lines(scores, c) for c in capabilities},
        "unscored": {c: standing.unscored(scores, c) for c in capabilities},
        "matrix": charts.matrix(scores),
        "course": charts.course(scores["field_gap"]),
        "subsets": standing.subsets(scores),
        "apart": standing.apart(scores),
        "metrics": [*standing.metrics(scores), *standing.sets(scores)],
        "items": items,
        "given": given,
        "choices": _choices(items),
        "page": PAGE,
        "reason": REASON,
        "picture": pictures,
        "failures": failed,
        "failures_shown": FAILURES,
        "statuses": list(dict.fromkeys(f["status"] for f in failed)),
        "tally": Counter((f["model"], f["status"]) for f in failed),
        "gap": table.gap_sentence,
    }
    return _render(words)


def _judge(judge: Any) -> str:
    """A judge's name, from its identity."""
    if not isinstance(judge, Mapping):
        return str(judge or "")
    return str(next((judge[key] for key in ("name", "model", "kind") if judge.get(key)), "a judge"))


def _choices(items: Sequence[dict]) -> dict:
    """What the filters offer: the values that occur, in the order of the suite."""
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
    }


def _clip(text: str, length: int) -> str:
    """The beginning of a text, with an ellipsis where more follows."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _render(words: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("danceopd.bench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": standing.number, "percent": table.percent, "clip": _clip}
    script = environment.get_template("script.js.j2").render()
    style = "\n".join(environment.get_template(f"{name}.css.j2").render() for name in ("style", "charts", "pictures"))
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    own = {"script": Markup(script), "style": Markup(style), "script_hash": f"sha256-{digest}"}
    return environment.get_template("report.html.j2").render(**words, **own)
