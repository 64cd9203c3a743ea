"""What gates add to an update, in forwards of one row: frozen fields queried besides, and rollouts that go on.

A guided teacher's answer takes two forwards, its null prompt alone one. Rows that share a call (a contrast that
guidance needs, too) are counted once, as they are queried once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from danceopd.data.dataset import TeacherData
from danceopd.labelfree.skills import candidates
from danceopd.labelfree.variants import EXPANDED, PARAPHRASE
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe


def gate_forwards(
    recipe: Recipe, datasets: Mapping[str, TeacherData], depths: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Forwards that gates add to a row of each teacher, by part and name; nothing where none is on.

    `depths` is the share of rollouts that end at each grid index.
    """
    if not recipe.gates.on:
        return {}
    guided = 1 if recipe.rollout.guidance == 1 else 2
    frozen = {t.name: frozen_forwards(recipe, t, datasets[t.name]) for t in recipe.teachers}
    longer = {t.name: guided * longer_rollouts(recipe, depths) for t in recipe.teachers}
    return {"gates, frozen": frozen, "gates, rollout": longer}


def frozen_forwards(recipe: Recipe, teacher: Teacher, data: TeacherData) -> float:
    """Forwards of frozen fields that gates need for each row of a teacher, over all its queries."""
    gates, calls = recipe.gates, 1.0 if teacher.guidance is None else 2.0
    consensus, skills = gates.consensus, gates.skills

    def share(name: str) -> float:
        return len(data.variants[name][1]) / len(data.rows) if name in data.variants else 0.0

    privileged = {"none": 0.0, "guided": 0.0, "caption": 0.0, "source": 0.0}
    if skills is not None and skills.eta:
        context = skills.privileged(teacher.capability)
        privileged[context.step] += skills.critical
        privileged[context.episode] += 1 - skills.critical
    contrast = gates.contrast(teacher.capability)
    count = 1.0 if contrast == "null" else privileged["guided"]
    count += calls * (contrast in ("prompt", "source"))
    if consensus is not None:
        others = sum(share(name) for name in data.variants if name.startswith(PARAPHRASE))
        count += calls * (others + (contrast != "prompt"))
    count += calls * (privileged["caption"] * share(EXPANDED) + privileged["source"])
    return recipe.query.count * (1 - recipe.guidance.unconditional) * count


def longer_rollouts(recipe: Recipe, depths: Sequence[float]) -> float:
    """Steps that a row rolls on beyond its query; `depths` is the share of rows that end at each grid index."""
    steps, skills = recipe.rollout.steps, recipe.gates.skills
    if skills is None or not (last := candidates(steps, skills.until)):
        return 0.0
    beyond = sum(share * max(0, last + 1 - depth) for depth, share in enumerate(depths))
    return (1 - recipe.guidance.unconditional) * skills.critical * beyond
