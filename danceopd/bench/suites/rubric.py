"""What the judged suites share: items in turn, the protocol's hash, and what becomes of a missing answer.

A judged suite turns a picture into questions and the answers into one score. An item with any answer missing has no
score: its value is None and its status the first that is not "ok". Nothing is guessed, clamped or filled in.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from danceopd.bench.judges.question import Answer
from danceopd.bench.suites import Item
from danceopd.errors import UserError

FAILURES = (
    "an answer that is missing or cannot be read leaves the item without a score; it is counted, and the figures "
    "bound it by the lowest and the highest score"
)
"""The failure rule of every judged suite."""


@dataclass(frozen=True)
class JudgedScore:
    """What one picture got: ``value`` on the suite's scale, or None with a ``status`` that says why.

    ``correct``: full marks. ``reason``: the judge's words.
    """

    value: float | None
    correct: bool
    reason: str
    status: str = "ok"


class JudgedSuite(ABC):
    """The common half of a judged suite; a suite adds its items, places, questions and verdicts."""

    name: ClassVar[str]
    version: ClassVar[str]
    needs: ClassVar[str]
    """What to fetch and where to put it, as half a sentence."""
    scale: dict[str, tuple[float, float]]
    share: dict[str, bool]
    subsets: dict[str, tuple[str, ...]] = {}

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        """Where the suite's data is on this machine, or None; nobody is asked over the network."""
        return Path(data).expanduser() if data is not None and Path(data).expanduser().exists() else None

    @property
    @abstractmethod
    def items(self) -> list[Item]:
        """Every item, in the order of the data."""

    @property
    @abstractmethod
    def rules(self) -> dict[str, Any]:
        """How it asks and adds up, and what data it read; plain JSON."""

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return in_turn([item for item in self.items if item.capability == "generation"], limit)

    def editing_items(self, limit: int | None = None) -> list[Item]:
        return in_turn([item for item in self.items if item.capability == "editing"], limit)

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """None: nothing is reported apart."""
        return {"generation": [], "editing": []}

    def source_place(self, item: Item) -> str | None:
        """No copies of sources beside the pictures."""
        return None

    @cached_property
    def protocol(self) -> str:
        """sha256 over the rules, the prompts among them, and every item's words; where the data lies is no part."""
        rules = {key: value for key, value in self.rules.items() if key != "data"}
        words = [[i.key, i.capability, i.category, i.prompt, sorted(i.tags)] for i in self.items]
        return sha256_of(self.name, self.version, rules, words)


def in_turn(items: Sequence[Item], limit: int | None = None) -> list[Item]:
    """The categories in turn, each in the order given; the first ``limit`` of that."""
    by: dict[str, list[Item]] = {}
    for item in items:
        by.setdefault(item.category, []).append(item)
    order = {id(item): (at, number) for number, found in enumerate(by.values()) for at, item in enumerate(found)}
    return sorted(items, key=lambda item: order[id(item)])[:limit]


def sha256_of(*facts: Any) -> str:
    """Of plain JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def pictures_sha256(paths: Iterable[Path]) -> str:
    """Of the bytes of several files, in order: two copies of a benchmark that agree hold the same pictures."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def refuse_twice(pairs: Iterable[tuple[str, str]], what: str) -> None:
    """UserError for the first of (value, where) pairs whose value stands twice."""
    seen: dict[str, str] = {}
    for value, where in pairs:
        if value in seen:
            raise UserError(f"{where} repeats the {what} {value!r} of {seen[value]}; remove one of them")
        seen[value] = where


def failure(aspects: Sequence[str], answers: Mapping[str, Answer]) -> tuple[str, str] | None:
    """(status, why) of the first aspect without a usable answer, or None when every one has its answer."""
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
    """The numbers of an answer that `failure` let pass."""
    return answer.numbers or ()


def reasons(answers: Mapping[str, Answer], aspects: Sequence[str]) -> str:
    """What the judge said, aspect by aspect."""
    return "; ".join(f"{a}: {answers[a].reasoning}" if len(aspects) > 1 else answers[a].reasoning for a in aspects)
