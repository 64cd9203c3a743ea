"""Suites: what a benchmark asks, and how an answer is scored.

A suite is a module with a class ``Suite``. It gives items (a prompt, or an instruction with a source image) and
scores the images that a model made of them. It never runs a model, so every model is asked exactly the same; how
scores are summed up and compared is in ``bench/compare.py``, the same for every suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Item:
    """One task of a suite.

    ``key`` is a short hash that never changes. ``capability`` is generation or editing; ``group`` is generation,
    local, global or compound; ``probe`` names the set that is reported apart, None for the ordinary items.
    ``source`` is the image to edit (None for generation), ``target`` one image that is right (None where none is
    known), ``task`` what the suite scores against.
    """

    key: str
    capability: str
    group: str
    category: str
    prompt: str
    probe: str | None
    source: Image.Image | None = field(repr=False, compare=False)
    target: Image.Image | None = field(repr=False, compare=False)
    task: Any = field(repr=False, compare=False)


class Suite(Protocol):
    """What every suite offers; scores have at least ``value``, ``correct`` and ``reason``."""

    name: str
    version: str

    @property
    def protocol(self) -> str:
        """sha256 over everything that the suite asks and expects."""

    def generation_items(self, limit: int | None = None) -> list[Item]:
        """Prompts, the categories in turn."""

    def editing_items(self, limit: int | None = None) -> list[Item]:
        """Instructions with source images, the categories in turn."""

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Capability -> items that are reported apart and count in no overall score."""

    def score(self, items: Sequence[Item], images: Sequence[Any]) -> list[Any]:
        """One score an item, in the order of the items."""
