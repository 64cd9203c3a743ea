"""The vocabulary of the drawings: 43 classes, ten colours, backgrounds and styles, and the words for them.

A class has a COCO name (GenEval's vocabulary), the code point of one drawing, and the fills of its body: the part that
a colour word describes. Recolouring swaps the body's fills in the drawing's colour layers for those of another colour,
so a red car is a drawing and not a filter. All fills are of OpenMoji's palette.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One class: its name, its drawing's file name, and the fills (#rrggbb) of the body and of the body's shade."""

    name: str
    file: str
    body: str
    shade: tuple[str, ...] = ()


def _kinds(text: str) -> tuple[Kind, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(Kind(r[0].replace("_", " "), r[1], f"#{r[2]}", tuple(f"#{s}" for s in r[3:])) for r in rows)


KINDS = _kinds("""
car            1F697 ea5a47
motorcycle     1F3CD ea5a47 d22f27
airplane       2708  d0cfce 9b9b9a
bus            1F68C ea5a47
train          1F686 d0cfce
truck          1F6FB d22f27
traffic_light  1F6A6 d0cfce
bird           1F426 a57939 6a462f
cat            1F408 f4aa41 e27022
dog            1F415 f4aa41 e27022
horse          1F40E a57939 6a462f
sheep          1F411 ffffff d0cfce
cow            1F404 a57939 6a462f
elephant       1F418 9b9b9a 3f3f3f
bear           1F43B 6a462f a57939
giraffe        1F992 f4aa41
backpack       1F392 ea5a47 d22f27
umbrella       2602  b399c8 8967aa
handbag        1F45C 6a462f
suitcase       1F9F3 a57939 6a462f
kite           1FA81 ffa7c0 e67a94
bottle         E0CB  92d3f5 61b2e4
wine_glass     1F377 ea5a47 d22f27
cup            2615  ffffff d0cfce
banana         1F34C f1b31c fcea2b
apple          1F34E ea5a47 d22f27
sandwich       1F96A f4aa41
broccoli       1F966 5c9e31 b1cc33
carrot         1F955 f4aa41 e27022
pizza          1F355 fcea2b
donut          1F369 f1b31c fcea2b
cake           1F382 fcea2b
chair          1FA91 fcea2b f1b31c
couch          1F6CB 92d3f5 61b2e4
bed            1F6CF 92d3f5
toilet         1F6BD d0cfce 9b9b9a
tv             1F4FA 9b9b9a
laptop         1F4BB 9b9b9a
cell_phone     1F4F1 9b9b9a
book           1F4D5 d22f27
clock          23F0  ffffff d0cfce
vase           1F3FA f4aa41 e27022
teddy_bear     1F9F8 a57939 6a462f
""")
"""The 43 classes of the suite."""

COLOURS = {
    "red": ("#d22f27", "#781e32"),
    "orange": ("#f4aa41", "#e27022"),
    "yellow": ("#fcea2b", "#f1b31c"),
    "green": ("#5c9e31", "#186648"),
    "blue": ("#61b2e4", "#1e50a0"),
    "purple": ("#8967aa", "#b399c8"),
    "pink": ("#ffa7c0", "#e67a94"),
    "brown": ("#a57939", "#6a462f"),
    "black": ("#3f3f3f", "#000000"),
    "white": ("#ffffff", "#d0cfce"),
}
"""GenEval's ten colours -> the fills of a body and of its shade."""
ALIKE = {
    "red": ("#ea5a47", "#b01010", "#ff0000"),
    "orange": ("#e27022", "#ff8c00"),
    "yellow": ("#f1d000", "#ffff00"),
    "green": ("#b1cc33", "#186648", "#00a000"),
    "blue": ("#1e50a0", "#92d3f5", "#0000ff", "#1f35c8", "#4169e1", "#000080"),
    "purple": ("#b399c8", "#6a0dad"),
    "pink": ("#e67a94", "#ff69b4"),
    "brown": ("#6a462f", "#8b5a2b"),
    "black": ("#000000",),
    "white": ("#e6e6e6",),
}
"""Further colours that a word names: a painted colour gets the word of the closest colour."""

BACKGROUNDS = {
    "white": "a plain white background",
    "pink": "a plain pink background",
    "sky": "a blue sky",
    "meadow": "a green meadow under a blue sky",
    "beach": "a sandy beach by the sea",
    "night": "a night sky with stars",
}
"""Backgrounds, and their words in an instruction."""

PLAIN = "plain"
STYLES = {
    PLAIN: "a flat drawing with black outlines",
    "line drawing": "a black line drawing on white paper",
    "blueprint": "a blueprint with white lines on blue paper",
    "no outlines": "a flat drawing without outlines",
    "pixel art": "pixel art of 64 by 64 blocks",
    "negative": "a negative with inverted colours",
    "grayscale": "a grayscale picture",
}
"""Styles, and their words in an instruction. Sources are drawn in the first."""
LINES = ("line drawing", "blueprint")
"""Styles that show neither colours nor the background."""
COLOURLESS = (*LINES, "grayscale")
"""Styles that show no colours."""


def plural(name: str) -> str:
    """``cars``, ``buses``, ``sheep``."""
    if name == "sheep":
        return name
    return name + ("es" if name.endswith(("s", "ch")) else "s")


def rgb(fill: str) -> tuple[int, int, int]:
    """``#rrggbb`` as three whole numbers."""
    return int(fill[1:3], 16), int(fill[3:5], 16), int(fill[5:7], 16)
