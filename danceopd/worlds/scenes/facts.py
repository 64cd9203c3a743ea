"""`checks`: an edit and the scene read from its result go in, facts with true or false come out.

One list holds what the edit asked for, the other what it had to leave unchanged. Things of the source and of the
outcome are matched by place first and by look second. Each goal has a primary check, without which the edit counts as
not done, and may have more; a compound edit has two primary checks. To be kept are each untouched thing (one check: its
class, colour, place and size), the number of things, the background and the style. `edit_region` is where an edit may
change the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danceopd.worlds.scenes.edits import Edit
from danceopd.worlds.scenes.grammar import IMAGE, SIZES, Scene, Thing, a, corner_of, relations
from danceopd.worlds.scenes.render import object_mask

NEAR = 2.0
"""Two things are at one place when their centres differ by at most this many pixels on each axis."""
STILL = 1.0
"""An untouched thing has kept its place when its centre moved by at most this many pixels on each axis."""
MARGIN = 3
"""By how many pixels the region of an edit reaches beyond the things that it touches."""


@dataclass(frozen=True)
class Check:
    """One fact: whether it holds, and what to say when it does not."""

    holds: bool
    reason: str
    primary: bool = False


def name(thing: Thing) -> str:
    """``red circle``."""
    return f"{thing.colour} {thing.shape}"


def _apart(one: Thing, other: Thing) -> float:
    return max(abs(one.x - other.x), abs(one.y - other.y))


def _look(thing: Thing) -> tuple[str, str]:
    return thing.shape, thing.colour


def matches(source: Sequence[Thing], outcome: Sequence[Thing]) -> tuple[list[Thing | None], list[Thing]]:
    """For each source thing the outcome's thing at its place, or else its look elsewhere, or None; and the rest."""
    left = list(outcome)
    pairs: list[Thing | None] = [None] * len(source)
    for index, thing in enumerate(source):
        here = min(left, key=lambda t: _apart(t, thing), default=None)
        if here is not None and _apart(here, thing) <= NEAR:
            pairs[index] = here
            left.remove(here)
    for index, thing in enumerate(source):
        if pairs[index] is None:
            moved = next((t for t in left if _look(t) == _look(thing)), None)
            if moved is not None:
                pairs[index] = moved
                left.remove(moved)
    return pairs, left


def touched(edit: Edit) -> int | None:
    """The index of the source thing that the edit is about, or None."""
    goal = edit.goal.get("first", (None, edit.goal))[1]
    return goal.get("index")


def local_task(edit: Edit) -> str:
    """The edit's task; of a compound edit its first one."""
    return edit.goal["first"][0] if edit.task_type == "compound" else edit.task_type


def kept_things(edit: Edit) -> list[Thing]:
    """The source things whose outline must stay where it is."""
    index = touched(edit)
    recoloured = local_task(edit) == "color_alter"
    return [t for i, t in enumerate(edit.source.things) if i != index or recoloured]


def _at(place: Thing, things: Sequence[Thing]) -> Thing | None:
    """The thing at a place, or None."""
    here = min(things, key=lambda t: _apart(t, place), default=None)
    return here if here is not None and _apart(here, place) <= NEAR else None


def _goal_checks(task: str, goal: dict, source: Scene, outcome: Scene) -> list[Check]:
    """The checks of one task's goal, the primary one first."""
    if task == "background_change":
        wanted = goal["background"]
        reason = f"the background is {outcome.background}, not {wanted}"
        return [Check(outcome.background == wanted, reason, True)]
    if task == "style_change":
        wanted = goal["style"]
        return [Check(outcome.style == wanted, f"the style is {outcome.style}, not {wanted}", True)]
    if task == "subject-add":
        return _added(goal, source, outcome)
    old = source.things[goal["index"]]
    new = _at(old, outcome.things)
    if task == "subject-remove":
        same = sum(_look(t) == _look(old) for t in outcome.things)
        before = sum(_look(t) == _look(old) for t in source.things)
        if new is None:
            there = ""
        elif _look(new) == _look(old):
            there = f"the {name(old)} is still there"
        else:
            there = f"the {name(old)} became {a(name(new))} instead of going"
        return [
            Check(new is None, there, True),
            Check(new is not None or same < before, f"the {name(old)} moved elsewhere instead of going"),
        ]
    shape, colour = goal.get("shape"), goal.get("colour")
    if new is None:
        # One reason is enough: nothing is where the thing was.
        gone = f"the {name(old)} is gone"
        return [Check(False, gone, True), Check(False, gone)]
    if task == "color_alter":
        return [
            Check(new.colour == colour, f"the {old.shape} is {new.colour}, not {colour}", True),
            Check(new.shape == old.shape, f"the {old.shape} became {a(new.shape)}"),
        ]
    still = f"the {name(old)} is still {a(old.shape)}, not {a(shape or '')}"
    became = (
        still if new.shape == old.shape else f"the {name(old)} became {a(new.shape)}, not {a(shape or '')}"
    )
    found = [Check(new.shape == shape, became, True)]
    if colour is not None:
        found.append(Check(new.colour == colour, f"the new {new.shape} is {new.colour}, not {colour}"))
    return found


def _added(goal: dict, source: Scene, outcome: Scene) -> list[Check]:
    """The checks of subject-add; of several new things the one that passes most of them counts."""
    shape, colour = goal["shape"], goal["colour"]
    pairs, new = matches(source.things, outcome.things)
    if "corner" in goal:
        where = f"in the {goal['corner']} corner"
        anchor = None
    else:
        anchor = pairs[goal["anchor"]] or source.things[goal["anchor"]]
        where = f"{goal['relation']} the {source.things[goal['anchor']].shape}"
    best: list[Check] | None = None
    for thing in new:
        placed = (
            corner_of(thing) == goal["corner"]
            if anchor is None
            else goal["relation"] in relations(thing, anchor)
        )
        found = [
            Check(thing.shape == shape, f"{a(name(thing))} was added, not {a(f'{colour} {shape}')}", True),
            Check(thing.colour == colour, f"the new {thing.shape} is {thing.colour}, not {colour}"),
            Check(placed, f"the new {thing.shape} is not {where}"),
        ]
        if best is None or [c.holds for c in found] > [c.holds for c in best]:
            best = found
    missing = f"no {colour} {shape} was added"
    return best or [Check(False, missing, True), Check(False, missing), Check(False, missing)]


def checks(edit: Edit, outcome: Scene) -> tuple[list[Check], list[Check]]:
    """(checks of what the edit asked for, checks of what it had to leave unchanged) on the outcome."""
    if edit.task_type == "compound":
        halves = [edit.goal["first"], edit.goal["second"]]
    else:
        halves = [(edit.task_type, edit.goal)]
    asked = [check for task, goal in halves for check in _goal_checks(task, goal, edit.source, outcome)]
    tasks, source, target = {task for task, _ in halves}, edit.source, edit.target
    pairs, _ = matches(source.things, outcome.things)
    index = touched(edit)
    kept = []
    for i, (old, new) in enumerate(zip(source.things, pairs)):
        if i == index:
            kept += _kept_of_touched(edit, old, _at(old, outcome.things))
        else:
            kept.append(_kept(old, new))
    number, wanted = len(outcome.things), len(target.things)
    there = "is 1 thing" if number == 1 else f"are {number} things"
    kept.append(Check(number == wanted, f"there {there}, not {wanted}"))
    if "background_change" not in tasks:
        reason = f"the background changed from {source.background} to {outcome.background}"
        kept.append(Check(outcome.background == source.background, reason))
    if "style_change" not in tasks:
        reason = f"the style changed from {source.style} to {outcome.style}"
        kept.append(Check(outcome.style == source.style, reason))
    return asked, kept


def _kept(old: Thing, new: Thing | None) -> Check:
    """Whether an untouched thing is what, where and as large as it was."""
    if new is None:
        changes = ["is gone"]
    else:
        changes = [
            change
            for change, differs in (
                (f"became {a(new.shape)}", new.shape != old.shape),
                (f"turned {new.colour}", new.colour != old.colour),
                ("moved", _apart(old, new) > STILL),
                ("changed its size", new.size != old.size),
            )
            if differs
        ]
    return Check(not changes, f"the {name(old)} {' and '.join(changes)}")


def _kept_of_touched(edit: Edit, old: Thing, new: Thing | None) -> list[Check]:
    """What a replaced or recoloured thing keeps: a colour that was not named, and its size."""
    task = local_task(edit)
    goal = edit.goal.get("first", (None, edit.goal))[1]
    facts = []
    if task == "subject-replace" and goal["colour"] is None:
        turned = f"the {name(old)} turned {new.colour}" if new is not None else f"the {name(old)} is gone"
        facts.append(Check(new is not None and new.colour == old.colour, turned))
    if task in ("subject-replace", "color_alter") and old.size in SIZES["free"]:
        sized = f"the {name(old)} changed its size" if new is not None else f"the {name(old)} is gone"
        facts.append(Check(new is not None and new.size == old.size, sized))
    return facts


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A (64, 64) bool mask widened by a square of ``pixels`` on every side."""
    for axis in (0, 1):
        padded = np.pad(mask, [(pixels, pixels) if i == axis else (0, 0) for i in (0, 1)])
        mask = np.logical_or.reduce([padded.take(range(s, s + IMAGE), axis) for s in range(2 * pixels + 1)])
    return mask


def edit_region(edit: Edit, outcome: Scene) -> np.ndarray:
    """Where a local edit may change the picture: (64, 64) bool, the touched, wanted and added things, widened."""
    index = touched(edit)
    if index is None:
        new = matches(edit.source.things, outcome.things)[1]
        wanted = [t for t in new if t.shape == edit.goal["shape"]][:1]
        things = wanted or list(edit.target.things[len(edit.source.things) :])
    else:
        things = [edit.source.things[index]]
        if len(edit.target.things) == len(edit.source.things):
            things.append(edit.target.things[index])
    return grow(np.logical_or.reduce([object_mask(t) for t in things]), MARGIN)


def overlap(thing: Thing, things: Sequence[Thing]) -> float:
    """The largest intersection over union of a thing's mask with one of ``things``, in [0, 1]."""
    mask = object_mask(thing)
    best = 0.0
    for other in things:
        if _apart(thing, other) < thing.size + other.size:
            theirs = object_mask(other)
            best = max(best, float((mask & theirs).sum() / (mask | theirs).sum()))
    return best
