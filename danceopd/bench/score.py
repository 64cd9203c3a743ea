"""Pictures into rows: an exact suite scores them, a judge is asked about the others, what is not there is counted.

A row holds one item of one model. Its `status` is ok, missing (no picture, or not asked), unparsable, refused or
failed (what the judge's answer was); it has a `score` only when that is ok. Rows of an exact suite are appended to
`samples.jsonl` as they come and found again by the hash of the pixels; a judge's answers lie in `judge.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from danceopd.bench.draw import Drawn, Progress, seed_of
from danceopd.bench.models import Lineup, Model
from danceopd.bench.pictures import Pictures, pixels_sha256
from danceopd.bench.suites import Item, judged, picture
from danceopd.disk import disk_faults, replace_file

if TYPE_CHECKING:
    from danceopd.bench.judges import Answer, Question, Session

CHUNK = 64
"""Pictures that an exact suite scores at once."""
Rows = dict[tuple[str, str], dict]
"""(model, item key) -> its row."""


class Scoring:
    """The pictures of a bench and what is known of them; `drawn` says the hash of those that were drawn here.

    `networks` (`features.networks`) see each edit, for metrics that need no judge.
    """

    def __init__(
        self,
        suite: Any,
        lineup: Lineup,
        items: Mapping[str, Sequence[Item]],
        pictures: Pictures,
        seed: int,
        drawn: Drawn,
        progress: Progress,
        networks: Sequence[Any] = (),
    ) -> None:
        self.suite, self.lineup, self.items, self.pictures = suite, lineup, items, pictures
        self.seed, self.drawn, self.progress, self.networks = seed, drawn, progress, networks
        self.seers = [network.identity for network in networks]
        self.file = pictures.folder / "samples.jsonl"
        self.total = len(lineup.models) * sum(map(len, items.values()))

    def run(self, session: Session | None) -> list[dict]:
        """All rows, in the order of models and items, also in `samples.jsonl`; a judged suite asks `session`.

        Without a session nothing is asked: the rows of a judged suite are those of questions that nobody answered.
        """
        known = known_rows(self.file)
        rows: Rows = {}
        for capability, items in self.items.items():
            by = self.lineup.drawn_by(capability)
            for model in self.lineup.models:
                if by[model.name] == model.name:
                    rows.update(self._seen(model, items, known))
        if judged(self.suite):
            self._judge(rows, session)
        else:
            self._exact(rows, known)
        for capability, items in self.items.items():
            for name, first in self.lineup.drawn_by(capability).items():
                rows.update({(name, item.key): rows[first, item.key] | {"model": name} for item in items})
        found = [rows[m.name, i.key] for m in self.lineup.models for part in self.items.values() for i in part]
        with disk_faults(self.file):
            replace_file(self.file, "".join(map(_line, found)).encode())
        self.progress(self.total, self.total, "scoring")
        return found

    def questions(self) -> Iterator[Question]:
        """Every question about every picture that will be there; the source stands for a picture that is not yet."""
        for capability, items in self.items.items():
            by = self.lineup.drawn_by(capability)
            for model in (m for m in self.lineup.models if by[m.name] == m.name):
                for item in items:
                    path = self.pictures.found(model.name, item)
                    image = self.pictures.read(path) if path else _stand_in(item)
                    yield from self._questions(model.name, item, image)

    def _seen(self, model: Model, items: Sequence[Item], known: Rows) -> Rows:
        """Rows without scores; a picture's metrics are taken over where its pixels are what they were."""
        rows: Rows = {}
        for item in items:
            path = self.pictures.found(model.name, item)
            row = self._row(model, item, path)
            if path is not None:
                said = self.drawn.get((model.name, item.key))
                row["pixels_sha256"] = said or pixels_sha256(self.pictures.read(path))
                old = known.get((model.name, item.key), {})
                seen = old.get("pixels_sha256") == row["pixels_sha256"] and old.get("networks", []) == self.seers
                if seen and old.get("metrics"):
                    row["metrics"] = old["metrics"]
                elif item.capability == "editing":
                    row["metrics"] = self._measured(model, item, path)
            rows[model.name, item.key] = row
        return rows

    def _measured(self, model: Model, item: Item, path: str) -> dict[str, float]:
        """What needs no judge; where nothing else tells the region of an edit, the editing teacher's picture does."""
        from danceopd.bench.metrics import measure

        teacher = next(iter(self.lineup.teachers_first_of("editing")), None)
        told = item.mask is not None or item.target is not None or teacher in (None, model.name)
        place = None if told or teacher is None else self.pictures.found(teacher, item)
        reference = None if place is None else self.pictures.read(place)
        return measure(item, self.pictures.read(path), reference=reference, networks=self.networks)

    def _row(self, model: Model, item: Item, path: str | None) -> dict:
        places = self.pictures.beside(item)
        always = ("source", "target") if item.capability == "editing" else ()
        beside = {what: place for what, place in places.items() if place is not None or what in always}
        return {
            "model": model.name,
            "capability": item.capability,
            "category": item.category,
            "key": item.key,
            "group": item.group,
            "prompt": item.prompt,
            "seed": None if model.pictures is not None else seed_of(self.seed, item),
            "probe": item.probe,
            "tags": list(item.tags),
            "heldout": item.heldout,
            "image": path,
            "pixels_sha256": None,
            **beside,
            **_unscored("missing", "there is no picture" if path is None else ""),
            "metrics": {},
            "networks": self.seers,
            "judge": {},
        }

    def _with_pictures(self, rows: Rows) -> Iterator[tuple[str, Item]]:
        """(model, item) of the rows that have a picture."""
        for capability, items in self.items.items():
            by = self.lineup.drawn_by(capability)
            for model in (m.name for m in self.lineup.models if by[m.name] == m.name):
                yield from ((model, item) for item in items if rows[model, item.key]["image"] is not None)

    def _exact(self, rows: Rows, known: Rows) -> None:
        """Score what has no score yet, a chunk at a time."""
        todo: list[tuple[str, Item]] = []
        for model, item in self._with_pictures(rows):
            old, row = known.get((model, item.key), {}), rows[model, item.key]
            if old.get("status") == "ok" and old.get("pixels_sha256") == row["pixels_sha256"]:
                row.update({key: old[key] for key in ("status", "score", "correct", "reason", "parts")})
            else:
                todo.append((model, item))
        done = self.total - len(todo)
        with disk_faults(self.file), self.file.open("a", encoding="utf-8") as out:
            for at in range(0, len(todo), CHUNK):
                part = todo[at : at + CHUNK]
                self.progress(done + at, self.total, "scoring")
                images = [self.pictures.read(rows[model, item.key]["image"]) for model, item in part]
                for (model, item), score in zip(part, self.suite.score([i for _, i in part], images), strict=True):
                    rows[model, item.key].update(score_row(score))
                    out.write(_line(rows[model, item.key]))
                out.flush()

    def _questions(self, model: str, item: Item, image: Image.Image) -> Iterator[Question]:
        for question in self.suite.questions(item, image):
            yield replace(question, key=f"{model}/{item.key}/{question.aspect}")

    def _judge(self, rows: Rows, session: Session | None) -> None:
        """Ask about every picture, and turn the answers into scores."""
        asked: dict[tuple[str, str], dict[str, str]] = {}

        def questions() -> Iterator[Question]:
            for model, item in self._with_pictures(rows):
                image = self.pictures.read(rows[model, item.key]["image"])
                for question in self._questions(model, item, image):
                    asked.setdefault((model, item.key), {})[question.aspect] = question.key
                    yield question

        answers: Mapping[str, list[Answer]] = {}
        if session is not None:
            done = 0

            def told(answer: Answer) -> None:
                nonlocal done
                done += 1
                self.progress(done, max(done, wanted), "judging")

            wanted = len(list(self._with_pictures(rows))) * self._aspects(rows) * session.repeats
            answers = session.answers(questions(), told)
        for model, item in self._with_pictures(rows):
            row, keys = rows[model, item.key], asked.get((model, item.key), {})
            row["reason"] = "no judge was asked" if session is None else "the judge was not asked"
            if keys and all(answers.get(key) for key in keys.values()):
                held = {aspect: answers[key] for aspect, key in keys.items()}
                row.update(_judged_row(self.suite, item, held))

    def _aspects(self, rows: Rows) -> int:
        """Questions about the first picture: what the progress reckons with."""
        model, item = next(self._with_pictures(rows), (None, None))
        if model is None or item is None:
            return 0
        return len(self.suite.questions(item, self.pictures.read(rows[model, item.key]["image"])))


def _judged_row(suite: Any, item: Item, answers: Mapping[str, Sequence[Answer]]) -> dict:
    """The part of a row that a judge says: the mean over the repeats that could be read, else what went wrong."""
    repeats = max(map(len, answers.values()))
    scores = []
    for n in range(repeats):
        one = {aspect: held[n] for aspect, held in answers.items() if n < len(held)}
        scores.append((suite.verdict(item, one), one))
    good = [score for score, _ in scores if score.value is not None]
    judge = {aspect: _aspect(held) for aspect, held in answers.items()}
    if not good:
        score, one = scores[0]
        said = getattr(score, "status", "ok")
        status = said if said != "ok" else next((a.status for a in one.values() if a.status != "ok"), "failed")
        return _unscored(status, score.reason) | {"judge": judge}
    rows = [score_row(score) for score in good]
    parts = {
        name: _mean([row["parts"][name] for row in rows]) if _is_number(value) else value
        for name, value in rows[0]["parts"].items()
        if all(name in row["parts"] for row in rows)
    }
    value = round(sum(row["score"] for row in rows) / len(rows), 6)
    if len(rows) > 1:
        parts["repeats"] = len(rows)
    return rows[0] | {"score": value, "parts": parts, "judge": judge}


def _aspect(held: Sequence[Answer]) -> dict:
    """One aspect's answers: the first that could be read stands for all, and each repeat is kept."""
    first = next((answer for answer in held if answer.status == "ok"), held[0])
    found = {"numbers": None if first.numbers is None else list(first.numbers), "choice": first.choice}
    found |= {"status": first.status, "reasoning": first.reasoning}
    if first.status != "ok":
        found["text"] = first.text
    return found | {"repeats": [_repeat(answer) for answer in held] if len(held) > 1 else []}


def _repeat(answer: Answer) -> dict:
    numbers = None if answer.numbers is None else list(answer.numbers)
    found: dict[str, Any] = {"status": answer.status, "numbers": numbers, "choice": answer.choice}
    return found if answer.status == "ok" else found | {"text": answer.text}


def _unscored(status: str, reason: str) -> dict:
    return {"status": status, "score": None, "correct": None, "reason": reason, "parts": {}}


def score_row(score: Any) -> dict:
    """The part of a row that the suite says: score, correct, reason, and the other plain fields of its score."""
    parts = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in vars(score).items()
        if isinstance(value, int | float | str) and key not in ("value", "correct", "reason", "status")
    }
    if score.value is None or not math.isfinite(score.value):
        status = getattr(score, "status", "failed")
        return _unscored(status if status != "ok" else "failed", score.reason) | {"parts": parts}
    return {
        "status": "ok",
        "score": round(float(score.value), 6),
        "correct": bool(score.correct),
        "reason": score.reason,
        "parts": parts,
    }


def known_rows(file: Path) -> Rows:
    """Rows that were written before; a line that was cut off is passed over."""
    found: Rows = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(text)
            found[row["model"], row["key"]] = row
    return found


def _stand_in(item: Item) -> Image.Image:
    return picture(item.source) if item.source is not None else Image.new("RGB", (512, 512))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
