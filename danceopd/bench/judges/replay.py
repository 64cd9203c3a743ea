"""A judge that replays recorded answers, from a file or a folder of files.

Read are a bench's own judge.jsonl; any JSON lines with "key" and "text", "numbers" or "choice"; VIEScore's CSV files
(GEdit-Bench); GenEval's results.jsonl; ImgEdit's result.json. A bench's own answers are matched by content, so that an
answer about another image or another prompt is never used; others are matched by key, or by the image's path in the
official layout. VIEScore's files hold only the lower of two numbers, which is given alone, and do not mark the random
scores that it writes for answers it could not parse.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from danceopd.bench.judges.answers import LoggedAnswer, read_log, reparse
from danceopd.bench.judges.protocol import Answer, Question, Quote, content_hash
from danceopd.common.files import sha256
from danceopd.errors import UserError

VIESCORE = {"SC": "sementics_score", "PQ": "quality_score"}  # spelt so in the files


class ReplayJudge:
    """The answers recorded in ``path``."""

    sees = ("key", "facts")
    deterministic = False  # a file may hold several repeats

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.by_hash: dict[str, Answer] = {}
        self.by_key: dict[tuple[str, int], LoggedAnswer] = {}
        self.by_path: dict[str, list[tuple[PurePosixPath, dict[str, Any]]]] = defaultdict(list)  # file name -> rows
        self.recorders: list[tuple[dict[str, Any], tuple[str, ...]]] = []  # identity and `sees` of the judges recorded
        self.names: set[str] = set()
        files = self._files()
        for file in files:
            self._read(file)
        if not (self.by_key or self.by_path):
            raise UserError(
                f"{self.path} holds no recorded answers; give a judge.jsonl, VIEScore's CSV or GenEval's results.jsonl"
            )
        self.identity: dict[str, Any] = {"kind": "replay", "files": {file.name: sha256(file) for file in files}}
        if self.recorders:
            self.identity["recorded"] = [identity for identity, _ in self.recorders]

    @property
    def name(self) -> str:
        return " + ".join(sorted(self.names)) if len(self.names) in (1, 2) else self.path.name

    def check(self) -> None:
        """Nothing to check: the files were read when the judge was made."""

    def quote(self, question: Question) -> Quote:
        return Quote()

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        for question in questions:
            answer = self._found(question)
            yield replace(answer, key=question.key, repeat=question.repeat, attempts=0, cost=0.0, seconds=0.0)

    def _found(self, question: Question) -> Answer:
        for identity, sees in self.recorders:
            if (answer := self.by_hash.get(content_hash(identity, sees, question))) is not None:
                return reparse(answer, question)
        line = self.by_key.get((question.key, question.repeat))
        if line is not None:
            if line.hash is not None and line.identity is not None:
                return _missing(question, "the recorded answer is about another image or another prompt")
            return _checked(reparse(line.answer, question), question)
        rows = self._rows(question)
        if len(rows) > 1:
            places = ", ".join(str(path) for path, _ in rows[:3])
            return _missing(question, f"{len(rows)} recorded rows match: {places}")
        if rows:
            return _official(rows[0][1], question)
        return _missing(question, "not recorded")

    def _rows(self, question: Question) -> list[tuple[PurePosixPath, dict[str, Any]]]:
        """The rows of official files about this image: those with its path, of this model if several have it."""
        if question.repeat:
            return []
        for name in question.facts.get("places") or [question.facts.get("place") or ""]:
            place = PurePosixPath(str(name))
            length, known = len(place.parts), self.by_path.get(place.name, ())
            rows = [(path, row) for path, row in known if path.parts[-length:] == place.parts]
            if len(rows) > 1:
                model = question.key.split("/")[0]
                rows = [(path, row) for path, row in rows if model in path.parts[:-length]] or rows
            if rows:
                return rows
        return []

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise UserError(f"{self.path} does not exist; give a file of recorded answers, or a folder of them")
        if (self.path / "judge.jsonl").is_file():  # a bench's folder; its other files are no answers
            return [self.path / "judge.jsonl"]
        found = sorted(file for kind in ("*.csv", "*.jsonl", "result.json") for file in self.path.glob(kind))
        if not found:
            raise UserError(f"folder {self.path} has no .csv, .jsonl or result.json; give a folder of recorded answers")
        return found

    def _read(self, file: Path) -> None:
        try:
            if file.suffix == ".csv":
                self._read_viescore(file)
            elif file.suffix == ".json":
                self._read_imgedit(file)
            else:
                self._read_lines(file)
        except (ValueError, RecursionError, csv.Error, OSError) as error:
            why = " ".join(str(error).split())[:120]
            raise UserError(f"recorded answers {file} cannot be read ({why}); give the scorer's own file") from None

    def _read_viescore(self, file: Path) -> None:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            if missing := {"edited_image", *VIESCORE.values()} - set(reader.fieldnames or ()):
                column = sorted(missing)[0]
                raise UserError(f"{file} is not VIEScore's, it has no column {column}; give the scorer's own CSV")
            for row in reader:
                self._add(row["edited_image"], row)

    def _read_imgedit(self, file: Path) -> None:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, dict):
            raise UserError(f"{file} is not ImgEdit's result.json (answers by key); give the scorer's own file")
        for key, text in rows.items():
            error = text.get("error") if isinstance(text, dict) else None  # what the script keeps of a failed request
            self._add(f"{key}.png", {"text": text} if isinstance(text, str) else {"error": str(error or "no text")})

    def _read_lines(self, file: Path) -> None:
        if any("filename" in row and "correct" in row for row in _first_rows(file)):
            for row in _first_rows(file, None):
                if "filename" in row and isinstance(row.get("correct"), bool):
                    self._add(row["filename"], row)
            return
        for line in read_log(file):
            if line.identity is not None and (line.identity, line.sees) not in self.recorders:
                self.recorders.append((line.identity, line.sees))
            if line.answer.status in ("failed", "missing") and (line.answer.key, line.answer.repeat) in self.by_key:
                continue
            if line.hash:
                self.by_hash[line.hash] = line.answer
            self.by_key[line.answer.key, line.answer.repeat] = line
            if line.answer.judge:
                self.names.add(line.answer.judge)

    def _add(self, path: str, row: dict[str, Any]) -> None:
        place = PurePosixPath(str(path).replace("\\", "/"))
        held = self.by_path[place.name]
        if (place, row) not in held:  # the combined CSV repeats every category's rows
            held.append((place, row))


def _missing(question: Question, why: str) -> Answer:
    return Answer(question.key, "missing", text=why)


def _official(row: dict[str, Any], question: Question) -> Answer:
    """An official scorer's row as the answer to this question."""
    reads = question.reads
    if "error" in row:
        return Answer(question.key, "failed", text=row["error"])
    if "text" in row:
        return reparse(Answer(question.key, "unparsable", text=row["text"]), question)
    if "correct" in row:
        reason = str(row.get("reason") or "")
        if reads.choices:
            return Answer(question.key, "ok", choice=reads.choices[0 if row["correct"] else 1], reasoning=reason)
        number = float(reads.high if row["correct"] else reads.low)
        return Answer(question.key, "ok", numbers=(number,), reasoning=reason)
    column = VIESCORE.get(question.aspect)
    if column is None:
        return Answer(question.key, "missing", text=f"VIEScore's files have no {question.aspect}")
    try:
        number = float(row[column] or "")
    except ValueError:
        return Answer(question.key, "unparsable", reasoning=str(row[column]))
    if not reads.low <= number <= reads.high:
        return Answer(question.key, "unparsable", reasoning=str(row[column]))
    return Answer(question.key, "ok", numbers=(number,))


def _checked(answer: Answer, question: Question) -> Answer:
    """A recorded answer; one without text becomes unparsable if it is not what the question asks for."""
    reads = question.reads
    if answer.status != "ok" or answer.text:
        return answer
    if reads.choices:
        right = answer.choice in reads.choices
    else:
        numbers = answer.numbers or ()
        right = len(numbers) == reads.count and all(reads.low <= n <= reads.high for n in numbers)
    text = f"{answer.numbers} {answer.choice}"
    return answer if right else replace(answer, status="unparsable", numbers=None, choice=None, text=text)


def _first_rows(file: Path, count: int | None = 5) -> Iterable[dict[str, Any]]:
    with open(file, encoding="utf-8") as opened:
        for number, text in enumerate(opened):
            if count is not None and number >= count:
                return
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
