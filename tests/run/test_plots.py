"""Picture grids: every picture at its place, enlarged without smoothing, with labels that fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from danceopd.errors import UserError
from danceopd.run.plots import GAP, curves, grid, wrap

RED, BLUE = (200, 30, 30), (30, 30, 200)


def plain(colour: tuple[int, int, int], side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def area(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(pixels, left, top, width) of everything in exactly this colour."""
    found = np.all(np.asarray(image) == colour, axis=-1)
    rows, columns = np.nonzero(found)
    return int(found.sum()), int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1


def test_pictures_are_enlarged_by_whole_pixels_and_keep_their_order() -> None:
    image = grid([[plain(RED), plain(BLUE)]], scale=3)
    count, left, top, width = area(image, RED)
    assert (count, width) == (24 * 24, 24)
    assert area(image, BLUE) == (24 * 24, left + 24 + GAP, top, 24)
    assert {tuple(p) for p in np.asarray(image).reshape(-1, 3).tolist()} == {RED, BLUE, (255, 255, 255)}


def test_an_empty_place_stays_empty_and_short_rows_are_filled() -> None:
    image = grid([[None, plain(RED)], [plain(BLUE)]], scale=2)
    assert area(image, RED)[1] > area(image, BLUE)[1]
    assert area(image, RED)[2] < area(image, BLUE)[2]


def test_labels_are_wrapped_not_cut_off() -> None:
    words = "replace the leftmost purple star with a white circle below the diamond"
    lines = wrap(words, 120)
    assert len(lines) > 2 and " ".join(lines) == words
    assert "".join(wrap("x" * 60, 50)) == "x" * 60
    short, long = (grid([[plain(RED)]], row_labels=[text], column_labels=["a"]) for text in ("", words * 2))
    assert long.height > short.height and long.width > short.width


def test_other_modes_and_sizes_are_taken() -> None:
    image = grid([[Image.new("L", (8, 8), 7), plain(RED, 16)], [plain(BLUE, 4), None]], scale=1)
    assert area(image, (7, 7, 7))[0] == 64
    assert area(image, BLUE)[0] == 16


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rows": []}, "no picture"),
        ({"rows": [[None]]}, "no picture"),
        ({"rows": [[plain(RED)]], "scale": 0}, "0 times"),
        ({"rows": [[plain(RED)]], "row_labels": ["a", "b"]}, "1 rows and 2 row labels"),
        ({"rows": [[plain(RED)]], "column_labels": []}, "1 columns and 0 column labels"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(arguments: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        grid(**arguments)


def test_names_of_many_lines_stand_in_rows_inside_the_picture():
    few = Image.open(io.BytesIO(curves([0, 1], {"mean": [1.0, 2.0]})))
    names = [f"a teacher with a long name {n}" for n in range(7)]
    many = Image.open(io.BytesIO(curves([0, 1], {name: [1.0, 2.0] for name in names}))).convert("L")
    assert many.width == few.width and many.height > few.height
    edge = np.asarray(many)[:, -4:]
    assert edge.min() == edge.max()  # no name runs out
