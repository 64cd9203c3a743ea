"""Keys and values of source tokens, computed once for a walk instead of at each of its steps.

Exact where source tokens see neither the noisy tokens nor the time, so that nothing about them changes on the way:
FLUX.2-klein KV, as diffusers' `Flux2KleinKVPipeline` runs it. Everywhere else it would be
another model, and is refused. What is kept belongs to one walk under one set of weights: it lies in the condition of
that walk, leaves with its rows, and ends with it. With a gradient the source is computed anew.
"""

from __future__ import annotations

import torch

from danceopd.captured import CapturedField
from danceopd.errors import UserError
from danceopd.fields import AdapterField, MergedField
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.family import Family
from danceopd.pipelines.record import Condition


def refuse_reuse(family: Family) -> None:
    """UserError where a family's source tokens cannot be kept exactly."""
    if family.keep_source is not None:
        return
    able = ", ".join(name for name, other in FAMILIES.items() if other.keep_source is not None)
    if family.editing is None:
        raise UserError(f"rollout.keep_source: {family.name} has no source tokens; leave it out")
    raise UserError(
        f"rollout.keep_source: source tokens of {family.name} see the noisy ones, so their keys and values change at "
        f"every step; leave it out (it is exact for {able})"
    )


@torch.no_grad()
def with_source_kept(field: AdapterField | MergedField | CapturedField, condition: Condition) -> Condition:
    """`condition` with the keys and values of its source in place of the source, as `field` computes them.

    The field answers it as it answers `condition`, for as long as its weights stay. A condition without a source is
    returned as it is. UserError where that is not exact.
    """
    family = FAMILIES[condition.family]
    refuse_reuse(family)
    assert family.keep_source is not None
    with field.acting():
        return family.keep_source(field.backbone.transformer, condition)
