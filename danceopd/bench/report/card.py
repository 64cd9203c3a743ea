"""A bench in the student's model card: `scores.json` goes in, a table and Hugging Face's `model-index` come out.

Only the card of a run's folder (run/card.py) is changed; the same bench again replaces its own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danceopd.bench.report import facts
from danceopd.bench.report.verdict import verdict_of
from danceopd.run.card import add_results

TASKS = {"generation": "text-to-image", "editing": "image-to-image"}


def add_to_card(student: str | Path | None, scores: Mapping[str, Any], sheet: Path | None = None) -> None:
    """Write a bench's verdict, contact sheet and overall scores into `student`/README.md, where there is one."""
    if student is None or not (Path(student) / "README.md").is_file():
        return
    suite = scores["suite"]
    table: dict[str, dict[str, str | None]] = {m["label"]: {} for m in scores["models"]}
    metrics: dict[str, list[dict[str, Any]]] = {}
    for of, c in facts.measures(scores).values():
        measure = facts.measure(of, c)
        for model in of["models"]:
            found = model.get(c)
            table[model["label"]][f"{c}, {measure}"] = facts.score(found["overall"]) if found else None
        own = (facts.student_of(of).get(c) or {"overall": {"mean": None}})["overall"]["mean"]
        if own is not None:
            metrics.setdefault(c, []).append({"type": "score", "name": measure, "value": round(own, 4)})
    results = [
        {
            "task": {"type": TASKS[c], "name": facts.CAPABILITIES[c]},
            "dataset": {"type": suite["name"], "name": f"{suite['name']} {suite['version']}"},
            "metrics": found,
        }
        for c, found in metrics.items()
    ]
    judge = facts.judge_name(scores.get("judge"))
    about = f"Suite `{suite['name']}` {suite['version']}" + (f", judged by {judge}" if judge else "")
    about += f"; at most {scores['limit']} items of each capability" if scores.get("limit") else ""
    about += "; means with 95 % intervals."
    sentence = verdict_of(scores)["sentence"]
    add_results(Path(student), f"{suite['name']} {suite['version']}", sentence, table, about, results, sheet)
