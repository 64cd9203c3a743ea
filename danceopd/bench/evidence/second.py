"""A second judge on the same images: does it come to the same verdict, and how far do the two agree?

Its answers are in `judge2.jsonl`. What is known of a judge's agreement with people is said beside it (`PEOPLE`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench.judges.agreement import agreement_of_files
from danceopd.bench.report import facts
from danceopd.bench.suites.protocol import JudgedSuite
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.judges.session import JudgeSession
    from danceopd.bench.scoring import Scoring

FILE = "judge2.jsonl"
VIESCORE = (
    "for VIEScore with GPT-4o, Spearman's correlation with people is 0.4, that of people with each other 0.45, and it "
    "is lower in editing than in generation (arXiv 2312.14867)"
)
PEOPLE = {
    "gedit": VIESCORE,
    "folder": VIESCORE,
    "geneval": "on recent models GenEval's detector is up to 17.7 points away from people (arXiv 2512.16853)",
}
"""Suite -> what was published about the agreement of its judge with people."""


def rows_of_second(scoring: Scoring, rows: Sequence[dict], session: JudgeSession) -> list[dict]:
    """The rows of `Scoring.run` with the scores of another judge; nothing is written but its answers."""
    assert isinstance(scoring.suite, JudgedSuite)
    models, parts = scoring.lineup.models, scoring.items.values()
    places = [(model.name, item.id) for model in models for part in parts for item in part]
    nothing: dict[str, Any] = {"status": "missing", "score": None, "correct": None, "parts": {}, "judge": {}}
    fresh = {place: row | nothing for place, row in zip(places, rows, strict=True)}
    scoring.judge_rows(scoring.suite, fresh, session)
    for capability, items in scoring.items.items():
        for name, other in scoring.lineup.first_of(capability).items():
            fresh.update({(name, item.id): fresh[other, item.id] | {"model": name} for item in items})
    return [fresh[place] for place in places]


def second_judge(first: Mapping[str, Any], second: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain JSON of a second judge: `judge`, `verdict`, `models` (name -> capability -> overall figure), `agreement`.

    `first` and `second` are the scores by each judge; the files of answers are in `folder`.
    """
    try:
        agreement = agreement_of_files(folder / "judge.jsonl", folder / FILE)
    except UserError:  # one of them answered nothing
        agreement = {}
    models = {
        model["name"]: {c: model[c]["overall"] for c in facts.capabilities(second) if model.get(c)}
        for model in second["models"]
    }
    verdict = {key: second["verdict"][key] for key in ("kind", "sentence")}
    return {"judge": second["judge"], "judging": second["judging"], "verdict": verdict, "models": models} | {
        "agreement": agreement,
        "same": verdict["kind"] == first["verdict"]["kind"],
    }
