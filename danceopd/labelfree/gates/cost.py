"""What gates add to an update, in forwards of one row: frozen fields queried besides, and rollouts that go on.

A guided teacher's answer takes two forwards, its null prompt alone one. Rows that share a call (a contrast that
guidance needs, too) are counted once, as they are queried once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from danceopd.data.dataset import TeacherData
from danceopd.labelfree.gates.skills import candidates
from danceopd.labelfree.gates.variants import EXPANDED, PARAPHRASE
from danceopd.recipe.labelfree import Gates, Skills
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
    prompted = 1 - recipe.guidance.unconditional
    guided = 1 if recipe.rollout.guidance == 1 else 2
    queries, steps = recipe.query.count * prompted, recipe.rollout.steps
    frozen = {t.name: queries * frozen_forwards(recipe.gates, t, datasets[t.name]) for t in recipe.teachers}
    longer = {t.name: guided * prompted * longer_rollouts(recipe.gates.skills, steps, depths) for t in recipe.teachers}
    return {"gates, frozen": frozen, "gates, rollout": longer}


def frozen_forwards(gates: Gates, teacher: Teacher, data: TeacherData) -> float:
    """Forwards of frozen fields that gates need for each query of a teacher's rows that have their prompt."""
    calls = 1.0 if teacher.guidance is None else 2.0
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
    return count


def longer_rollouts(skills: Skills | None, steps: int, depths: Sequence[float]) -> float:
    """Steps that a row rolls on beyond its query; `depths` is the share of rows that end at each grid index."""
    if skills is None or not (last := candidates(steps, skills.until)):
        return 0.0
    beyond = sum(share * max(0, last + 1 - depth) for depth, share in enumerate(depths))
    return skills.critical * beyond
