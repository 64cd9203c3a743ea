"""The file of a judge's answers (judge.jsonl): one JSON line for each answer, written as soon as it comes.

A line holds the hash of its question, the answer and the time; a line before it names the judge that answers from
there on. A line that was cut off by a kill is ignored and left where it is. A question whose answer was refused or
unparsable counts as answered and is not asked again; one that failed is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, get_args

from danceopd.bench.judges.parse import read
from danceopd.bench.judges.protocol import Answer, Judge, Question, Status
from danceopd.common.files import disk_errors, json_line, lock_file
from danceopd.errors import UserError

ANSWERED = ("ok", "unparsable", "refused")
FIELDS = {field.name for field in fields(Answer)}


@dataclass(frozen=True)
class LoggedAnswer:
    """One recorded answer, with the judge that gave it; ``hash`` is None in files that danceopd did not write."""

    hash: str | None
    aspect: str
    answer: Answer
    identity: dict[str, Any] | None
    sees: tuple[str, ...]


def read_log(file: Path) -> Iterator[LoggedAnswer]:
    """The recorded answers of a file in order; lines that are no JSON objects (cut off) are skipped."""
    identity: dict[str, Any] | None = None
    sees: tuple[str, ...] = ()
    with open(file, encoding="utf-8", errors="replace") as opened:
        for number, text in enumerate(opened, 1):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict):
                continue
            if isinstance(row.get("identity"), dict) and isinstance(row.get("sees", []), list):
                identity, sees = row["identity"], tuple(map(str, row.get("sees", ())))
            elif "key" in row:
                try:
                    answer = _answer(row)
                except (TypeError, ValueError, OverflowError):
                    raise UserError(
                        f'{file} line {number} is no answer: it needs "key" and "text", or "numbers" (a list), or '
                        '"choice" (a string); correct or remove that line'
                    ) from None
                yield LoggedAnswer(row.get("hash"), row.get("aspect") or "", answer, identity, sees)


def _answer(row: dict[str, Any]) -> Answer:
    """The answer in a line; TypeError or ValueError where a field is of another kind."""
    known = {name: row[name] for name in FIELDS & row.keys()}
    numbers, choice = known.get("numbers"), known.get("choice")
    if not all(isinstance(known.get(name, ""), str) for name in ("key", "text", "reasoning", "judge")):
        raise TypeError("strings are expected")
    if not all(isinstance(row.get(name) or "", str) for name in ("hash", "aspect")):
        raise TypeError("strings are expected")
    if numbers is not None:
        known["numbers"] = tuple(float(n) for n in numbers)
    for name in ("cost", "seconds", "tokens_in", "tokens_out", "attempts", "repeat"):
        value = known.get(name) or 0
        if not isinstance(value, int if name == "repeat" else int | float) or not 0 <= value < math.inf:
            raise TypeError("numbers are expected")
    if not (choice is None or isinstance(choice, str)):
        raise TypeError("a string is expected")
    known.setdefault("status", "unparsable" if numbers is None and choice is None else "ok")
    if known["status"] not in get_args(Status):
        raise ValueError("a status")
    return Answer(**known)


def reparse(answer: Answer, question: Question) -> Answer:
    """The answer under this question's key, its recorded text parsed again as the question asks.

    So a better parser reads old answers without asking again. An answer without text keeps its numbers.
    """
    answer = replace(answer, key=question.key, repeat=question.repeat)
    if answer.status not in ("ok", "unparsable") or not answer.text:
        return answer
    got = read(answer.text, question.reads, answer.cut)
    return replace(
        answer, status=got.status, numbers=got.numbers, choice=got.choice, reasoning=got.reasoning or answer.reasoning
    )


class AnswerLog:
    """The open file of answers: what it holds by question hash, and ``add`` for new ones. For one process at a time."""

    def __init__(self, file: Path, judge: Judge) -> None:
        self.file, self.judge = file, judge
        self.answers: dict[str, Answer] = {}
        self.keys: set[tuple[str, str]] = set()  # (hash, key) of every answer in the file
        self.spent = 0.0  # US dollars of all its lines whose price was known
        for line in read_log(file) if file.exists() else ():
            if line.hash:
                self._note(line.hash, line.answer)
        self._opened: IO[str] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> AnswerLog:
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.file.with_name(f".{self.file.name}.lock"))
            torn = self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n")
            self._opened = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 - stays open while answers come
            head = {"identity": self.judge.identity, "name": self.judge.name, "sees": list(self.judge.sees)}
            self._write(head, before="\n" if torn else "")
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self._opened, self._lock):
            if file is not None:
                file.close()
        self._opened = self._lock = None

    def add(self, hash: str, question: Question, answer: Answer) -> None:
        """Append one answer and flush it to the operating system."""
        row = {"hash": hash, "aspect": question.aspect, "at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        with disk_errors(self.file):
            self._write({**row, **asdict(answer)})
        self._note(hash, answer)

    def _note(self, hash: str, answer: Answer) -> None:
        self.spent += answer.cost or 0.0
        if answer.status in ANSWERED:
            self.answers[hash] = answer
            self.keys.add((hash, answer.key))

    def _write(self, row: dict[str, Any], before: str = "") -> None:
        assert self._opened is not None, "open the log with `with` before adding to it"
        self._opened.write(before + json_line(row))
        self._opened.flush()
