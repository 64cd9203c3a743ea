"""`score_prompt` and `score_edit`: a task and an image go in, scores come out, by GenEval's and VIEScore's rules.

An image is read into a scene first (``read``); every score is then computed from facts about that scene, and each lost
point has a reason in words. An edit's O is ``sqrt(SC * PQ)`` with ``SC = min(success, over_editing)`` and
``PQ = min(naturalness, artifacts)``, all 0 to 10 and higher is better, as GEdit reports them. What an edit asked
for, and what it had to leave unchanged, is in ``facts``. These scores do not predict a GEdit score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from danceopd.worlds.scenes.edits import Edit
from danceopd.worlds.scenes.facts import Check, checks, edit_region, kept_things, overlap
from danceopd.worlds.scenes.grammar import Thing, a, relations
from danceopd.worlds.scenes.prompts import Prompt, plural
from danceopd.worlds.scenes.read import Reading, as_array, psnr, read, tier_of
from danceopd.worlds.scenes.render import render

UNREADABLE_PSNR = 18.0
"""Below this PSNR of the rendered scene, in dB, an image shows no scene."""
UNREADABLE_SHARE = 0.10
"""Above this share of unexplained pixels an image shows no scene."""
EXACT_PSNR = 25.0
"""``exact`` needs every check to hold and this PSNR of the rendered scene, in dB."""
UNEXPLAINED_SHARE = 0.05
"""Share of unexplained pixels at which the artifacts score reaches 0."""


@dataclass(frozen=True)
class PromptScore:
    """Whether an image shows what its prompt asks for, and if not, why not."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class EditScore:
    """An edit's scores, 0 to 10; ``target_psnr`` in dB, None where more than one target is right."""

    sc: float
    pq: float
    o: float
    success: float
    over_editing: float
    naturalness: float
    artifacts: float
    exact: bool
    target_psnr: float | None
    reasons: tuple[str, ...]

    @classmethod
    def of(
        cls, asked: Sequence[Check], kept: Sequence[Check], preserved: float, natural: float, stray: float,
        *, exact: bool, target_psnr: float | None, reasons: Sequence[str],
    ) -> EditScore:  # fmt: skip
        """From the checks, and three shares: of what was preserved, of natural pixels, of stray ones (0: none)."""
        met = all(check.holds for check in asked if check.primary)
        success = 10 * _share(asked) if met else 0.0
        over_editing = 10 * (_share(kept) + preserved) / 2
        naturalness, artifacts = 10 * natural, 10 * (1 - min(stray, 1.0))
        sc, pq = min(success, over_editing), min(naturalness, artifacts)
        o, said = float(np.sqrt(sc * pq)), tuple(dict.fromkeys(reasons))
        return cls(sc, pq, o, success, over_editing, naturalness, artifacts, exact, target_psnr, said)


def unreadable(reading: Reading) -> str | None:
    """Why a reading shows no scene, or None when it shows one."""
    if reading.psnr < UNREADABLE_PSNR:
        return f"the image is not a readable scene ({reading.psnr:.1f} dB, {UNREADABLE_PSNR:g} needed)"
    if reading.unexplained > UNREADABLE_SHARE:
        return f"{reading.unexplained:.0%} of the image is not a readable scene"
    return None


def _describe(number: int, shape: str, colour: str | None = None) -> str:
    name = f"{colour} {shape}" if colour else shape
    return f"no {name}" if number == 0 else a(name) if number == 1 else f"{number} {plural(name)}"


def judge(prompt: Prompt, things: Sequence[Thing]) -> PromptScore:
    """GenEval's checker on the things of a scene: every ``include`` must hold, no ``exclude`` may be reached."""
    matched: list[list[Thing]] = []
    reasons: list[str] = []
    for wanted in prompt.include:
        shape, number, colour = wanted["class"], wanted["count"], wanted.get("color")
        same = [t for t in things if t.shape == shape]
        found = [t for t in same if colour is None or t.colour == colour]
        if len(found) < number:
            seen = ", ".join(sorted({t.colour for t in same}))
            but = f": the {shape} is {seen}" if same and colour else ""
            wanted_text, found_text = _describe(number, shape, colour), _describe(len(found), shape, colour)
            reasons.append(f"{wanted_text} expected, {found_text} found{but}")
        elif "position" in wanted:
            relation, target = wanted["position"]
            others = matched[target]
            found = [t for t in found if all(relation in relations(t, other) for other in others)]
            if others and len(found) < number:
                reasons.append(f"the {shape} is not {relation} the {others[0].shape}")
        matched.append(found)
    for unwanted in prompt.exclude:
        shape, number = unwanted["class"], unwanted["count"]
        many = sum(t.shape == shape for t in things)
        if many >= number:
            reasons.append(f"{_describe(many, shape)} found, fewer than {number} expected")
    return PromptScore(not reasons, "; ".join(reasons))


def score_prompt(prompt: Prompt, image: Any) -> PromptScore:
    """Check an image (PIL, uint8 (64, 64, 3), or ``Reading``) against a prompt's record."""
    reading = read(image, tier_of(prompt.scene))
    fault = unreadable(reading)
    return PromptScore(False, fault) if fault else judge(prompt, reading.scene.things)


def _ramp(decibels: float) -> float:
    """0 at 15 dB and below, 1 at 30 dB and above."""
    return float(np.clip((decibels - 15) / 15, 0, 1))


def _preserved(edit: Edit, reading: Reading, source: np.ndarray) -> tuple[float, str | None]:
    """The share P in [0, 1] of the picture that did not change, and a reason when it is low."""
    if edit.group == "local":
        decibels = psnr(reading.image, source, ~edit_region(edit, reading.scene))
        share = _ramp(decibels)
        return share, f"the rest of the picture changed ({decibels:.1f} dB)" if share < 0.5 else None
    kept = kept_things(edit)
    if not kept:
        return 1.0, None
    share = float(np.mean([overlap(thing, reading.scene.things) for thing in kept]))
    return share, f"the layout changed (overlap {share:.2f})" if share < 0.5 else None


def score_edit(edit: Edit, image: Any, source_image: Any = None) -> EditScore:
    """Score an edited image (PIL, uint8 (64, 64, 3), or ``Reading``).

    ``source_image`` is what the editor was given; the drawn source scene when None.
    """
    reading = read(image, tier_of(edit.source))
    source = render(edit.source) if source_image is None else as_array(source_image)
    asked, kept = checks(edit, reading.scene)
    preserved, change = _preserved(edit, reading, source)
    fault = unreadable(reading)
    failed = [check.reason for check in (*asked, *kept) if not check.holds]
    reasons = [fault] if fault else failed + ([change] if change else [])
    return EditScore.of(
        asked, kept, preserved, _ramp(reading.psnr), reading.unexplained / UNEXPLAINED_SHARE,
        exact=not failed and reading.psnr >= EXACT_PSNR,
        target_psnr=None if _adds(edit) else psnr(reading.image, render(edit.target)), reasons=reasons,
    )  # fmt: skip


def _share(done: Sequence[Check]) -> float:
    return sum(check.holds for check in done) / len(done) if done else 1.0


def _adds(edit: Edit) -> bool:
    return "subject-add" in (edit.task_type, edit.goal.get("first", ("",))[0])
