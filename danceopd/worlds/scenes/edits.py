"""`edits`: editing tasks in six of GEdit's categories, and a compound task that no teacher is trained on.

Local tasks change one thing (subject-add, subject-remove, subject-replace, color_alter), global ones the whole
picture (background_change, style_change). An edit is a source scene, an instruction, a target scene and the
goal as facts, so that success can be checked. A thing is named by an expression that fits it alone. Source and target
are in the same split.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from danceopd.worlds.scenes.grammar import (
    BACKGROUNDS,
    CORNERS,
    HELDOUT_OPERATIONS,
    IMAGE,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    a,
    allowed_colours,
    check_split,
    corner_of,
    free_places,
    has_heldout_binding,
    place,
    relations,
)

LOCAL = ("subject-add", "subject-remove", "subject-replace", "color_alter")
GLOBAL = ("background_change", "style_change")
TASKS = LOCAL + GLOBAL
PROBE_TASKS = ("compound",)
MAX_THINGS = 4


@dataclass(frozen=True)
class Edit:
    """One editing task. ``goal`` holds the facts that must become true; indices point into ``source.things``.

    ``goal`` keys by task: add ``{shape, colour, relation, anchor}`` or ``{shape, colour, corner}``; remove
    ``{index}``; replace ``{index, shape, colour}`` (colour None when not stated); color_alter ``{index, colour}``;
    background_change ``{background}``; style_change ``{style}``; compound ``{first, second}`` of (task, goal).
    ``heldout`` is None, "binding" or "operation".
    """

    task_type: str
    group: str
    instruction: str
    source: Scene
    target: Scene
    goal: dict = field(hash=False)
    heldout: str | None = None


def group_of(task: str) -> str:
    """``local``, ``global`` or ``compound``."""
    return "local" if task in LOCAL else "global" if task in GLOBAL else "compound"


def reference(rng: random.Random, scene: Scene, index: int) -> str | None:
    """An expression that names one thing of the scene alone, or None when there is none."""
    thing = scene.things[index]
    others = [t for i, t in enumerate(scene.things) if i != index]
    options = []
    if all(t.shape != thing.shape or t.colour != thing.colour for t in others):
        options += [f"{thing.colour} {thing.shape}"] * 2
    if all(t.shape != thing.shape for t in others):
        options.append(thing.shape)
    if all(t.colour != thing.colour for t in others):
        options.append(f"{thing.colour} shape")
    if not options:
        rivals = [t for t in others if t.shape == thing.shape]
        if all(thing.x < t.x - 2 for t in rivals):
            options.append(f"leftmost {thing.shape}")
        elif all(thing.x > t.x + 2 for t in rivals):
            options.append(f"rightmost {thing.shape}")
    return rng.choice(options) if options else None


def _source(rng: random.Random, tier: str, limit: int) -> Scene | None:
    number = rng.randint(1, limit)
    shapes = [rng.choice(SHAPES) for _ in range(number)]
    looks = [(s, rng.choice(allowed_colours(s, False))) for s in shapes]
    things = place(rng, looks, tier)
    return None if things is None else Scene(things, rng.choice(BACKGROUNDS), rng.choice(STYLES))


def _add(rng: random.Random, scene: Scene, tier: str, shape: str, colour: str):
    size = rng.choice(SIZES[tier])
    spots = free_places(scene, size, tier)
    if rng.random() < 0.25:
        corner = rng.choice(CORNERS)
        goal: dict[str, object] = {"shape": shape, "colour": colour, "corner": corner}
        place_text = f"in the {corner} corner"
        right = 0 if corner.endswith("left") else IMAGE
        bottom = 0 if corner.startswith("top") else IMAGE
        new = [Thing(shape, colour, x, y, size) for x, y in spots]
        new = [t for t in new if corner_of(t) == corner]
        new.sort(key=lambda t: (abs(t.x - right) + abs(t.y - bottom), t.y, t.x))
    else:
        anchor = rng.randrange(len(scene.things))
        named, relation = reference(rng, scene, anchor), rng.choice(RELATIONS)
        if named is None:
            return None
        goal = {"shape": shape, "colour": colour, "relation": relation, "anchor": anchor}
        place_text = f"{relation} the {named}"
        old = scene.things[anchor]
        new = [Thing(shape, colour, x, y, size) for x, y in spots]
        new = [t for t in new if relation in relations(t, old)]
        # The nearest place makes the target unique, so that a teacher has one answer to learn.
        new.sort(key=lambda t: (abs(t.x - old.x) + abs(t.y - old.y), t.y, t.x))
    if not new:
        return None
    return f"add {a(colour)} {shape} {place_text}", replace(scene, things=(*scene.things, new[0])), goal


def _pick_shape(rng: random.Random, task: str, other_than: str | None, heldout: str | None) -> str | None:
    pool = [
        s
        for s in SHAPES
        if s != other_than and ((task, s) in HELDOUT_OPERATIONS) == (heldout == "operation")
    ]
    return rng.choice(pool) if pool else None


def _apply(rng: random.Random, task: str, scene: Scene, tier: str, heldout: str | None):
    """(instruction, target, goal) of one task on a scene, or None when the draw does not fit."""
    if task == "subject-add":
        shape = _pick_shape(rng, task, None, heldout)
        if shape is None or len(scene.things) >= MAX_THINGS:
            return None
        return _add(rng, scene, tier, shape, rng.choice(allowed_colours(shape, heldout == "binding")))
    if task == "background_change":
        background = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        instruction = rng.choice((f"change the background to {background}", f"put it on {a(background)} background"))
        return instruction, replace(scene, background=background), {"background": background}
    if task == "style_change":
        style = rng.choice([s for s in STYLES if s != scene.style])
        instruction = rng.choice((f"make it {style}", f"redraw this in {style} style"))
        return instruction, replace(scene, style=style), {"style": style}
    index = rng.randrange(len(scene.things))
    thing, named = scene.things[index], reference(rng, scene, index)
    if named is None:
        return None
    if task == "subject-remove":
        if len(scene.things) < 2:
            return None
        instruction = rng.choice((f"remove the {named}", f"take away the {named}"))
        return instruction, scene.with_thing(index, None), {"index": index}
    if task == "color_alter":
        options = [c for c in allowed_colours(thing.shape, heldout == "binding") if c != thing.colour]
        colour = rng.choice(options)
        instruction = rng.choice((f"make the {named} {colour}", f"change the colour of the {named} to {colour}"))
        return instruction, scene.with_thing(index, replace(thing, colour=colour)), {"index": index, "colour": colour}
    shape = _pick_shape(rng, task, thing.shape, heldout)
    if shape is None:
        return None
    if rng.random() < 0.5 and heldout != "binding":
        goal = {"index": index, "shape": shape, "colour": None}
        return f"turn the {named} into {a(shape)}", scene.with_thing(index, replace(thing, shape=shape)), goal
    colour = rng.choice(allowed_colours(shape, heldout == "binding"))
    goal = {"index": index, "shape": shape, "colour": colour}
    target = scene.with_thing(index, replace(thing, shape=shape, colour=colour))
    return f"replace the {named} with {a(colour)} {shape}", target, goal


def draw_edit(
    rng: random.Random, task: str, tier: str = "cells", heldout: str | None = None, split: str | None = None
) -> Edit | None:
    """One random edit of a category, or None when the draw does not fit the scene or the ``split``.

    ``background_change=sky`` is the category with that one ground, colour, shape or style as its goal.
    """
    task, _, wanted = task.partition("=")
    limit = MAX_THINGS - 1 if task == "subject-add" else MAX_THINGS
    source = _source(rng, tier, limit)
    if source is None or (split is not None and source.split() != split):
        return None
    draw = _compound if task == "compound" else _single
    # A source of a rare split is worth several tries at a target of the same split.
    for _ in range(1 if split is None else 12):
        edit = draw(rng, task, source, tier, heldout)
        if edit is None or (wanted and wanted not in edit.goal.values()):
            continue
        if split is None or edit.target.split() == split:
            return edit
    return None


def _single(rng: random.Random, task: str, source: Scene, tier: str, heldout: str | None) -> Edit | None:
    drawn = _apply(rng, task, source, tier, heldout)
    if drawn is None or (heldout != "binding" and has_heldout_binding(drawn[1])):
        return None
    return Edit(task, group_of(task), drawn[0], source, drawn[1], drawn[2], heldout)


def _compound(rng: random.Random, task: str, source: Scene, tier: str, heldout: str | None) -> Edit | None:
    """A local edit and a global one in one sentence."""
    first_task, second_task = rng.choice(LOCAL), rng.choice(GLOBAL)
    first = _apply(rng, first_task, source, tier, None)
    if first is None or has_heldout_binding(first[1]):
        return None
    instruction, middle, goal = first
    if second_task == "style_change":
        style = rng.choice([s for s in STYLES if s != source.style])
        target, second_goal, tail = replace(middle, style=style), {"style": style}, f"make it {style}"
    else:
        new = rng.choice([b for b in BACKGROUNDS if b != source.background])
        target, second_goal = replace(middle, background=new), {"background": new}
        tail = f"put it on {a(new)} background"
    goals = {"first": (first_task, goal), "second": (second_task, second_goal)}
    return Edit(task, "compound", f"{instruction} and {tail}", source, target, goals, None)


HELDOUT_TASKS = {
    "binding": ("subject-add", "subject-replace", "color_alter"),
    "operation": tuple(sorted({task for task, _ in HELDOUT_OPERATIONS})),
}


def edits(
    split: str,
    count: int,
    seed: int = 0,
    tasks: tuple[str, ...] | None = None,
    tier: str = "cells",
    heldout: str | None = None,
) -> list[Edit]:
    """``count`` edits of a split, the categories in turn; equal arguments give equal edits.

    ``heldout`` asks for edits that need a held-out "binding" or a held-out "operation".
    """
    tasks = tasks or (HELDOUT_TASKS[heldout] if heldout else TASKS)
    check_split(split)
    rng = random.Random(f"edits/{split}/{seed}/{tier}/{heldout}")
    found: list[Edit] = []
    while len(found) < count:
        edit = draw_edit(rng, tasks[len(found) % len(tasks)], tier, heldout, split)
        if edit is not None:
            found.append(edit)
    return found
