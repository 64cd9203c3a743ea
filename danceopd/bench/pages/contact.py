"""`contact.png`: the best, a typical and the worst item of each capability, a column for each model, with labels.

The same items as on the report's first tab. Small pictures are enlarged by whole numbers, large ones are shrunk; every
picture has its score below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from danceopd.bench.report import facts
from danceopd.bench.report.verdict import verdict_of
from danceopd.common.files import disk_errors, inside, partial_path
from danceopd.run.plots import INK, PAPER, grid, wrap

SIDE, STRIP, FONT = 192, 22, 15
MARGIN = 12
NAME = "contact.png"


def contact_sheet(
    folder: Path, scores: Mapping[str, Any], picked: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]
) -> Image.Image | None:
    """The sheet of `report.items.highlights`, an RGB image; None where nothing was picked or no picture is there."""
    models = [m for m in scores["models"] if any(m["name"] in i["cells"] for f in picked.values() for _, i in f)]
    given = any(item["source"] for found in picked.values() for _, item in found)
    rows, labels = [], []
    for capability, found in picked.items():
        share = facts.is_share(scores, capability)
        for word, item in found:
            sources = [_cell(folder, item["source"], "")] if given else []
            cells = [item["cells"].get(model["name"]) for model in models]
            shown = [_cell(folder, cell["image"], _score(cell, share)) if cell else None for cell in cells]
            rows.append([*(sources if item["source"] else [None] * given), *shown])
            prompt = str(item["prompt"])
            labels.append(f"{word}, {item['category']}:\n{_plain(prompt if _plain(prompt) == prompt else item['key'])}")
    if not any(picture is not None for row in rows for picture in row):
        return None
    heads = [*(["source"] if given else []), *(_plain(m["label"]) for m in models)]
    table = grid(rows, [_short(label) for label in labels], [_short(h, 36) for h in heads], scale=1, font_size=FONT)
    suite, told = scores["suite"], verdict_of(scores)["sentence"]
    title = f"{_plain(facts.student_of(scores)['label'])} on {suite['name']} {suite['version']}"
    lines = wrap(_plain(told), table.width - 2 * MARGIN, FONT)
    top = MARGIN + 30 + len(lines) * (FONT + 5) + 8
    sheet = Image.new("RGB", (table.width + MARGIN, table.height + top + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=ImageFont.load_default(22))
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 30 + number * (FONT + 5)), line, fill=INK, font=ImageFont.load_default(FONT))
    sheet.paste(table, (MARGIN // 2, top))
    return sheet


def write_contact_sheet(folder: Path, scores: Mapping[str, Any], picked: Mapping[str, Any]) -> Path | None:
    """Write `contact.png` into a bench's folder; None, and no file, where there is nothing to show."""
    path, sheet = folder / NAME, contact_sheet(folder, scores, picked)
    with disk_errors(path):
        if sheet is None:
            path.unlink(missing_ok=True)
            return None
        part = partial_path(path)
        sheet.save(part, format="PNG", optimize=True)
        part.replace(path)
    return path


def _cell(folder: Path, path: str | None, note: str) -> Image.Image | None:
    """A picture of `SIDE` pixels with a strip for its score below; None for one that is not there."""
    file = inside(folder, path) if path else None
    if file is None:
        return None
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))
            image = opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    times = SIDE // max(image.size)
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (SIDE, SIDE + STRIP), PAPER)
    cell.paste(image, ((SIDE - image.width) // 2, SIDE - image.height))
    ImageDraw.Draw(cell).text((2, SIDE + 2), note, fill=INK, font=ImageFont.load_default(FONT))
    return cell


def _score(cell: Mapping[str, Any], share: bool) -> str:
    if cell["status"] != "ok":
        return str(cell["status"])
    return ("right" if cell["correct"] else "wrong") if share else _plain(facts.number(cell["score"]))


def _plain(text: str) -> str:
    """The text in letters that Pillow's own font has; others become question marks."""
    table = str.maketrans({"−": "-", "–": "-", "…": "...", "’": "'", "“": '"', "”": '"'})
    return text.translate(table).encode("latin-1", "replace").decode("latin-1")


def _short(text: str, length: int = 150) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
