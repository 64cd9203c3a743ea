"""The contract of a judge: a `Question` goes in, an `Answer` comes out.

A question holds texts and images in the order in which the judge sees them, and says how its answer is parsed. An
answer is numbers or a choice, or a status that says why there are none; an answer that cannot be parsed is never a
number. `content_hash` identifies a question by the judge, everything that the judge sees, and the repeat.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from danceopd.data.images import picture

Status = Literal["ok", "unparsable", "refused", "failed", "missing"]


@dataclass(frozen=True)
class Reads:
    """What an answer must hold: ``count`` numbers in [``low``, ``high``], or one of ``choices``.

    Of two choices the first is the favourable one ("yes", "correct").
    """

    count: int = 1
    low: float = 0
    high: float = 10
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Question:
    """One question to a judge.

    ``key`` is unique in a run: ``f"{model}/{item.key}/{aspect}"``. ``parts`` are texts (str) and images (an image, or
    the path of one, opened when needed). ``facts`` are plain JSON for judges that are programs; ``facts["place"]``, the
    image's path in the suite's official layout, is also how recorded official results are found. ``repeat`` numbers
    the times the same question is asked; ``JudgeSession`` sets it.
    """

    key: str
    aspect: str
    parts: tuple[str | Image.Image | Path, ...] = field(repr=False)
    reads: Reads = field(default_factory=Reads)
    system: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    max_tokens: int = 1000
    repeat: int = 0

    @property
    def text(self) -> str:
        """All of its text, the system prompt first."""
        return "\n".join([self.system or "", *(part for part in self.parts if isinstance(part, str))])


@dataclass(frozen=True)
class Answer:
    """A judge's answer. ``numbers`` and ``choice`` are None unless ``status`` is "ok".

    unparsable: an answer came, but does not hold what was asked for (``text`` keeps it). refused: the judge or a
    content filter declined. failed: no answer came. missing: not asked, or not recorded. ``cost`` is in US dollars,
    None where the price is unknown; ``judge`` is the name under which the judge answered. ``cut``: the judge was
    stopped before its end. Halves of characters (lone surrogates), which no file can hold, are replaced.
    """

    key: str
    status: Status
    numbers: tuple[float, ...] | None = None
    choice: str | None = None
    reasoning: str = ""
    text: str = ""
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    seconds: float = 0.0
    judge: str = ""
    repeat: int = 0
    cut: bool = False

    def __post_init__(self) -> None:
        for name in ("choice", "reasoning", "text", "judge"):
            if value := getattr(self, name):
                object.__setattr__(self, name, value.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class Quote:
    """The price of one question: tokens, and dollars expected and at most (None: unknown price)."""

    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    at_most: float | None = 0.0


class Judge(Protocol):
    """Anything that answers questions about images.

    ``identity`` is plain JSON: everything about the judge that could change an answer. ``sees`` names the fields of a
    question that it uses besides texts and images ("facts", "key"). ``deterministic``: the same question always gets
    the same answer, so repeats are useless.
    """

    identity: dict[str, Any]
    sees: tuple[str, ...]
    deterministic: bool

    @property
    def name(self) -> str:
        """A short name for tables and messages."""

    def check(self) -> None:
        """UserError for what keeps it from answering and can be told beforehand (no key, no package, no file)."""

    def quote(self, question: Question) -> Quote:
        """The tokens and the price of one question."""

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        """One answer for each question, in order of completion; takes a question only when it can ask it."""


def content_hash(identity: Mapping[str, Any], sees: Iterable[str], question: Question) -> str:
    """sha256 over everything that could change the answer to a question."""
    digest = sha256()

    def add(*parts: bytes) -> None:
        for part in parts:  # each after its length, so that different parts never make the same bytes
            digest.update(len(part).to_bytes(8, "big") + part)

    further = {"facts": dict(question.facts), "key": question.key}
    head = {
        "judge": identity,
        "system": question.system,
        "max_tokens": question.max_tokens,
        "sees": {name: further[name] for name in sees},
        "repeat": question.repeat,
    }
    add(json.dumps(head, sort_keys=True, ensure_ascii=False).encode())
    for part in question.parts:
        if isinstance(part, str):
            add(b"text", part.encode())
        else:
            image = picture(part)
            add(b"picture", f"{image.width}x{image.height}".encode(), image.tobytes())
    return digest.hexdigest()
