"""What the samples of one edit agree on: where they change the source, and into what.

The region that is edited is the group's own: per number, the median over the samples of `|sample - source|`, then the
edit map of `gates/evidence.py` (energy over channels, 3x3 mean, cut at Q3 + 1.5 IQR, over its largest value). A change
that less than half of the samples make is not in it. Nothing is asked of a model. Samples that all leave the source as
it is agree perfectly, so neither reward is to be used alone without an audit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danceopd.labelfree.gates.evidence import edit_mask
from danceopd.labelfree.rewards.group import Group
from danceopd.pipelines.registry import FAMILIES

OUTSIDE = 0.25
"""Where the edit map is below this, the picture should stay as it was."""
LEAST = 0.05
"""Share of the picture that must be outside, or nothing was asked to stay."""


def edit_region(group: Group) -> tuple[Tensor, Tensor] | None:
    """The map in [0, 1] of what is edited, one row of a shape that broadcasts to the samples, and the source (1, …).

    None for a group without a source of the samples' size, or whose samples change nothing.
    """
    source = group.source()
    if source is None:
        return None
    changed = (group.clean - source).abs().median(0, keepdim=True).values
    if not bool(changed.any()):
        return None
    return edit_mask(changed, FAMILIES[group.condition.family].grid(group.condition)), source[None]


def consensus(groups: Sequence[Group]) -> Tensor:
    """Minus the mean distance to the group's other samples, (Q, G): the medoid is best (self-consistency for pictures,
    arXiv 2203.11171 and 2606.27376).

    A distance is the root of the mean square inside the edit region. NaN without a source: right pictures of one prompt
    differ.
    """
    return torch.stack([_consensus(group) for group in groups])


def _consensus(group: Group) -> Tensor:
    region = edit_region(group)
    if region is None:
        return _nothing(group)
    weighted = (group.clean * region[0].sqrt()).flatten(1)
    scale = region[0].expand_as(group.clean[:1]).sum().sqrt()
    return -torch.cdist(weighted, weighted).sum(1) / (scale * (len(group.clean) - 1))


def preserve(groups: Sequence[Group]) -> Tensor:
    """Minus the mean square of what changed of the source outside the edit region, (Q, G).

    Outside is where the region's map is below `OUTSIDE`. NaN without a source, and where less than a share `LEAST` of
    the picture is outside: an edit of the style changes all.
    """
    return torch.stack([_preserve(group) for group in groups])


def _preserve(group: Group) -> Tensor:
    region = edit_region(group)
    if region is None:
        return _nothing(group)
    outside = (region[0] < OUTSIDE).float()
    if float(outside.mean()) < LEAST:
        return _nothing(group)
    error = (outside * (group.clean - region[1]).square()).flatten(1).sum(1)
    return -error / outside.expand_as(group.clean[:1]).sum()


def _nothing(group: Group) -> Tensor:
    return group.clean.new_full((len(group.clean),), float("nan"))
