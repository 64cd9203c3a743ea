"""`score_prompt` and `score_edit`: a task and a read picture go in, scores come out, by GenEval's and VIEScore's rules.

A picture is read into a scene (`read`), what was asked and what had to stay are facts about it (`scenes.facts`), and
O = sqrt(SC * PQ) with SC = min(success, over-editing) and PQ = min(naturalness, artifacts), 0 to 10 each, as in
`danceopd.worlds.scenes`. Beyond the tolerances of the reader, preservation ignores a shift of the whole picture by one
pixel of 128, naturalness reaches 10 at `NATURAL` dB, and a picture is preserved fully at `PRESERVED` dB.

Measured on the suite's drawings: the target of every item 10 and a copy of every source 0; mean O of 18 targets after
JPEG of quality 30 10.0, noise of 0.1 10.0, half the size 10.0, a blur of 2 pixels of 512 9.6 and of 5 7.0, a shift of
4 pixels 9.2 and of 10 5.7, a zoom of 1.6 % 8.5; halfway between source and target 4.7. Another artist's drawing of a
thing is recognised in two cases of five (84 drawings of another emoji set, 43 classes), so a model with its own style
of drawing scores too low: compare models with each other, not with 10.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.kinds import LINES
from danceopd.worlds.openmoji.read import SIDE, UNKNOWN, Reader, Reading
from danceopd.worlds.openmoji.render import as_array, compose, cover, shrunk, widest
from danceopd.worlds.scenes.edits import Edit
from danceopd.worlds.scenes.facts import Check, checks
from danceopd.worlds.scenes.grammar import IMAGE, Scene, Thing
from danceopd.worlds.scenes.prompts import Prompt
from danceopd.worlds.scenes.score import EditScore, PromptScore, judge

NATURAL = (14.0, 26.0)
"""PSNR of the rendered scene, in dB, at which naturalness is 0 and 10."""
PRESERVED = (15.0, 30.0)
"""PSNR to the source outside the edit, in dB, at which nothing and everything was preserved."""
STRAY_SHARE = 0.05
"""Share of unexplained pixels at which the artifacts score reaches 0."""
UNREADABLE = 0.25
"""Above this share of unexplained pixels a picture is not one of these drawings."""
EXACT = 25.0
"""``exact`` needs every check to hold and this PSNR of the rendered scene, in dB."""
ROOM = 2.0
"""Margin around what an edit touches in which it may change pixels, in units of 64."""
READ = SIDE // 2
"""Pixels a side at which pictures are compared."""


def touched(edit: Edit) -> Thing | None:
    """The source's thing that the edit is about, or None."""
    index = edit.goal.get("index")
    return None if index is None else edit.source.things[index]


def read_edit(reader: Reader, edit: Edit, image: Any) -> Reading:
    """Read an edited picture, given which things should be unchanged and where one may have gone."""
    about = touched(edit)
    keeps = edit.task_type == "color_alter"
    still = [thing for thing in edit.source.things if thing is not about or keeps]
    reading = reader.read(image, still, () if about is None or keeps else (about,), edit.target.style)
    if reading.scene.style in LINES:  # which hide the background
        return replace(reading, scene=replace(reading.scene, background=edit.source.background))
    return reading


def editable(edit: Edit, drawings: Drawings, side: int) -> np.ndarray:
    """Where an edit may change pixels: (side, side) bool.

    The things that it touches or brings with `ROOM` around them; for a new thing all that lies on the side of its
    anchor, or in the quarter, that was asked for, less the other things; for a background all but the things' insides.
    """
    source, target = edit.source, edit.target
    if edit.task_type == "style_change":
        return np.ones((side, side), bool)
    if edit.task_type == "background_change":
        return widest(~cover(source.things, drawings, side), 2 * side // READ)
    if edit.task_type == "subject-add":
        free = _side(edit, side) & ~cover(source.things, drawings, side)
        return free | cover(target.things[-1:], drawings, side, ROOM)
    new = [thing for thing in target.things if thing not in source.things]
    old = [thing for thing in source.things if thing not in target.things]
    return cover((*old, *new), drawings, side, ROOM)


def _side(edit: Edit, side: int) -> np.ndarray:
    """Where the instruction allows a new thing."""
    at = (np.arange(side) + 0.5) * IMAGE / side
    x, y = np.broadcast_to(at, (side, side)), np.broadcast_to(at[:, None], (side, side))
    goal = edit.goal
    if "corner" in goal:
        down, across = goal["corner"].split()
        return ((y < IMAGE / 2) == (down == "top")) & ((x < IMAGE / 2) == (across == "left"))
    anchor = edit.source.things[goal["anchor"]]
    return {
        "left of": x < anchor.x,
        "right of": x > anchor.x,
        "above": y < anchor.y,
        "below": y > anchor.y,
    }[goal["relation"]]


def score_prompt(prompt: Prompt, reading: Reading) -> PromptScore:
    """Check a reading against a prompt's record."""
    if reading.unexplained > UNREADABLE:
        return PromptScore(False, f"{reading.unexplained:.0%} of the picture resembles no drawing")
    return judge(prompt, reading.scene.things)


def score_edit(edit: Edit, reading: Reading, drawings: Drawings, source_image: Any = None) -> EditScore:
    """Score the reading of an edited picture (`read_edit`); ``source_image`` is what the editor was given, the drawn
    source when None."""
    source = compose(edit.source, drawings, SIDE) if source_image is None else as_array(source_image, SIDE)
    asked, kept = checks(edit, reading.scene)
    if edit.task_type == "subject-remove":
        asked.append(_cleared(edit, reading, drawings))
    preserved, change = _preserved(edit, reading, drawings, shrunk(source, SIDE // READ))
    failed = [check.reason for check in (*asked, *kept) if not check.holds]
    target = shrunk(compose(edit.target, drawings, SIDE), SIDE // READ)
    return EditScore.of(
        asked, kept, preserved, _ramp(reading.psnr, NATURAL), reading.unexplained / STRAY_SHARE,
        exact=not failed and reading.psnr >= EXACT,
        target_psnr=None if edit.task_type == "subject-add" else _psnr(reading.picture, target),
        reasons=failed + ([change] if change else []),
    )  # fmt: skip


def _cleared(edit: Edit, reading: Reading, drawings: Drawings) -> Check:
    """Whether the background shows where the removed thing was: a ghost or a blot is no removal."""
    old = touched(edit)
    assert old is not None
    mask = cover((old,), drawings, READ)
    ground = shrunk(compose(edit.target, drawings, SIDE), SIDE // READ)
    away = np.abs(reading.picture - ground).max(-1)[mask]
    return Check(float((away > 0.2).mean()) < 0.15, f"traces of the {old.shape} are left", True)


def _preserved(
    edit: Edit, reading: Reading, drawings: Drawings, source: np.ndarray
) -> tuple[float, str | None]:
    """The share in [0, 1] of the picture that did not change, and a reason when it is low.

    Local edits and backgrounds: PSNR to the source where nothing may change, the things' insides for a background.
    Styles: how much of each thing's square lies where it lay.
    """
    if edit.task_type == "style_change":
        overlaps = [max([_overlap(old, new) for new in reading.found], default=0.0) for old in edit.source.things]
        share = float(np.mean(overlaps))
        share = min(share / 0.9, 1.0)  # a square read to a pixel or two
        return share, f"the layout changed (overlap {share:.2f})" if share < 0.5 else None
    keep = ~editable(edit, drawings, READ)
    if edit.task_type == "subject-add":
        extra = tuple(t for t in reading.found if t.shape == edit.goal["shape"] and not _stood(t, edit.source))
        keep = ~cover((*edit.target.things[-1:], *extra[:1]), drawings, READ, ROOM)
    best = 0.0
    for down, across in np.ndindex(3, 3):
        moved = np.roll(reading.picture, (down - 1, across - 1), (0, 1))
        inside = keep.copy()
        inside[[0, -1]] = inside[:, [0, -1]] = False
        if inside.any():
            best = max(best, _psnr(moved[inside], source[inside]))
    share = _ramp(best, PRESERVED)
    return share, f"the rest of the picture changed ({best:.1f} dB)" if share < 0.5 else None


def _stood(thing: Thing, source: Scene) -> bool:
    return any(max(abs(thing.x - t.x), abs(thing.y - t.y)) < t.size for t in source.things)


def _overlap(one: Thing, other: Thing) -> float:
    """Intersection over union of two things' squares; 0 for what resembles no drawing."""
    if other.shape == UNKNOWN:
        return 0.0
    wide = min(one.x + one.size, other.x + other.size) - max(one.x - one.size, other.x - other.size)
    high = min(one.y + one.size, other.y + other.size) - max(one.y - one.size, other.y - other.size)
    both = max(wide, 0) * max(high, 0)
    return both / (4 * one.size**2 + 4 * other.size**2 - both)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(max(float(((one - other) ** 2).mean()), 1e-10)))


def _ramp(value: float, ends: tuple[float, float]) -> float:
    return float(np.clip((value - ends[0]) / (ends[1] - ends[0]), 0, 1))
