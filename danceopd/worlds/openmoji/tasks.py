"""`prompts` and `edits`: tasks on scenes of drawings, in GenEval's six categories and six of GEdit's.

Records, scenes and edits are those of `danceopd.worlds.scenes`, with classes in place of shapes. Things have any place
and two sizes, and are at least 4 of 64 units apart. A scene's split is a hash of the scene, and an edit's source and
target are in the same split. Sources are plain drawings; a named thing is the only one that the name fits; an
instruction to replace always names a colour.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from danceopd.worlds.openmoji.kinds import BACKGROUNDS, COLOURS, KINDS, PLAIN, STYLES, plural
from danceopd.worlds.scenes.edits import TASKS, Edit, group_of
from danceopd.worlds.scenes.grammar import (
    CORNERS,
    IMAGE,
    RELATIONS,
    Scene,
    Thing,
    a,
    check_split,
    corner_of,
    free_places,
    relations,
)
from danceopd.worlds.scenes.prompts import NUMBERS, TAGS, Prompt

MAX_THINGS = 4
NAMES = tuple(kind.name for kind in KINDS)
SIZES = (8.0, 11.0)
"""Half the longer side of a thing, in units of 64 a picture."""
GAP = 4.0
"""Least distance between two things' squares."""
SETTING = "on a plain white background"


def where(relation: str) -> str:
    """A relation in the words of an instruction: ``to the left of``."""
    return f"to the {relation}" if relation.endswith("of") else relation


def placed(rng: random.Random, looks: Sequence[tuple[str, str]]) -> tuple[Thing, ...] | None:
    """Things of the given (class, colour) looks at random free places, or None when they do not fit."""
    things: list[Thing] = []
    for shape, colour in looks:
        size = rng.choice(SIZES)
        margin = size + 1
        steps = int((IMAGE - 2 * margin) // 2)
        for _ in range(40):
            x, y = margin + 2.0 * rng.randint(0, steps), margin + 2.0 * rng.randint(0, steps)
            if all(max(abs(x - t.x), abs(y - t.y)) >= size + t.size + GAP for t in things):
                things.append(Thing(shape, colour, x, y, size))
                break
        else:
            return None
    return tuple(things)


def draw_prompt(rng: random.Random, tag: str, names: Sequence[str] = NAMES) -> Prompt | None:
    """One random record of a category with a scene that satisfies it, or None when the draw does not fit."""
    one, two = rng.sample(names, 2)
    first, second = rng.sample(tuple(COLOURS), 2)
    relation, number = rng.choice(RELATIONS), rng.choice((2, 3, 4))
    exclude: list[dict] = []
    looks = [(one, first), (two, second)]
    if tag in ("single_object", "colors"):
        looks = looks[:1]
        include = [{"class": one, "count": 1}]
        things_text = a(one)
        if tag == "colors":
            include[0]["color"] = first
            things_text = a(f"{first} {one}")
    elif tag == "counting":
        looks = [(one, rng.choice(tuple(COLOURS))) for _ in range(number)]
        include = [{"class": one, "count": number}]
        exclude = [{"class": one, "count": number + 1}]
        things_text = f"{NUMBERS[number]} {plural(one)}"
    elif tag == "position":
        include = [{"class": two, "count": 1}, {"class": one, "count": 1, "position": [relation, 0]}]
        things_text = f"{a(one)} {relation} {a(two)}"
    else:
        include = [{"class": name, "count": 1} for name in (one, two)]
        things_text = f"{a(one)} and {a(two)}"
        if tag == "color_attr":
            include = [wanted | {"color": look[1]} for wanted, look in zip(include, looks)]
            things_text = f"{a(f'{first} {one}')} and {a(f'{second} {two}')}"
    things = placed(rng, looks)
    if things is None or (tag == "position" and relation not in relations(things[0], things[1])):
        return None
    text = f"an OpenMoji drawing of {things_text} {SETTING}"
    return Prompt(tag, text, include, exclude, Scene(things, "white", PLAIN))


def prompts(split: str, count: int, seed: int = 0, names: Sequence[str] = NAMES) -> list[Prompt]:
    """``count`` records of a split, the categories in turn; equal arguments give equal records."""
    check_split(split)
    rng = random.Random(f"openmoji/prompts/{split}/{seed}")
    found: list[Prompt] = []
    while len(found) < count:
        drawn = draw_prompt(rng, TAGS[len(found) % len(TAGS)], names)
        if drawn is not None and drawn.scene.split() == split:
            found.append(drawn)
    return found


def reference(rng: random.Random, scene: Scene, index: int) -> str | None:
    """An expression that names one thing of the scene alone, or None when there is none."""
    thing = scene.things[index]
    rivals = [t for i, t in enumerate(scene.things) if i != index and t.shape == thing.shape]
    options = []
    if all(t.colour != thing.colour for t in rivals):
        options.append(f"{thing.colour} {thing.shape}")
    if not rivals:
        options.append(thing.shape)
    return rng.choice(options) if options else None


def _source(rng: random.Random, task: str, names: Sequence[str]) -> Scene | None:
    least = 2 if task == "subject-remove" else 1
    most = MAX_THINGS - 1 if task == "subject-add" else MAX_THINGS
    number = rng.randint(least, most)
    shapes = [rng.choice(names) for _ in range(number)]
    if number > 1 and rng.random() < 0.3:  # two of a class, so that the colour matters
        shapes[1] = shapes[0]
    things = placed(rng, [(shape, rng.choice(tuple(COLOURS))) for shape in shapes])
    return None if things is None else Scene(things, rng.choice(tuple(BACKGROUNDS)), PLAIN)


def shows(scene: Scene, style: str) -> bool:
    """Whether a plain scene can be redrawn in a style so that each thing, and the change, can be seen."""
    colours = {thing.colour for thing in scene.things}
    if style == "no outlines":
        return "white" not in colours
    if style in ("line drawing", "grayscale") and scene.background == "white":
        return not colours & {"white", "black"}
    return style != PLAIN


def _add(rng: random.Random, scene: Scene, look: tuple[str, str]):
    size = rng.choice(SIZES)
    new = [Thing(*look, x, y, size) for x, y in free_places(scene, size, "free")]
    if rng.random() < 0.25:
        corner = rng.choice(CORNERS)
        goal: dict[str, object] = {"shape": look[0], "colour": look[1], "corner": corner}
        place_text = f"in the {corner} corner"
        new = [t for t in new if corner_of(t) == corner]
        right, bottom = (0 if corner.endswith("left") else 64), (0 if corner.startswith("top") else 64)
        new.sort(key=lambda t: (abs(t.x - right) + abs(t.y - bottom), t.y, t.x))
    else:
        anchor = rng.randrange(len(scene.things))
        named, relation, old = reference(rng, scene, anchor), rng.choice(RELATIONS), scene.things[anchor]
        if named is None:
            return None
        goal = {"shape": look[0], "colour": look[1], "relation": relation, "anchor": anchor}
        place_text = f"{where(relation)} the {named}"
        new = [t for t in new if relation in relations(t, old)]
        new.sort(key=lambda t: (abs(t.x - old.x) + abs(t.y - old.y), t.y, t.x))
    if not new:
        return None
    return f"add {a(f'{look[1]} {look[0]}')} {place_text}", replace(scene, things=(*scene.things, new[0])), goal


def _apply(rng: random.Random, task: str, scene: Scene, names: Sequence[str]):
    """(instruction, target, goal) of one task on a scene, or None when the draw does not fit."""
    colour = rng.choice(tuple(COLOURS))
    if task == "subject-add":
        return _add(rng, scene, (rng.choice(names), colour))
    if task == "background_change":
        background = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        instruction = f"change the background to {BACKGROUNDS[background]}"
        return instruction, replace(scene, background=background), {"background": background}
    if task == "style_change":
        style = rng.choice([s for s in STYLES if shows(scene, s)])
        return f"redraw this picture as {STYLES[style]}", replace(scene, style=style), {"style": style}
    index = rng.randrange(len(scene.things))
    old, named = scene.things[index], reference(rng, scene, index)
    if named is None:
        return None
    if task == "subject-remove":
        return f"remove the {named}", scene.with_thing(index, None), {"index": index}
    if task == "color_alter":
        if colour == old.colour:
            return None
        target = scene.with_thing(index, replace(old, colour=colour))
        return f"make the {named} {colour}", target, {"index": index, "colour": colour}
    shape = rng.choice([name for name in names if name != old.shape])
    goal = {"index": index, "shape": shape, "colour": colour}
    target = scene.with_thing(index, replace(old, shape=shape, colour=colour))
    return f"replace the {named} with {a(f'{colour} {shape}')}", target, goal


def edits(
    split: str, count: int, seed: int = 0, names: Sequence[str] = NAMES, tasks: Sequence[str] = TASKS
) -> list[Edit]:
    """``count`` edits of a split, the categories in turn; equal arguments give equal edits."""
    check_split(split)
    rng = random.Random(f"openmoji/edits/{split}/{seed}")
    found: list[Edit] = []
    while len(found) < count:
        task = tasks[len(found) % len(tasks)]
        source = _source(rng, task, names)
        if source is None or source.split() != split:
            continue
        for _ in range(12):  # a source of a rare split is worth several tries
            drawn = _apply(rng, task, source, names)
            if drawn is not None and drawn[1].split() == split:
                found.append(Edit(task, group_of(task), drawn[0], source, drawn[1], drawn[2]))
                break
    return found
