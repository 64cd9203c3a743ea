"""Where the work comes from: prompts for generation, instructions with a source image for editing.

A source is "scenes" (the exact world; "scenes:local", "scenes:counting,position" for some of its tasks), a
.txt (a prompt a line), a .csv, .jsonl or .parquet with named columns, or a folder of images with same-named
.txt files. Everything is looked at before anything is trained, and a fault names its file and line.
Images are opened one at a time, when they are encoded: a big dataset never sits in memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError
from .sentences import nearest

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".jsonl", ".parquet")
SMALLEST = 64
PROMPT, INSTRUCTION, SOURCE = ("prompt", "caption", "text"), ("instruction", "prompt"), ("image", "source")

Source = Image.Image | Path
Row = tuple[str, dict[str, Any]]


def prompts_from(spec: str | Path, rows: int = 1024, seed: int = 0) -> list[str]:
    """The prompts of a source; `rows` of them from "scenes", every one of a file's."""
    if _is_scenes(spec):
        from .scenes.prompts import TAGS, prompts

        tags = _only(spec, {tag: (tag,) for tag in TAGS})
        return [p.prompt for p in prompts("train", rows, seed, tags)]
    path = _existing(spec)
    if path.is_dir():
        found = [(str(file), {"prompt": _read(file)}) for file in sorted(path.glob("*.txt"))]
    elif path.suffix.lower() == ".txt":
        lines = _read(path).splitlines()
        found = [(f"{path}, line {n}", {"prompt": line}) for n, line in enumerate(lines, 1)]
        while found and not found[-1][1]["prompt"].strip():
            found.pop()
    else:
        found = list(_table(path))
    _refuse_empty(found, path)
    return [_words(where, row, PROMPT) for where, row in found]


def edits_from(spec: str | Path, rows: int = 1024, seed: int = 0) -> list[tuple[str, Source]]:
    """(instruction, source image or its path) pairs of a source; paths are checked, not yet read in full."""
    if _is_scenes(spec):
        from .scenes.edits import TASKS, edits, group_of
        from .scenes.render import render

        known = {task: (task,) for task in TASKS}
        for task in TASKS:
            known[group_of(task)] = (*known.get(group_of(task), ()), task)
        drawn = edits("train", rows, seed, _only(spec, known))
        return [(edit.instruction, Image.fromarray(render(edit.source))) for edit in drawn]
    path = _existing(spec)
    if path.is_dir():
        found = list(_folder(path))
    elif path.suffix.lower() == ".txt":
        raise UserError(f"{path} holds prompts only; edits need a source image each: give a .csv, .jsonl or folder")
    else:
        found = list(_table(path))
    _refuse_empty(found, path)
    pairs: list[tuple[str, Source]] = []
    for where, row in found:
        instruction = _words(where, row, INSTRUCTION)
        image = path.parent / _words(where, row, SOURCE)
        with _look(image, where):
            pairs.append((instruction, image))
    return pairs


def open_image(source: Source, where: str = "") -> Image.Image:
    """The picture in RGB, upright; refuses what is not an image, is smaller than 64 pixels, or has alpha."""
    if isinstance(source, Image.Image):
        return _checked(source, where or "the source image").convert("RGB")
    with _look(source, where) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{_at(where)}{source} is a damaged image ({error}); replace it") from None


def _look(path: Path, where: str = "") -> Image.Image:
    """The image file, opened and checked by its header."""
    if not path.exists():
        raise UserError(f"{_at(where)}image {path} does not exist; check the path")
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, Image.DecompressionBombError, IsADirectoryError, SyntaxError, ValueError):
        raise UserError(f"{_at(where)}{path} is not an image; give a PNG, JPEG or WebP file") from None
    except OSError as error:
        raise UserError(f"{_at(where)}image {path} cannot be read: {error.strerror or error}") from None
    return _checked(image, f"{_at(where)}{path}")


def _checked(image: Image.Image, where: str) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        raise UserError(f"{where} has an alpha channel, which no model here reads; flatten it onto a background")
    if min(image.size) < SMALLEST:
        raise UserError(
            f"{where} is {image.width}x{image.height} pixels, too small; give at least {SMALLEST}x{SMALLEST}"
        )
    return image


# -- the exact world ------------------------------------------------------------------------------------


def _is_scenes(spec: str | Path) -> bool:
    return str(spec) == "scenes" or str(spec).startswith("scenes:")


def _only(spec: str | Path, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The tasks that `scenes:a,b` names; None for all of them."""
    _, _, names = str(spec).partition(":")
    if not names:
        return None
    chosen: tuple[str, ...] = ()
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            raise UserError(f"data source {str(spec)!r} names the task {name!r}, which is none{nearest(name, known)}")
        chosen += known[name]
    return chosen


# -- files ----------------------------------------------------------------------------------------------


def _existing(spec: str | Path) -> Path:
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"data source {str(spec)!r} does not exist; give \"scenes\", a file or a folder")
    if path.is_file() and path.suffix.lower() not in (".txt", *TABLES):
        raise UserError(f"data source {path} is of an unknown kind; give .txt, {', '.join(TABLES)} or a folder")
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _table(path: Path) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind == ".csv":
        reader = csv.DictReader(_read(path).splitlines(keepends=True), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise UserError(f"{path}, line {reader.line_num} has more fields than the header; quote commas")
                yield f"{path}, line {reader.line_num}", dict(row)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}; mend that line") from None
    elif kind == ".jsonl":
        for number, line in enumerate(_read(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON: {error}; mend that line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object; write one {{...}} a line")
            yield where, row
    else:
        yield from _parquet(path)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; `pip install pyarrow`, or give a .csv or .jsonl") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _folder(path: Path) -> Iterator[Row]:
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
    for image in images:
        words = image.with_suffix(".txt")
        if not words.exists():
            raise UserError(f"{image} has no instruction; write it into {words}")
        yield str(words), {"instruction": _read(words), "image": str(image.absolute())}
    alone = {p.stem for p in path.glob("*.txt")} - {p.stem for p in images}
    if alone:
        raise UserError(f"{path / min(alone)}.txt has no image of the same name; add it or remove the text")


def _refuse_empty(rows: list[Row], path: Path) -> None:
    if not rows:
        raise UserError(f"data source {path} has no rows; add some")


def _words(where: str, row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """The text in the first of `columns` that the row has."""
    column = next((c for c in columns if c in row), None)
    if column is None:
        known = [str(k) for k in row]
        wanted = nearest(columns[0], known).replace("did you mean", "is it called").replace("known:", "it has:")
        raise UserError(f"{where} has no column {columns[0]!r}{wanted}")
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} is {value!r}, not text; mend that row")
    if not value.strip():
        raise UserError(f"{where}: {column} is empty; write it or remove the row")
    return value.strip()


def _at(where: str) -> str:
    return f"{where}: " if where else ""
