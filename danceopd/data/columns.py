"""Which column of a table is what: the names and cells of a row go in, its text, source and target column come out.

Published sets of edits name their columns in many ways. Some names say what they hold: `edit_image`, `control_path` and
`input_image` are sources, `edited_image`, `target` and `output_image` finished pictures. `image` and `file_name` may be
either, so they are the source only where no other column can be it, and the target where there is a source. What cannot
be told is refused with the names; the recipe's `columns` says it then. The same words name folders (`control/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from danceopd.common.messages import clipped, did_you_mean
from danceopd.data.images import IMAGES, ImageSource

PROMPT = ("prompt", "caption", "text")
INSTRUCTION = (
    "instruction", "edit_instruction", "editing_instruction", "edit_prompt", "editing_prompt", "edit", "input_prompt",
    *PROMPT,
)  # fmt: skip
_FILE = r"(?:_?(?:image|img|picture|pic|photo|path|file|file_?name|image_(?:path|file|file_?name))s?)"
_SOURCE = "source|src|input|original|orig|control|controlnet|cond|condition|conditioning|reference|ref|before|init"
_TARGET = "target|tgt|edited|output|result|after|gt|ground_?truth"
_NUMBER = r"(?:_?\d+)?"
_ROLES = (
    ("mask", re.compile(rf"(?:.*_)?masks?{_FILE}?{_NUMBER}")),
    ("source", re.compile(rf"(?:{_SOURCE}|edit|kontext){_FILE}{_NUMBER}|(?:{_SOURCE})s?{_NUMBER}")),
    ("target", re.compile(rf"(?:{_TARGET}){_FILE}?{_NUMBER}|(?:{_TARGET})s")),
    ("picture", re.compile(rf"(?:image|img|picture|photo){_FILE}?s?{_NUMBER}|(?:image_?|img_?|file_?)names?")),
)
_STEM = re.compile(r"\d+$")
Role = Literal["mask", "source", "target", "picture"]


@lru_cache(maxsize=4096)
def role_of(name: str) -> Role | None:
    """What the name of a column or folder says of the pictures in it; "picture": a source or a target."""
    name = _plain(name)
    return next((role for role, words in _ROLES if words.fullmatch(name)), None)  # type: ignore[misc]


@dataclass(frozen=True)
class Layout:
    """The columns of a row by what they may hold, each in the order of the row but for texts, the likeliest first."""

    texts: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    pictures: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], texts: tuple[str, ...]) -> Layout:
        """By the names alone; `texts` are the names that a text may have."""
        found: dict[str | None, list[str]] = {}
        for name in names:
            found.setdefault(role_of(name), []).append(name)
        plain = {_plain(name): name for names in found.values() for name in names}
        known = tuple(plain[text] for text in texts if text in plain)
        others = tuple(name for name in found.get(None, []) if name not in known)
        sources, targets = (_specific(found.get(role, [])) for role in ("source", "target"))
        return cls(known, sources, targets, tuple(found.get("picture", [])), others)

    def source(self, cells: Mapping[str, Any], target: str | None = None) -> str | None:
        """The column of the source picture; `target` is known to be the finished one. ValueError: it cannot be told."""
        simple = target is None and self.only_picture is not None  # as most tables are, which is quickly seen
        if simple and not self._rivals(cells, self.pictures):
            return self.only_picture
        pictures = _filled(cells, [name for name in self.pictures if name != target])
        if sources := _no_phrases(cells, [name for name in self.sources if name != target], pictures):
            return _one(cells, sources, "the source")
        if pictures and target is None and not self.targets:
            pictures += self._rivals(cells, pictures)
        return _one(cells, pictures, "the source") if pictures else None

    def target(self, cells: Mapping[str, Any], source: str | None) -> str | None:
        """The column of the finished picture, never that of the source."""
        pictures = [] if source in self.pictures else _filled(cells, self.pictures)
        found = _no_phrases(cells, [name for name in self.targets if name != source], pictures) or pictures
        return _one(cells, found, "the finished picture") if found else None

    def _rivals(self, cells: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
        """Columns of other names with pictures; beside a picture itself, a path is a mere name."""
        rivals = [name for name in self.others if looks_like_picture(cells[name])]
        held = rivals and any(_is_held(cells[name]) for name in pictures)
        return [name for name in rivals if _is_held(cells[name])] if held else rivals

    @cached_property
    def only_picture(self) -> str | None:
        """The one column with a picture, where its name does not say whether it is the source."""
        return self.pictures[0] if len(self.pictures) == 1 and not (self.sources or self.targets) else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def _specific(names: list[str]) -> tuple[str, ...]:
    """`input_image` and not `input`, which beside it is a text."""

    def longer(name: str) -> bool:
        return any(re.fullmatch(_plain(name) + _FILE + _NUMBER, _plain(other)) for other in names if other != name)

    return tuple(name for name in names if not longer(name))


def _filled(cells: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Of `picture` columns: pictures themselves, else those with something in them, else all."""
    names = list(names)
    held = [name for name in names if _is_held(cells[name])]
    return held or [name for name in names if cells[name] not in (None, "")] or names


def _is_held(value: Any) -> bool:
    """Whether a cell is more than a path: a picture, its bytes, a mapping or list of such."""
    return value is not None and not isinstance(value, str | int | float)


def _no_phrases(cells: Mapping[str, Any], names: list[str], instead: list[str]) -> list[str]:
    """Without cells of words, where there are others: some sets describe the picture in a column `input`."""
    paths = [
        name
        for name in names
        if not (isinstance(value := cells[name], str) and " " in value.strip() and not looks_like_picture(value))
    ]
    return paths if paths or instead else names


def looks_like_picture(value: Any) -> bool:
    """Whether a cell holds a picture, a path of one, or a list of such."""
    if isinstance(value, str):
        return value.rstrip(' "]').lower().endswith(IMAGES)
    if value is None or isinstance(value, int | float):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and looks_like_picture(value[0])
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    return callable(value) or isinstance(value, bytes | Image.Image)


def numbered(cells: Mapping[str, Any], column: str) -> list[str]:
    """`column` and those of its name with another number, as `source_1` and `source_2`: the filled, in their order."""
    found = [name for name in cells if _STEM.sub("", name) == _STEM.sub("", column) and _STEM.search(name)]
    filled = sorted((n for n in found if cells[n] not in (None, "")), key=lambda n: int(_STEM.search(n)[0]))  # type: ignore[index]
    return filled if column in found and filled else [column]


def _one(cells: Mapping[str, Any], names: list[str], what: str) -> str:
    """The one column; of several the only filled one. ValueError where several are filled."""
    filled = [name for name in names if cells[name] not in (None, "")] if len(names) > 1 else names
    if len(filled) < 2:
        return (filled or names)[0]
    listed = clipped(", ".join(filled), 120)
    if len({_STEM.sub("", name) for name in filled}) == 1:
        if what == "the source":
            return numbered(cells, filled[0])[0]
        raise ValueError(f"has several pictures as {what} ({listed}), and one is all there can be; keep one column")
    raise ValueError(
        f"has several columns that may be {what} ({listed}); name it in the recipe with "
        "columns: {source: …, target: …}"
    )


# -- cells ------------------------------------------------------------------------------------------------


def image_cells(value: Any, home: str) -> list[ImageSource]:
    """The pictures in a cell, each as `image_cell` reads it: of a list, or of a list in JSON, all in their order."""
    value = value() if callable(value) else value
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # a path
            value = json.loads(value)
    return [image_cell(one, home) for one in (value if isinstance(value, list | tuple) and value else [value])]


def image_cell(value: Any, home: str) -> ImageSource:
    """The picture in a cell, or its path below the folder `home`; ValueError, the end of a sentence, for neither.

    A path, a picture, its bytes, or a mapping of `bytes` and `path` as in published parquet files.
    """
    if isinstance(value, list | tuple) and not value:
        value = None
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image | bytes):
        return value
    if value is None or isinstance(value, str) and not value.strip():
        raise ValueError("is empty; write it or remove the row")
    if not isinstance(value, str) or value.startswith("data:"):
        raise ValueError(f"is {shown(value)}, not a path; write it or remove the row")
    if "://" in value:
        raise ValueError(f"is the web address {clipped(value, 80)}; download it and give its path")
    return Path(home, value.strip())


def shown(value: Any) -> str:
    """A cell in a message: short, and never a picture's bytes."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        return repr(clipped(value, 60))
    if isinstance(value, Mapping | list | tuple):
        kind = "a mapping" if isinstance(value, Mapping) else "a list"
        return f"{kind} of {len(value)}"
    return clipped(repr(value), 60)


def is_text(value: Any) -> bool:
    """Whether a cell is text that can be encoded: a lone surrogate, half a character, cannot."""
    if type(value) is not str:
        return False
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def no_column(names: Iterable[str], wanted: str, mapped: str = "") -> str:
    """The end of a sentence about a table or row: "has no column 'x'", and which it has."""
    names = [clipped(str(name), 30) for name in names][:12]
    if mapped:
        return f"has no column {wanted!r}, which columns.{mapped} names; it has: {', '.join(names) or 'none'}"
    hint = did_you_mean(wanted, names)
    return f"has no column {wanted!r}{hint.replace('did you mean', 'is it called').replace('known:', 'it has:')}"
