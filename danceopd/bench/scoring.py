"""Scoring: images go in, one row for each item and model comes out, with a score or a status that says why not.

An exact suite scores its images itself; for a judged suite a judge is asked. A row's `status` is ok, missing (no image,
or not asked), unparsable, refused or failed (the judge's answer, or a damaged image); only ok has a `score`. Rows of an
exact suite are appended to `samples.jsonl` one by one, and reused in a later run if the image's pixels are unchanged; a
judge's answers are in `judge.jsonl`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from danceopd.bench.generate import Missing, Progress, seed_of
from danceopd.bench.images import ImageStore, pixels_sha256
from danceopd.bench.lineup import Lineup, Model
from danceopd.bench.metrics.own import OwnMetric
from danceopd.bench.results import NO_JUDGE
from danceopd.bench.suites.protocol import ExactSuite, Item, JudgedSuite, Score, Suite
from danceopd.common.files import disk_errors, json_line, read_lines, write_atomic
from danceopd.data.images import ImageSource, picture
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.judges.protocol import Answer, Question
    from danceopd.bench.judges.session import JudgeSession
    from danceopd.bench.metrics.features import Network

CHUNK = 64
"""Images that an exact suite scores at once."""
Rows = dict[tuple[str, str], dict]
"""(model, item id) -> its row."""
METRICS = "2"
"""The version of the judge-free metrics; a later one measures images again."""
_log = logging.getLogger("danceopd")


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
        progress: Progress,
        networks: Sequence[Network] = (),
    ) -> None:
        self.suite, self.lineup, self.items, self.store = suite, lineup, items, store
        self.seed, self.progress, self.networks = seed, progress, networks
        self.own = [network for network in networks if isinstance(network, OwnMetric)]
        self.network_ids = [network.identity for network in networks]
        self.file = store.folder / "samples.jsonl"
        self.total = len(lineup.models) * sum(map(len, items.values()))

    def run(self, session: JudgeSession | None) -> list[dict]:
        """Score everything; returns all rows in the order of models and items, and writes them to `samples.jsonl`.

        A judged suite asks `session`. Without one, all its rows have the status missing.
        """
        from danceopd.bench.metrics.masks import about_masks

        for line in about_masks(i.mask for items in self.items.values() for i in items if isinstance(i.mask, Path)):
            _log.warning("%s", line)
        known = known_rows(self.file, self.items)
        rows: Rows = {}
        for capability, items in self.items.items():
            first = self.lineup.first_of(capability)
            for model in self.lineup.models:
                if first[model.name] == model.name:
                    rows.update(self._unscored_rows(model, items, known))
        if isinstance(self.suite, JudgedSuite):
            self.judge_rows(self.suite, rows, session)
        elif isinstance(self.suite, ExactSuite):
            self._score(self.suite, rows, known)
        for capability, items in self.items.items():
            for name, other in self.lineup.first_of(capability).items():
                rows.update({(name, item.id): rows[other, item.id] | {"model": name} for item in items})
        found = [rows[m.name, i.id] for m in self.lineup.models for part in self.items.values() for i in part]
        with disk_errors(self.file):
            write_atomic(self.file, "".join(map(json_line, found)).encode())
        self.progress(self.total, self.total, "scoring")
        return found

    def questions(self) -> Iterator[Question]:
        """Every question of a judged suite about images that are here, those of `--images` folders included."""
        for model, item in self._pairs():
            if model.image_folder is not None:
                file = self.store.original(model.image_folder, item)
            else:
                path = self.store.existing(model.name, item)
                file = None if path is None else self.store.folder / path
            image = None if file is None else _image(file)
            if isinstance(self.suite, JudgedSuite) and isinstance(image, Image.Image):
                yield from _questions(self.suite, model.name, item, image)

    def questions_to_come(self, missing: Missing, call: Mapping[str, Any]) -> Iterator[Question]:
        """Every question about the images that are still to be generated, about blank ones of no smaller size."""
        wanted = {
            (name, self.items[capability][n].id)
            for name, found in missing.items()
            for capability, rows in found.items()
            for n in rows
            if n < len(self.items[capability])  # further ones are drawn and not scored
        }
        for model, item in self._pairs():
            if (model.name, item.id) in wanted and isinstance(self.suite, JudgedSuite):
                image = Image.new("RGB", _largest_size(item, call))
                yield from _questions(self.suite, model.name, item, image)

    def _pairs(self) -> Iterator[tuple[Model, Item]]:
        """Every item of every model that has images of its own."""
        for capability, items in self.items.items():
            first = self.lineup.first_of(capability)
            for model in (m for m in self.lineup.models if first[m.name] == m.name):
                yield from ((model, item) for item in items)

    def _unscored_rows(self, model: Model, items: Sequence[Item], known: Rows) -> Rows:
        """A model's rows before scoring; metrics of unchanged images are taken from the known rows."""
        rows: Rows = {}
        for item in items:
            path = self.store.existing(model.name, item)
            row = rows[model.name, item.id] = self._row(model, item, path)
            if path is None:
                continue
            try:
                row["pixels_sha256"] = pixels_sha256(self.store.read(path))
                if item.capability == "editing" or self.own:
                    row |= self._measured(model, item, path, row["pixels_sha256"], known.get((model.name, item.id), {}))
            except UserError as error:
                made = model.image_folder and self.store.original(model.image_folder, item)
                file = str(self.store.folder / path)
                _mark_damaged(row, str(error).replace(file, str(made or file)))
        return rows

    def _measured(self, model: Model, item: Item, path: str, pixels: str, old: dict) -> dict[str, Any]:
        """Judge-free metrics, and the hash of what they were measured on: the `old` row's where that is the same.

        Without mask and target, the editing teacher's image defines the edited region. Of generated images those of the
        user's alone are measured.
        """
        from danceopd.bench.metrics.metrics import measure

        edit, teacher = item.capability == "editing", next(iter(self.lineup.teachers_for("editing")), None)
        known = not edit or item.mask is not None or item.target is not None or teacher in (None, model.name)
        other = None if known or teacher is None else self.store.existing(teacher, item)
        images = (item.source, item.target, item.mask, other and self.store.folder / other)
        measured = _hash_of(METRICS, pixels, *images)
        if old.get("measured") == measured and old.get("networks", []) == self.network_ids and old.get("metrics"):
            return {"measured": measured, "metrics": old["metrics"]}
        try:
            reference = None if other is None else self.store.read(other)
        except UserError:  # the teacher's own row says so
            reference = None
        image = self.store.read(path)
        if edit:
            metrics = measure(item, image, reference=reference, networks=self.networks)
        else:
            metrics = {k: round(v, 6) for one in self.own for k, v in one.measure(item, image, None, None).items()}
        return {"measured": measured, "metrics": metrics}

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
        for model, item in self._pairs():
            if rows[model.name, item.id]["image"] is not None:
                yield model.name, item

    def _score(self, suite: ExactSuite, rows: Rows, known: Rows) -> None:
        """Let an exact suite score the images that have no score yet, a chunk at a time."""
        todo: list[tuple[str, Item]] = []
        for model, item in self._with_images(rows):
            old, row = known.get((model, item.id), {}), rows[model, item.id]
            if old.get("status") == "ok" and old.get("pixels_sha256") == row["pixels_sha256"]:
                row.update({key: old.get(key) for key in ("status", "score", "correct", "reason", "parts")})
            else:
                todo.append((model, item))
        done = self.total - len(todo)
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
            for at in range(0, len(todo), CHUNK):
                part = todo[at : at + CHUNK]
                self.progress(done + at, self.total, "scoring")
                read = [(model, item, _readable(self.store, rows[model, item.id])) for model, item in part]
                part = [(model, item) for model, item, image in read if image is not None]
                images = [image for _, _, image in read if image is not None]
                for (model, item), score in zip(part, suite.score([i for _, i in part], images), strict=True):
                    rows[model, item.id].update(score_row(score))
                    out.write(json_line(rows[model, item.id]))
                out.flush()

    def judge_rows(self, suite: JudgedSuite, rows: Rows, session: JudgeSession | None) -> None:
        """Ask a judge about every image, and turn its answers into scores."""
        keys: dict[tuple[str, str], dict[str, str]] = {}  # (model, item id) -> aspect -> question key

        def questions() -> Iterator[Question]:
            for model, item in self._with_images(rows):
                image = _readable(self.store, rows[model, item.id])
                for question in _questions(suite, model, item, image) if image is not None else ():
                    keys.setdefault((model, item.id), {})[question.aspect] = question.key
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
            row, by_aspect = rows[model, item.id], keys.get((model, item.id), {})
            row["reason"] = NO_JUDGE if session is None else "the judge was not asked"
            if by_aspect and all(answers.get(key) for key in by_aspect.values()):
                row.update(_judged_row(suite, item, {aspect: answers[key] for aspect, key in by_aspect.items()}))

    def _questions_per_item(self, suite: JudgedSuite, rows: Rows) -> int:
        """The number of questions about the first image, from which the progress total is computed."""
        model, item = next(self._with_images(rows), (None, None))
        if model is None or item is None:
            return 0
        return len(suite.questions(item, self.store.read(rows[model, item.id]["image"])))


def _questions(suite: JudgedSuite, model: str, item: Item, image: Image.Image) -> Iterator[Question]:
    """The suite's questions about one image, with keys that are unique for the model."""
    for question in suite.questions(item, image):
        yield replace(question, key=f"{model}/{item.id}/{question.aspect}")


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


def known_rows(file: Path, items: Mapping[str, Sequence[Item]]) -> Rows:
    """The rows of an earlier run about these items; a line that was cut off is skipped."""
    ids = {(item.category, item.key): item.id for part in items.values() for item in part}
    found: Rows = {}
    for row in read_lines(file):
        place = row.get("category"), row.get("key")
        if all(isinstance(word, str) for word in (row.get("model"), *place)) and place in ids:
            found[row["model"], ids[place]] = row
    return found


def _readable(store: ImageStore, row: dict) -> Image.Image | None:
    """The image of a row; None, and the row has failed, where it is damaged."""
    image = _image(store.folder / row["image"])
    if isinstance(image, str):
        _mark_damaged(row, image)
        return None
    return image


def _mark_damaged(row: dict, why: str) -> None:
    row.update(_unscored("failed", why), image=None, pixels_sha256=None)
    _log.warning("%s, %s: %s", row["model"], row["key"], why)


def _image(file: Path) -> Image.Image | str:
    """The image in a file, or why it cannot be read."""
    try:
        return picture(file)
    except UserError as error:
        return str(error)


def _hash_of(*facts: str | ImageSource | None) -> str:
    """sha256 over words, images and the bytes of image files."""
    digest = hashlib.sha256()
    for fact in facts:
        if isinstance(fact, Path):
            content = fact.read_bytes()
        elif isinstance(fact, Image.Image):
            content = fact.tobytes()
        else:
            content = fact if isinstance(fact, bytes) else str(fact).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _largest_size(item: Item, call: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) that no image of an item exceeds: the call's, or an edit's source enlarged to that area."""
    width, height = (int(call.get(side) or 1024) for side in ("width", "height"))
    if item.source is None:
        return width, height
    source = picture(item.source)
    scale = max(1.0, math.sqrt(width * height / (source.width * source.height)))
    return math.ceil(source.width * scale), math.ceil(source.height * scale)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
