"""The kinds of plug-ins: the group of their entry points, and what an object of each must be."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """`group` of entry points; `must`: what the object is, as "a …"; `takes`: what it is called with, before options.

    None: it is not called, or not with options that a recipe gives.
    """

    group: str
    must: str
    takes: tuple[str, ...] | None = None


KINDS = {
    "family": Kind("danceopd.families", "a Family of danceopd.pipelines"),
    "objective": Kind(
        "danceopd.objectives",
        "a function (batch, velocities, **options) that yields a RowLoss of danceopd.engine.objectives for each query",
        ("batch", "velocities"),
    ),
    "reward": Kind(
        "danceopd.rewards",
        "a function (groups, **options) that returns a tensor (questions, samples)",
        ("groups",),
    ),
    "query law": Kind(
        "danceopd.query_laws",
        "a function (share, **options) from a tensor of shares in [0, 1] to as many noise levels in [0, 1], rising",
        ("share",),
    ),
    "teacher field": Kind(
        "danceopd.teacher_fields",
        "a function (field, **options) that returns another field(x, sigma, condition) -> velocity",
        ("field",),
    ),
    "blend method": Kind("danceopd.blend_methods", "a Method of danceopd.adapters.blending.methods"),
    "suite": Kind("danceopd.suites", "a subclass of ExactSuite or JudgedSuite of danceopd.bench.suites.protocol"),
    "judge": Kind(
        "danceopd.judges",
        "a class whose objects are a Judge of danceopd.bench.judges.protocol, or a function that makes one",
    ),
    "metric": Kind(
        "danceopd.metrics",
        "a function (image, source, target, prompt) that returns a number, or None where it says nothing",
        ("image", "source", "target", "prompt"),
    ),
    "callback": Kind(
        "danceopd.callbacks",
        "a subclass of Callback of danceopd.engine.callbacks, or a function (**options) that makes one",
        (),
    ),
}
