"""Suites: what a benchmark asks, and how an answer is scored.

A suite is a module with a class ``Suite``. It gives items (a prompt, or an instruction with a source image) and turns
the images that a model made of them into scores: an exact suite by itself (``score``), a judged one by questions that
a judge answers (``questions``, ``verdict``). It never runs a model, so every model is asked exactly the same; how
scores are summed up and compared is in ``bench/compare.py``, the same for every suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from danceopd.errors import UserError
from danceopd.recipe import CAPABILITIES
from danceopd.sentences import nearest

if TYPE_CHECKING:
    from danceopd.bench.judges import Answer, Question

SUITES = {
    "scenes": "danceopd.bench.suites.scenes",
    "gedit": "danceopd.bench.suites.gedit",
    "imgedit": "danceopd.bench.suites.imgedit",
    "geneval": "danceopd.bench.suites.geneval",
    "openmoji": "danceopd.bench.suites.openmoji",
    "folder": "danceopd.bench.suites.folder",
}
"""Name -> module with a class ``Suite``."""
FLAGS = {
    "data": "--data",
    "language": "--language",
    "official_prompts": "--official-prompts",
    "samples": "--samples",
}
"""What a suite may take, as a user types it."""


@dataclass(frozen=True)
class Item:
    """One task of a suite.

    ``key`` never changes. ``capability`` is generation or editing; ``group`` is generation, local, global or whatever
    the suite reports together; ``probe`` names the set that is reported apart, None for the ordinary items.
    ``source`` is the image to edit (None for generation), ``target`` one image that is right (None where none is
    known), ``mask`` where the edit may change pixels (white), where the suite knows; each a picture or a path that is
    opened when it is needed (``picture``). ``task`` is what the suite scores against, ``tags`` the subsets that the
    item belongs to, ``heldout`` says that no teacher has seen its like.
    """

    key: str
    capability: str
    group: str
    category: str
    prompt: str
    probe: str | None
    source: Image.Image | Path | None = field(repr=False, compare=False)
    target: Image.Image | Path | None = field(repr=False, compare=False)
    task: Any = field(repr=False, compare=False)
    mask: Image.Image | Path | None = field(default=None, repr=False, compare=False)
    tags: tuple[str, ...] = ()
    heldout: bool = False


def picture(value: Image.Image | Path) -> Image.Image:
    """A picture in RGB, read from disk and upright where it is a path. UserError for a file that is no picture."""
    if isinstance(value, Image.Image):
        return value if value.mode == "RGB" else value.convert("RGB")
    try:
        with Image.open(value) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{value} cannot be read as a picture ({error}); replace that file") from None


class Suite(Protocol):
    """What every suite offers.

    A score is any object with ``value`` (float, None when an answer is missing), ``correct`` and ``reason``, and
    ``status`` where it is not "ok"; further plain fields go into the row. Exact suites have ``score(items, images)``,
    judged ones ``questions`` and ``verdict``. ``__init__`` takes ``data``, ``language`` and ``official_prompts`` where
    they mean something, and raises UserError (what to fetch, where to put it) when its data is missing.
    """

    name: str
    version: str
    rules: dict[str, Any]  # plain JSON: resize rule, message order, averaging, failure rule, where the data is from
    scale: dict[str, tuple[float, float]]  # capability -> the lowest and highest score an item can get
    share: dict[str, bool]  # capability -> scores are 0 or 1
    subsets: dict[str, tuple[str, ...]]  # a subset that is reported -> its categories, or "tag:..." of its items

    @property
    def protocol(self) -> str:
        """sha256 over everything that the suite asks and expects."""

    def generation_items(self, limit: int | None = None) -> list[Item]:
        """Prompts, the categories in turn."""

    def editing_items(self, limit: int | None = None) -> list[Item]:
        """Instructions with source images, the categories in turn."""

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Capability -> items that are reported apart and count in no overall score."""

    def place(self, item: Item) -> str:
        """Path of an item's picture, relative to a model's folder, as the suite's official tree has it."""

    def source_place(self, item: Item) -> str | None:
        """The same of its source, where the official tree keeps a copy beside the picture."""


class JudgedSuite(Suite, Protocol):
    """A suite that asks a judge."""

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """What the judge is asked about one picture; keys are made unique for a model by the bench."""

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> Any:
        """Aspect -> answer, as one score; its ``value`` is None when an answer is missing or cannot be read."""


def places(suite: Any, item: Item) -> tuple[str, ...]:
    """Every path where an item's picture may be in a folder made elsewhere, the suite's own first."""
    return suite.places(item) if hasattr(suite, "places") else (suite.place(item),)


def judged(suite: Any) -> bool:
    """Whether a judge has to be asked."""
    return not hasattr(suite, "score")


def suite_class(name: str) -> Any:
    """The class of the suite of that name; UserError names the nearest when there is none."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}{nearest(name, SUITES)}")
    return import_module(SUITES[name]).Suite


def suite_named(name: str, **options: Any) -> Any:
    """The suite of that name; ``options`` are those of ``FLAGS``, None for what was not given.

    UserError names the nearest when there is none, and the flag that a suite does not take.
    """
    made = suite_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in inspect.signature(made).parameters:
            raise UserError(f"suite {name} takes no {FLAGS.get(key, key)}; leave it out")
    return made(**given)


def suite_items(suite: Suite, limit: int | None, probes: bool, categories: Sequence[str] = ()) -> dict[str, list[Item]]:
    """capability -> items of a suite; probes follow the ordinary items and count in no overall score.

    `categories`: only their items, the first `limit` of them. UserError for one that the suite does not have.
    """
    asked = None if categories else limit
    ordinary = {"generation": list(suite.generation_items(asked)), "editing": list(suite.editing_items(asked))}
    apart = suite.probe_items(asked) if probes else {}
    known = {item.category: None for items in (*ordinary.values(), *apart.values()) for item in items}
    for category in categories:
        if category not in known:
            raise UserError(f"suite {suite.name} has no category {category!r}{nearest(category, known)}")
    wanted = set(categories) or set(known)
    found = {}
    for capability in CAPABILITIES:
        kept = [item for item in ordinary[capability] if item.category in wanted][:limit]
        by_probe: dict[str | None, list[Item]] = {}
        for item in apart.get(capability, ()):
            if item.category in wanted:
                by_probe.setdefault(item.probe, []).append(item)
        found[capability] = kept + [item for items in by_probe.values() for item in items[:limit]]
    return found
