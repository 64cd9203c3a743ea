"""Picture grids with captions: rows of small images as one image, for samples, the model card and the report.

`grid` lays pictures out in a table with a label per row and per column, enlarged by whole numbers without
smoothing so that every pixel of a small model stays visible, and captioned in Pillow's own font at a readable
size. An empty place (`None`) stays empty. Pictures of unequal size are centred in their column.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from danceopd.errors import UserError

PAPER, INK = (255, 255, 255), (28, 28, 32)
FONT_SIZE = 13
GAP = 6
LABEL_WIDTH = 190
"""Row labels are wrapped to this many pixels."""


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, font) -> int:
    return int(font.getlength(text) + 0.999)


def _cut(word: str, width: int, font) -> list[str]:
    """A word in pieces no wider than `width`."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and _width(pieces[-1] + letter, font) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def wrap(text: str, width: int, size: int = FONT_SIZE) -> list[str]:
    """The text in lines that fit into `width` pixels; words too long for a line are cut."""
    font = _font(size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in (piece for w in paragraph.split() for piece in _cut(w, width, font)):
            longer = f"{line} {word}".strip()
            if line and _width(longer, font) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def _text(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], size: int) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * (size + 4)), line, fill=INK, font=_font(size))


def _block(lines: list[str], size: int) -> int:
    return len(lines) * (size + 4)


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    scale: int = 2,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """One RGB picture of all pictures, row by row, enlarged `scale` times.

    Rows may be of unequal length. Labels are wrapped, never cut off. Raises UserError for no picture at all,
    a scale below 1, or a number of labels that does not match.
    """
    columns = max((len(row) for row in rows), default=0)
    if not any(image is not None for row in rows for image in row):
        raise UserError("The picture grid has no picture in it; give at least one row with one image.")
    if scale < 1:
        raise UserError(f"A picture grid cannot be enlarged {scale} times; give a scale of 1 or more.")
    for labels, count, what in ((row_labels, len(rows), "row"), (column_labels, columns, "column")):
        if labels is not None and len(labels) != count:
            raise UserError(f"The picture grid has {count} {what}s and {len(labels)} {what} labels; give one for each.")
    filled = [list(row) + [None] * (columns - len(row)) for row in rows]
    widths = [max((i.width * scale for i in column if i is not None), default=64 * scale) for column in zip(*filled)]
    heads = [wrap(text, width, font_size) for text, width in zip(column_labels or [""] * columns, widths)]
    names = [wrap(text, LABEL_WIDTH, font_size) for text in row_labels or [""] * len(rows)]
    left = max((_width(line, _font(font_size)) for name in names for line in name), default=0)
    left = left + 2 * GAP if left else GAP
    top = GAP + (max(_block(h, font_size) for h in heads) if column_labels else 0)
    heights = [
        max([_block(name, font_size) if row_labels else 0] + [i.height * scale for i in row if i is not None])
        for row, name in zip(filled, names)
    ]

    paper = Image.new("RGB", (left + sum(w + GAP for w in widths), top + sum(h + GAP for h in heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    x = left
    for head, width in zip(heads, widths):
        _text(draw, x, GAP // 2, head if column_labels else [], font_size)
        x += width + GAP
    y = top
    for row, name, height in zip(filled, names, heights):
        if row_labels:
            _text(draw, GAP, y + max(0, (height - _block(name, font_size)) // 2), name, font_size)
        x = left
        for image, width in zip(row, widths):
            if image is not None:
                big = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
                paper.paste(big, (x + (width - big.width) // 2, y + (height - big.height) // 2))
            x += width + GAP
        y += height + GAP
    return paper
