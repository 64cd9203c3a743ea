"""Scoring: images go in, one row for each item and model comes out, with a score or a status that says why not.

An exact suite scores its images itself; for a judged suite a judge is asked. A row's `status` is ok, missing (no image,
or not asked), unparsable, refused or failed (the judge's answer); it has a `score` only when that is ok. Rows of an
exact suite are appended to `samples.jsonl` one by one, and reused in a later run if the image's pixels are unchanged; a
judge's answers are in `judge.jsonl`.
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

from danceopd.bench.generate import Generated, Progress, seed_of
from danceopd.bench.images import ImageStore, pixels_sha256
from danceopd.bench.lineup import Lineup, Model
from danceopd.bench.suites.protocol import ExactSuite, Item, JudgedSuite, Score, Suite
from danceopd.common.files import disk_errors, write_atomic
from danceopd.data.images import picture

if TYPE_CHECKING:
    from danceopd.bench.judges.protocol import Answer, Question
    from danceopd.bench.judges.session import JudgeSession
    from danceopd.bench.metrics.features import Network

CHUNK = 64
"""Images that an exact suite scores at once."""
Rows = dict[tuple[str, str], dict]
"""(model, item key) -> its row."""


class Scoring:
    """Scores the images of a bench.

    `generated`: the pixel hashes of the images that were made here. `networks` (`features.load_networks`) add
    judge-free metrics to each edit.
    """

    def __init__(
        self,
        suite: Suite,
        lineup: Lineup,
        items: Mapping[str, Sequence[Item]],
        store: ImageStore,
        seed: int,
        generated: Generated,
        progress: Progress,
        networks: Sequence[Network] = (),
    ) -> None:
        self.suite, self.lineup, self.items, self.store = suite, lineup, items, store
        self.seed, self.generated, self.progress, self.networks = seed, generated, progress, networks
        self.network_ids = [network.identity for network in networks]
        self.file = store.folder / "samples.jsonl"
        self.total = len(lineup.models) * sum(map(len, items.values()))

    def run(self, session: JudgeSession | None) -> list[dict]:
        """Score everything; returns all rows in the order of models and items, and writes them to `samples.jsonl`.

        A judged suite asks `session`. Without one, all its rows have the status missing.
        """
        known = known_rows(self.file)
        rows: Rows = {}
        for capability, items in self.items.items():
            first = self.lineup.first_of(capability)
            for model in self.lineup.models:
                if first[model.name] == model.name:
                    rows.update(self._unscored_rows(model, items, known))
        if isinstance(self.suite, JudgedSuite):
            self._judge(self.suite, rows, session)
        elif isinstance(self.suite, ExactSuite):
            self._score(self.suite, rows, known)
        for capability, items in self.items.items():
            for name, other in self.lineup.first_of(capability).items():
                rows.update({(name, item.key): rows[other, item.key] | {"model": name} for item in items})
        found = [rows[m.name, i.key] for m in self.lineup.models for part in self.items.values() for i in part]
        with disk_errors(self.file):
            write_atomic(self.file, "".join(map(_line, found)).encode())
        self.progress(self.total, self.total, "scoring")
        return found

    def questions(self) -> Iterator[Question]:
        """Every question of a judged suite; the source stands in for an image that is not generated yet."""
        if not isinstance(self.suite, JudgedSuite):
            return
        for capability, items in self.items.items():
            first = self.lineup.first_of(capability)
            for model in (m for m in self.lineup.models if first[m.name] == m.name):
                for item in items:
                    path = self.store.existing(model.name, item)
                    image = self.store.read(path) if path else _stand_in(item)
                    yield from _questions(self.suite, model.name, item, image)

    def _unscored_rows(self, model: Model, items: Sequence[Item], known: Rows) -> Rows:
        """A model's rows before scoring; metrics of unchanged images are taken from the known rows."""
        rows: Rows = {}
        for item in items:
            path = self.store.existing(model.name, item)
            row = self._row(model, item, path)
            if path is not None:
                pixels = self.generated.get((model.name, item.key))
                row["pixels_sha256"] = pixels or pixels_sha256(self.store.read(path))
                old = known.get((model.name, item.key), {})
                same = old.get("pixels_sha256") == row["pixels_sha256"] and old.get("networks", []) == self.network_ids
                if same and old.get("metrics"):
                    row["metrics"] = old["metrics"]
                elif item.capability == "editing":
                    row["metrics"] = self._measured(model, item, path)
            rows[model.name, item.key] = row
        return rows

    def _measured(self, model: Model, item: Item, path: str) -> dict[str, float]:
        """Judge-free metrics; without mask and target, the editing teacher's image defines the edited region."""
        from danceopd.bench.metrics.metrics import measure

        teacher = next(iter(self.lineup.teachers_for("editing")), None)
        known = item.mask is not None or item.target is not None or teacher in (None, model.name)
        other = None if known or teacher is None else self.store.existing(teacher, item)
        reference = None if other is None else self.store.read(other)
        return measure(item, self.store.read(path), reference=reference, networks=self.networks)

    def _row(self, model: Model, item: Item, path: str | None) -> dict:
        paths = self.store.inputs(item)
        always = ("source", "target") if item.capability == "editing" else ()
        inputs = {what: place for what, place in paths.items() if place is not None or what in always}
        return {
            "model": model.name,
            "capability": item.capability,
            "category": item.category,
            "key": item.key,
            "group": item.group,
            "prompt": item.prompt,
            "seed": None if model.image_folder is not None else seed_of(self.seed, item),
            "probe": item.probe,
            "tags": list(item.tags),
            "heldout": item.heldout,
            "image": path,
            "pixels_sha256": None,
            **inputs,
            **_unscored("missing", "there is no image" if path is None else ""),
            "metrics": {},
            "networks": self.network_ids,
            "judge": {},
        }

    def _with_images(self, rows: Rows) -> Iterator[tuple[str, Item]]:
        """(model, item) of the rows that have an image."""
        for capability, items in self.items.items():
            first = self.lineup.first_of(capability)
            for model in (m.name for m in self.lineup.models if first[m.name] == m.name):
                yield from ((model, item) for item in items if rows[model, item.key]["image"] is not None)

    def _score(self, suite: ExactSuite, rows: Rows, known: Rows) -> None:
        """Let an exact suite score the images that have no score yet, a chunk at a time."""
        todo: list[tuple[str, Item]] = []
        for model, item in self._with_images(rows):
            old, row = known.get((model, item.key), {}), rows[model, item.key]
            if old.get("status") == "ok" and old.get("pixels_sha256") == row["pixels_sha256"]:
                row.update({key: old[key] for key in ("status", "score", "correct", "reason", "parts")})
            else:
                todo.append((model, item))
        done = self.total - len(todo)
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
            for at in range(0, len(todo), CHUNK):
                part = todo[at : at + CHUNK]
                self.progress(done + at, self.total, "scoring")
                images = [self.store.read(rows[model, item.key]["image"]) for model, item in part]
                for (model, item), score in zip(part, suite.score([i for _, i in part], images), strict=True):
                    rows[model, item.key].update(score_row(score))
                    out.write(_line(rows[model, item.key]))
                out.flush()

    def _judge(self, suite: JudgedSuite, rows: Rows, session: JudgeSession | None) -> None:
        """Ask a judge about every image, and turn its answers into scores."""
        keys: dict[tuple[str, str], dict[str, str]] = {}  # (model, item key) -> aspect -> question key

        def questions() -> Iterator[Question]:
            for model, item in self._with_images(rows):
                image = self.store.read(rows[model, item.key]["image"])
                for question in _questions(suite, model, item, image):
                    keys.setdefault((model, item.key), {})[question.aspect] = question.key
                    yield question

        answers: Mapping[str, list[Answer]] = {}
        if session is not None:
            done = 0

            def on_answer(answer: Answer) -> None:
                nonlocal done
                done += 1
                self.progress(done, max(done, expected), "judging")

            expected = len(list(self._with_images(rows))) * self._questions_per_item(suite, rows) * session.repeats
            answers = session.answers(questions(), on_answer)
        for model, item in self._with_images(rows):
            row, by_aspect = rows[model, item.key], keys.get((model, item.key), {})
            row["reason"] = "no judge was asked" if session is None else "the judge was not asked"
            if by_aspect and all(answers.get(key) for key in by_aspect.values()):
                row.update(_judged_row(suite, item, {aspect: answers[key] for aspect, key in by_aspect.items()}))

    def _questions_per_item(self, suite: JudgedSuite, rows: Rows) -> int:
        """The number of questions about the first image, from which the progress total is computed."""
        model, item = next(self._with_images(rows), (None, None))
        if model is None or item is None:
            return 0
        return len(suite.questions(item, self.store.read(rows[model, item.key]["image"])))


def _questions(suite: JudgedSuite, model: str, item: Item, image: Image.Image) -> Iterator[Question]:
    """The suite's questions about one image, with keys that are unique for the model."""
    for question in suite.questions(item, image):
        yield replace(question, key=f"{model}/{item.key}/{question.aspect}")


def _judged_row(suite: JudgedSuite, item: Item, answers: Mapping[str, Sequence[Answer]]) -> dict:
    """A row's score from the answers by aspect: the mean over the repeats with a score, else the status."""
    repeats = max(map(len, answers.values()))
    scores = []
    for n in range(repeats):
        one = {aspect: given[n] for aspect, given in answers.items() if n < len(given)}
        scores.append((suite.verdict(item, one), one))
    good = [score for score, _ in scores if score.value is not None]
    judge = {aspect: _aspect(given) for aspect, given in answers.items()}
    if not good:
        score, one = scores[0]
        status = score.status
        if status == "ok":
            status = next((a.status for a in one.values() if a.status != "ok"), "failed")
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


def _aspect(given: Sequence[Answer]) -> dict:
    """The answers to one aspect: the first usable one (else the first), and every repeat."""
    first = next((answer for answer in given if answer.status == "ok"), given[0])
    found = {"numbers": None if first.numbers is None else list(first.numbers), "choice": first.choice}
    found |= {"status": first.status, "reasoning": first.reasoning}
    if first.status != "ok":
        found["text"] = first.text
    return found | {"repeats": [_repeat(answer) for answer in given] if len(given) > 1 else []}


def _repeat(answer: Answer) -> dict:
    numbers = None if answer.numbers is None else list(answer.numbers)
    found: dict[str, Any] = {"status": answer.status, "numbers": numbers, "choice": answer.choice}
    return found if answer.status == "ok" else found | {"text": answer.text}


def _unscored(status: str, reason: str) -> dict:
    return {"status": status, "score": None, "correct": None, "reason": reason, "parts": {}}


def score_row(score: Score) -> dict:
    """The suite's part of a row: status, score, correct, reason, and `parts`, the further plain fields of the score."""
    parts = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in vars(score).items()
        if isinstance(value, int | float | str) and key not in ("value", "correct", "reason", "status")
    }
    if score.value is None or not math.isfinite(score.value):
        return _unscored(score.status if score.status != "ok" else "failed", score.reason) | {"parts": parts}
    return {
        "status": "ok",
        "score": round(float(score.value), 6),
        "correct": bool(score.correct),
        "reason": score.reason,
        "parts": parts,
    }


def known_rows(file: Path) -> Rows:
    """The rows of an earlier run; a line that was cut off is skipped."""
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
