"""What a judge is asked, and what it answers.

A question holds texts and pictures in the order the judge sees them, and says how its answer is read. An answer is
numbers or a choice, or a status that says why there are none: an answer that cannot be read is never a number.
Equal questions have equal hashes: who is asked, all that it sees, and which repeat it is.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from danceopd.bench.suites import picture

Status = Literal["ok", "unparsable", "refused", "failed", "missing"]


@dataclass(frozen=True)
class Reads:
    """How an answer is read: ``count`` numbers in [``low``, ``high``], or one of ``choices``.

    Of two choices the first is the one that speaks for the picture ("yes", "correct").
    """

    count: int = 1
    low: float = 0
    high: float = 10
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Question:
    """One question to a judge.

    ``key`` is unique in a run: ``f"{model}/{item.key}/{aspect}"``. ``parts`` are texts (str) and pictures (an image,
    or the path of one, opened when needed). ``facts`` are plain JSON for judges that are programs; ``facts["place"]``,
    the picture's path in the suite's official file tree, is also how recorded official results are found.
    ``repeat`` counts the times the same is asked; ``Session`` sets it.
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
        """All its words, the system's first."""
        return "\n".join([self.system or "", *(part for part in self.parts if isinstance(part, str))])

    def pictures(self) -> list[Image.Image]:
        """Its pictures in order, RGB."""
        return [picture(part) for part in self.parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Answer:
    """What came back. ``numbers`` and ``choice`` are None unless ``status`` is "ok".

    unparsable: an answer came, and nothing certain can be read from it (``text`` keeps it). refused: the judge
    declined, or a content filter did. failed: no answer came. missing: it was not asked, or is not recorded.
    ``cost`` is in US dollars, None where the price is not known; ``judge`` is who says that it answered.
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


@dataclass(frozen=True)
class Quote:
    """What one question takes: tokens, and dollars as expected and at most (None: the price is not known)."""

    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    at_most: float | None = 0.0


class Judge(Protocol):
    """Anything that answers questions about pictures.

    ``identity`` is plain JSON: everything that could change an answer. ``sees`` are the further fields of a question
    that it looks at besides texts and pictures ("facts", "key"). ``deterministic``: the same question again is
    answered the same, so that repeats say nothing.
    """

    identity: dict[str, Any]
    sees: tuple[str, ...]
    deterministic: bool

    @property
    def name(self) -> str:
        """A short name for tables."""

    def check(self) -> None:
        """UserError for whatever would keep it from answering and shows without asking (no key, no package)."""

    def quote(self, question: Question) -> Quote:
        """What one question takes."""

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        """One answer a question, as they complete. Takes questions only as it has room for them."""


def content_hash(identity: Mapping[str, Any], sees: Iterable[str], question: Question) -> str:
    """sha256 over all that could change the answer."""
    digest = sha256()

    def add(*parts: bytes) -> None:
        for part in parts:  # with its length, so that no two contents run together into the same bytes
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
