"""The same rows asked otherwise, as data that is encoded like any other: other words, or a degraded source.

Which rows need which variant is a function of the recipe, so it is known, checked and encoded before a weight is
loaded, and what cannot be asked is refused by name. A variant has the rows of its data, under the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from danceopd.data import Edits, Prompts, Source, open_image
from danceopd.degrade import degraded
from danceopd.errors import UserError
from danceopd.paraphrase import expanded, paraphrases
from danceopd.recipe import Recipe
from danceopd.recipe_gates import Consensus
from danceopd.routing import pick
from danceopd.skills import draws

FRAMING, EXPANDED, DEGRADED, KEEP = "framing ", "expanded", "degraded ", "keep"
"""Names of variants: "framing 1" and so on, "degraded blur" and so on; the others stand alone."""
KEEP_WORDS = "keep the picture as it is"
"""What an edit is contrasted with where a family reads its null prompt together with the source."""


class Reworded(Prompts):
    """A source's rows with other `words`, by row; only these rows can be asked."""

    def __init__(self, data: Prompts, words: Mapping[int, str]) -> None:
        super().__init__(data.table)
        self._words_of = words

    def _item(self, row: int, cells: Any) -> Any:
        return self._words_of[row]


class RewordedEdits(Edits):
    """The same for instructions: the sources stay."""

    def __init__(self, data: Edits, words: Mapping[int, str]) -> None:
        super().__init__(data.table)
        self._words_of = words

    def _item(self, row: int, cells: Any) -> tuple[str, Source]:
        return self._words_of[row], super()._item(row, cells)[1]


class Degraded(Edits):
    """A source's rows with worse copies of their sources: one degradation, of a strength drawn for each row."""

    def __init__(self, data: Edits, kind: str, seed: int) -> None:
        super().__init__(data.table)
        self._kind, self._seed = kind, seed

    def _item(self, row: int, cells: Any) -> tuple[str, Source]:
        words, source = super()._item(row, cells)
        picture: Image.Image = open_image(source, self.where(row))
        return words, degraded(picture, self._kind, self._seed + row)


Variant = tuple[Prompts, list[int]]
"""Data, and which rows of it are wanted."""


def variants(recipe: Recipe, data: Sequence[Prompts], rows: Sequence[Iterable[int]]) -> list[dict[str, Variant]]:
    """Of each teacher's `data`, by name, what its drawn `rows` are also asked as; all empty where no gate is on.

    UserError where a gate would have nothing to ask.
    """
    found: list[dict[str, Variant]] = [{} for _ in data]
    if not recipe.gates.on:
        return found
    for teacher, mine, drawn, also in zip(recipe.teachers, data, rows, found, strict=True):
        consensus, skills = recipe.gates.consensus, recipe.gates.skills
        if consensus is not None:
            also.update(_framings(teacher.name, mine, sorted(drawn), consensus))
        told = None if skills is None or not skills.eta else skills.told(teacher.capability)
        if told is not None and "caption" in (told.step, told.episode):
            longer = {row: mine.expanded(row) or expanded(mine.words(row)) for row in sorted(drawn)}
            words = {row: said for row, said in longer.items() if said}
            if not words:
                key = f"gates.skills.{teacher.capability}." + ("step" if told.step == "caption" else "episode")
                raise UserError(
                    f"{key} is caption, and no row of {mine.table.path} (teacher {teacher.name!r}) has words at "
                    f"greater length; add a column `expanded`, or set {key}: none"
                )
            also[EXPANDED] = reworded(mine, words)
    _degraded(recipe, data, found)
    return found


def kept(data: Prompts, rows: Iterable[int]) -> Variant:
    """The rows asked to change nothing."""
    return reworded(data, dict.fromkeys(rows, KEEP_WORDS))


def reworded(data: Prompts, words: Mapping[int, str]) -> Variant:
    """`data` with other words for some rows."""
    made = RewordedEdits(data, words) if isinstance(data, Edits) else Reworded(data, words)
    return made, sorted(words)


def other_words(data: Prompts, row: int) -> list[str]:
    """Other wordings of a row, each once: those of its data, else those of a rule."""
    own = data.words(row)
    return [words for words in dict.fromkeys(data.paraphrases(row) or paraphrases(own)) if words != own]


def _framings(name: str, data: Prompts, rows: Sequence[int], knobs: Consensus) -> dict[str, Variant]:
    framings: list[dict[int, str]] = [{} for _ in range(knobs.framings - 1)]
    for row in rows:
        for place, words in zip(framings, other_words(data, row)):
            place[row] = words
    if not framings[0]:
        raise UserError(
            f"gates.consensus asks in other words, and no row of {data.table.path} (teacher {name!r}) has any; add a "
            "column `paraphrases`, or leave the gate out"
        )
    return {f"{FRAMING}{i}": reworded(data, words) for i, words in enumerate(framings, start=1) if words}


def _degraded(recipe: Recipe, data: Sequence[Prompts], found: list[dict[str, Variant]]) -> None:
    """The rows whose students will see a degraded source, by degradation."""
    knobs, per = recipe.gates.skills, recipe.routing
    if knobs is None or not knobs.eta or knobs.editing.step != "source":
        return
    shares = [recipe.shares()[t.name] for t in recipe.teachers]
    units, lengths = recipe.batch // recipe.unit, [len(one) for one in data]
    wanted: dict[tuple[int, str], set[int]] = {}
    for step in range(recipe.steps):
        routes, picks = pick(recipe.seed, step, units, shares, lengths, per.per, per.groups)
        drawn = draws(recipe.seed, step, units, recipe.rollout.steps, knobs)
        for u in drawn.critical.nonzero()[0]:
            wanted.setdefault((routes[u], knobs.degrade[drawn.kind[u]]), set()).add(picks[u])
    for (m, kind), rows in wanted.items():
        one = data[m]
        if isinstance(one, Edits):
            found[m][DEGRADED + kind] = Degraded(one, kind, recipe.seed), sorted(rows)
