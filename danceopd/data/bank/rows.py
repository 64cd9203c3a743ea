"""`bank_data`: the data source `auto` goes in, prompts or edits of the bank come out, and others that are held out.

`auto` is all of the bank in the languages that the base reads, `auto:zh` or `auto:counting,position` a part of it. A
twelfth of each kind is held out, whatever the seed: `held_out` of the data, for validation and sample grids. The
source of an edit is a file that does not exist until it is drawn (danceopd/drawing.py) from the prompt in `drawn_from`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from danceopd.common.cache import cache_key
from danceopd.common.messages import did_you_mean
from danceopd.data.bank.build import build
from danceopd.data.sources import Edits, Prompts
from danceopd.data.tables import InMemoryTable
from danceopd.errors import UserError
from danceopd.models.base import base_folder, pipeline_call, pipeline_index
from danceopd.pipelines.registry import family_of
from danceopd.recipe.recipe import Recipe

NAME = "the prompt bank"
HELD_OUT = 12
"""One of so many prompts, and of so many sources, is held out."""
HELD_OUT_EDITS = 2
"""Edits of a held-out source."""
ENGLISH_ONLY = re.compile(r"CLIP|T5")
"""The beginning of the class of a text encoder that reads no Chinese."""


@dataclass(frozen=True)
class Setting:
    """What the bank must know of a run: the languages that the base reads, the (width, height) in which sources are
    drawn, the folder that they lie in, and the seed."""

    languages: Sequence[str]
    size: tuple[int, int]
    folder: Path
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        """Of the run that a recipe describes."""
        base = base_folder(recipe.base)
        family, index = family_of(base, recipe.family), pipeline_index(base)
        call = pipeline_call(base, recipe.call, family)
        encoders = [index[name][1] for name in family.text_components if isinstance(index.get(name), list)]
        both = any(name and not ENGLISH_ONLY.match(name) for name in encoders)
        folder = recipe.output.absolute() / "cache" / "sources"
        return cls(("en", "zh") if both else ("en",), (call["width"], call["height"]), folder, recipe.seed)


class BankPrompts(Prompts):
    """Prompts of the bank."""

    def __init__(self, prompts: Sequence[str], held_out: Sequence[str] = ()) -> None:
        super().__init__(InMemoryTable(NAME, [{"prompt": prompt} for prompt in prompts]))
        self.held_out = BankPrompts(held_out) if held_out else None


class BankEdits(Edits):
    """Edits of the bank; `drawn_from` is the prompt of each row's source, `drawn` the size of all of them."""

    def __init__(
        self, edits: Sequence[tuple[str, str]], setting: Setting, held_out: Sequence[tuple[str, str]] = ()
    ) -> None:
        """`edits` are pairs: the source's prompt, the instruction."""
        rows = [{"instruction": text, "source": str(_file(prompt, setting))} for prompt, text in edits]
        super().__init__(InMemoryTable(NAME, rows))
        self.drawn_from, self.drawn = [prompt for prompt, _ in edits], setting.size
        self.held_out = BankEdits(held_out, setting) if held_out else None

    def sizes(self, row: int) -> list[tuple[int, int]]:
        return [self.drawn]


def is_auto(spec: str | Path) -> bool:
    """Whether the source is "auto" or a part of it."""
    return str(spec).partition(":")[0] == "auto"


def bank_data(spec: str, capability: str, rows: int, setting: Setting) -> Prompts:
    """All prompts of the bank that `spec` names, or `rows` of its edits at most; UserError for an unknown kind."""
    bank = _bank()[capability]
    kinds = {kind for mine in bank.values() for kind in _kinds(mine)}
    wanted = [word.strip() for word in spec.partition(":")[2].split(",") if word.strip()]
    for word in wanted:
        if word not in kinds and word not in bank:
            raise UserError(f"data source {spec!r} names {word!r}{did_you_mean(word, sorted({*kinds, *bank}))}")
    languages = [word for word in wanted if word in bank] or setting.languages
    kinds = {word for word in wanted if word in kinds} or kinds
    order, trained, held = random.Random(f"bank/{setting.seed}"), list[Any](), list[Any]()
    for language in languages:
        groups = bank[language].items() if capability == "generation" else [("", bank[language])]
        for kind, found in groups:
            for place, one in enumerate(found if kind in ("", *kinds) else ()):
                (held if place % HELD_OUT == HELD_OUT - 1 else trained).append(one)
    order.shuffle(trained)
    order.shuffle(held)
    if capability == "generation":
        return BankPrompts(trained, held)
    edits = [(prompt, text) for prompt, texts in _with(trained, kinds) for text in texts][:rows]
    apart = [(prompt, text) for prompt, texts in _with(held, kinds) for text in texts[:HELD_OUT_EDITS]]
    return BankEdits(edits, setting, apart)


_bank = cache(build)


def _kinds(part: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    """The kinds of prompts, or of edits, in one language."""
    return list(part) if isinstance(part, Mapping) else [kind for _, edits in part for kind, _ in edits]


def _with(sources: Sequence[Any], kinds: set[str]) -> list[tuple[str, list[str]]]:
    """The sources that have edits of these kinds, with those instructions."""
    found = [(prompt, [text for kind, text in edits if kind in kinds]) for prompt, edits in sources]
    return [(prompt, texts) for prompt, texts in found if texts]


def seed_of(prompt: str, seed: int) -> int:
    """The noise seed of a source."""
    return int(cache_key(prompt, seed)[:8], 16)


def _file(prompt: str, setting: Setting) -> Path:
    words = "-".join(re.findall("[a-z0-9]+", prompt.lower()))[:40].strip("-")
    return setting.folder / f"{words or 'source'}-{cache_key(prompt, setting.seed, setting.size)[:10]}.png"
