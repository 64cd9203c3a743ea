"""What the judged suites share: the score of a judge's answers, and the checks and hashes of their data.

An item with any answer missing or unreadable has no score: its value is None and its status that of the first such
answer. Nothing is guessed, clamped or filled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from danceopd.bench.judges.protocol import Answer
from danceopd.errors import UserError

FAILURES = (
    "an answer that is missing or cannot be read leaves the item without a score; it is counted, and the figures "
    "bound it by the lowest and the highest score"
)
"""The failure rule of every judged suite, as its `rules` say it (the protocol's hash is over these words)."""


def refuse_duplicates(pairs: Iterable[tuple[str, str]], what: str) -> None:
    """UserError for the first of (value, where) pairs whose value occurs twice."""
    seen: dict[str, str] = {}
    for value, where in pairs:
        if value in seen:
            raise UserError(f"{where} repeats the {what} {value!r} of {seen[value]}; remove one of them")
        seen[value] = where


def files_sha256(paths: Iterable[Path]) -> str:
    """sha256 over the bytes of several files in order: equal for two copies of a benchmark with the same images."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def failure(aspects: Sequence[str], answers: Mapping[str, Answer]) -> tuple[str, str] | None:
    """(status, reason) of the first aspect without a usable answer; None when every aspect has one."""
    for aspect in aspects:
        answer = answers.get(aspect)
        if answer is None:
            return "missing", f"{aspect}: no answer"
        status: str = answer.status
        if status == "ok" and answer.numbers is None and answer.choice is None:
            status = "unparsable"
        if status != "ok":
            return status, f"{aspect}: {answer.reasoning or answer.text or status}"
    return None


def numbers_of(answer: Answer) -> tuple[float, ...]:
    """The numbers of an answer that `failure` accepted."""
    return answer.numbers or ()


def reasons(answers: Mapping[str, Answer], aspects: Sequence[str]) -> str:
    """The judge's reasoning, aspect by aspect."""
    return "; ".join(f"{a}: {answers[a].reasoning}" if len(aspects) > 1 else answers[a].reasoning for a in aspects)


def official_file(folder: str | Path, name: str, places: Sequence[str], advice: str) -> Path:
    """The file of prompts in the user's copy of a benchmark's official code; `advice` says which folder to give."""
    copies = [Path(folder).expanduser() / place / name for place in places]
    file = next((copy for copy in copies if copy.is_file()), None)
    if file is None:
        raise UserError(f"--official-prompts {folder} has no {name}; {advice}")
    return file
