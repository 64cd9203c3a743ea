"""Compute the keys and values of source tokens once a rollout instead of at every step (`rollout.cache_source`).

Exact only where source tokens see neither the noisy tokens nor the time, so that nothing about them changes from step
to step: FLUX.2-klein KV, as diffusers' `Flux2KleinKVPipeline` runs it. For every other family it is refused. The cache
belongs to one rollout under one set of weights: it is part of that rollout's condition, loses rows with it and ends
with it. A forward with a gradient computes the source anew.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.family import Family
from danceopd.pipelines.registry import FAMILIES


class ActingField(Protocol):
    """A field whose weights a backbone can take: `AdapterField`, `MergedField`, `CapturedField`."""

    @property
    def backbone(self) -> Backbone: ...

    def acting(self) -> AbstractContextManager[None]: ...


def check_source_cache(family: Family) -> None:
    """UserError unless a family's source tokens can be cached exactly."""
    if family.cache_source is not None:
        return
    supported = ", ".join(name for name, other in FAMILIES.items() if other.cache_source is not None)
    if family.editing is None:
        raise UserError(f"rollout.cache_source: {family.name} has no source tokens; leave it out")
    raise UserError(
        f"rollout.cache_source: source tokens of {family.name} see the noisy ones, so their keys and values change at "
        f"every step; leave it out (it is exact for {supported})"
    )


@torch.no_grad()
def with_cached_source(field: ActingField, condition: Condition) -> Condition:
    """`condition` with its source image replaced by the source's keys and values under the weights of `field`.

    Called at the start of a rollout. The field gives the same velocities for it as for `condition`, as long as its
    weights do not change. A condition without a source is returned as it is. UserError for other families.
    """
    family = FAMILIES[condition.family]
    check_source_cache(family)
    assert family.cache_source is not None
    with field.acting():
        return family.cache_source(field.backbone.transformer, condition)
