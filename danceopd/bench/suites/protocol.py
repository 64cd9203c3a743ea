"""The contract of a benchmark suite: its items, and how an image of an item becomes a score.

An `Item` is one prompt or one edit. An `ExactSuite` scores an image itself (`score`). A `JudgedSuite` asks a judge: it
turns an image into questions (`questions`) and the judge's answers into a score (`verdict`). A suite is a class named
`Suite` in a module of its own that inherits from one of the two, and has a line in `registry.SUITES`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.judges.protocol import Answer, Question

DRIFT = "drift"
"""The group of items that are drawn and compared with the base, and never scored (evidence/drift.py)."""
RoundTrip = Callable[[list[Image.Image]], list[Any]]
"""Images through an autoencoder and back, as many as went in."""


@dataclass(frozen=True)
class Item:
    """One prompt or one edit of a suite.

    `key` names it as the benchmark does, and never changes; where two categories share one (`shared`), as tasks of
    GEdit-Bench do, `id` tells the two apart. `capability` is "generation" or "editing". `category` is what scores are
    averaged over first; `group` ("generation", "local", "global", …) is a set of categories that is reported together.
    `probe` names the set of items that is reported apart and counts in no overall score; None for ordinary items.
    `source` is the image to edit (None for generation), `references` are further ones that the edit reads, `target` is
    a known right result (None where there is none), `mask` marks in white what the edit may change; each is an image or
    a path. `task` is what the suite itself scores against, `tags` are the subsets that the item belongs to, `heldout`
    means that no teacher was trained on its like.
    """

    key: str
    capability: str
    group: str
    category: str
    prompt: str
    probe: str | None = None
    source: Image.Image | Path | None = field(default=None, repr=False, compare=False)
    target: Image.Image | Path | None = field(default=None, repr=False, compare=False)
    task: Any = field(default=None, repr=False, compare=False)
    mask: Image.Image | Path | None = field(default=None, repr=False, compare=False)
    tags: tuple[str, ...] = ()
    heldout: bool = False
    shared: bool = False
    references: tuple[Image.Image | Path, ...] = field(default=(), repr=False, compare=False)

    @property
    def id(self) -> str:
        """What no other item of the suite has: the key, after the category where two categories share the key."""
        return f"{self.category}/{self.key}" if self.shared else self.key


@dataclass(frozen=True)
class Score:
    """The score of one image: `value` on the suite's scale, or None with a `status` that says why there is none.

    `correct` means full marks, `reason` says in words what was lost. Further number and text fields of a subclass are
    written into the row's `parts`.
    """

    value: float | None
    correct: bool
    reason: str
    status: str = "ok"


class Suite(ABC):
    """What every suite has. Its `__init__` takes those of `registry.FLAGS` that it uses, and raises UserError (what to
    download, where to put it) when its data is missing.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    needs: ClassVar[str] = ""
    """How to get the data, as half a sentence; "" where a suite needs none."""
    scale: ClassVar[Mapping[str, tuple[float, float]]]
    """Capability -> the lowest and the highest score of an item."""
    share: ClassVar[Mapping[str, bool]]
    """Capability -> whether every score is 0 or 1, so that a mean is the share of correct images."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Capabilities beside whose graded scores stands the share of items with full marks (`Score.correct`)."""
    subsets: Mapping[str, tuple[str, ...]] = {}
    """Name of a reported subset -> its categories, or "tag:…" of its items."""
    published: Mapping[str, int] = {}
    """Capability -> items of the whole published benchmark; empty for a suite that is all here."""
    rules: Any
    """Plain JSON for the result: prompts, resizing, averaging, how failures count, where the data is from."""
    protocol: Any
    """sha256 over everything that is asked and expected; results with another one do not compare."""

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        """Where the suite's data is on this machine, or None; nothing is downloaded."""
        return Path(data).expanduser() if data is not None and Path(data).expanduser().exists() else None

    @abstractmethod
    def generation_items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` prompts, the categories in turn."""

    @abstractmethod
    def editing_items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` edits, the categories in turn."""

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Capability -> the first `limit` items of each probe; none by default."""
        return {"generation": [], "editing": []}

    @abstractmethod
    def image_path(self, item: Item) -> str:
        """The path of an item's image below a model's folder, in the layout of the benchmark's official code."""

    def image_paths(self, item: Item) -> tuple[str, ...]:
        """Every path at which a folder made elsewhere may have the item's image, `image_path` first."""
        return (self.image_path(item),)

    def source_path(self, item: Item) -> str | None:
        """The path of a copy of the source image below a model's folder in the official layout; None: it has none."""
        return None

    def extra_files(self, item: Item) -> dict[str, str]:
        """Path -> text of the small files that the official layout has beside an item's image."""
        return {}

    def ceiling(self, roundtrip: RoundTrip, limit: int | None = 96) -> dict[str, Any] | None:
        """What correct images score after the autoencoder's round trip; None where the suite cannot tell."""
        return None


class ExactSuite(Suite):
    """A suite that knows the right answers and scores images itself, without a judge."""

    def image_path(self, item: Item) -> str:
        """`<category>/<key>.png`."""
        return f"{item.category}/{item.key}.png"

    def score(self, items: Sequence[Item], images: Sequence[Any]) -> list[Any]:
        """One `Score` an item; `images` are PIL images or uint8 arrays (h, w, 3) in the order of `items`."""
        if len(items) != len(images):
            raise UserError(f"{len(items)} items of suite {self.name} got {len(images)} images; give one image an item")
        return self._scores(items, images)

    @abstractmethod
    def _scores(self, items: Sequence[Item], images: Sequence[Any]) -> list[Any]:
        """The same, with the counts checked."""


class JudgedSuite(Suite):
    """A suite whose images are scored by a judge. Subclasses add `items`, `rules`, `questions` and `verdict`."""

    @property
    @abstractmethod
    def items(self) -> list[Item]:
        """Every item, in the order of the data."""

    @abstractmethod
    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """What the judge is asked about one image of an item; the bench makes the keys unique for each model."""

    @abstractmethod
    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> Score:
        """The answers by aspect as one score; its `value` is None when one is missing or unreadable."""

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return in_turn([item for item in self.items if item.capability == "generation"], limit)

    def editing_items(self, limit: int | None = None) -> list[Item]:
        return in_turn([item for item in self.items if item.capability == "editing"], limit)

    def edit_facts(self, item: Item) -> dict[str, Any]:
        """The `facts` of a question about an edit: what a program judge, or recorded official results, know it by."""
        facts = {"suite": self.name, "place": self.image_path(item), "instruction": item.prompt}
        return facts | {"category": item.category}

    @cached_property
    def protocol(self) -> str:
        """sha256 over the rules (the judge's prompts among them) and every item's text; not over the data's place."""
        rules = {key: value for key, value in self.rules.items() if key != "data"}
        items = [[i.key, i.capability, i.category, i.prompt, sorted(i.tags)] for i in self.items]
        return json_sha256(self.name, self.version, rules, items)


def in_turn(items: Sequence[Item], limit: int | None = None) -> list[Item]:
    """The first `limit` items when the categories take turns; a category keeps its own order."""
    by_category: dict[str, list[Item]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    order = {id(item): (at, n) for n, found in enumerate(by_category.values()) for at, item in enumerate(found)}
    return sorted(items, key=lambda item: order[id(item)])[:limit]


def json_sha256(*facts: Any) -> str:
    """sha256 of plain JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
