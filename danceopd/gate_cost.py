"""What gates add to an update, in forwards of one row: frozen fields asked besides, and walks that go on.

A guided teacher's answer takes two forwards, its null prompt alone one. Rows that share a call (a contrast that
guidance needs, too) are counted once, as they are asked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from danceopd.recipe import Recipe, Teacher
from danceopd.skills import candidates
from danceopd.variants import EXPANDED, FRAMING, Variant
from danceopd.work import Asked


def gate_forwards(recipe: Recipe, asked: Mapping[str, Asked], depths: Sequence[float]) -> dict[str, dict[str, float]]:
    """Forwards that gates add to a row of each teacher, by part and name; nothing where none is on.

    `depths` is the share of walks that end at each grid index.
    """
    if not recipe.gates.on:
        return {}
    guided = 1 if recipe.rollout.guidance == 1 else 2
    frozen = {t.name: frozen_forwards(recipe, t, len(asked[t.name].rows), asked[t.name].also) for t in recipe.teachers}
    walked = {t.name: guided * walked_on(recipe, t.capability, depths) for t in recipe.teachers}
    return {"gates, frozen": frozen, "gates, walk": walked}


def frozen_forwards(recipe: Recipe, teacher: Teacher, rows: int, also: Mapping[str, Variant]) -> float:
    """Forwards that gates ask for each row of a teacher, over all its queries.

    `rows` are drawn of its data, of which `also` says by name how many have a variant.
    """
    gates, asks = recipe.gates, 1.0 if teacher.guidance is None else 2.0
    consensus, knobs = gates.consensus, gates.skills

    def share(name: str) -> float:
        return len(also[name][1]) / rows if name in also else 0.0

    told = {"none": 0.0, "guided": 0.0, "caption": 0.0, "source": 0.0}
    if knobs is not None and knobs.eta:
        what = knobs.told(teacher.capability)
        told[what.step] += knobs.critical
        told[what.episode] += 1 - knobs.critical
    contrast = gates.contrast(teacher.capability)
    count = 1.0 if contrast == "null" else told["guided"]
    count += asks * (contrast in ("prompt", "source"))
    if consensus is not None:
        others = sum(share(name) for name in also if name.startswith(FRAMING))
        count += asks * (others + (contrast != "prompt"))
    count += asks * (told["caption"] * share(EXPANDED) + told["source"])
    return recipe.query.count * (1 - recipe.guidance.unconditional) * count


def walked_on(recipe: Recipe, capability: str, depths: Sequence[float]) -> float:
    """Steps that a row's walk goes beyond its query; `depths` is the share of rows that end at each grid index."""
    steps, knobs = recipe.rollout.steps, recipe.gates.skills
    beyond = [sum(share * max(0, end - depth) for depth, share in enumerate(depths)) for end in range(steps + 1)]
    prompted = 1 - recipe.guidance.unconditional
    if knobs is None or not (last := candidates(steps, knobs.until)):
        return 0.0
    return prompted * knobs.critical * beyond[last + 1]
