"""How well a frozen field denoises a picture under its prompt (a diffusion classifier, arXiv 2303.16203)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from danceopd.labelfree.rewards.group import Group, Reward
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import stack


def likelihood(
    field: VelocityField, levels: Sequence[float] = (0.85, 0.75, 0.65), draws: int = 2, rows: int = 64
) -> Reward:
    """A reward: minus `field`'s denoising loss, `-mean |v(x_σ, σ, c) - (noise - clean)|²`, over `levels` and `draws`.

    `x_σ = (1 - σ) clean + σ noise` with the same noises for all samples of a group, so that they are compared at one
    thing. High noise levels tell right from wrong pictures of one prompt, low ones smooth from rough. At most about
    `rows` samples are asked at a time; each costs `len(levels) · draws` forwards.
    """

    @torch.no_grad()
    def rewards(groups: Sequence[Group]) -> Tensor:
        found: list[Tensor] = []
        for some in _batches(groups, rows):
            clean = torch.cat([group.clean for group in some])
            condition = stack([group.condition for group in some]).to(clean.device)
            sizes = torch.tensor([len(group.clean) for group in some], device=clean.device)
            condition = condition.rows(torch.arange(len(some), device=clean.device).repeat_interleave(sizes))
            noises = [group.noise(len(levels) * draws) for group in some]
            loss = clean.new_zeros(len(clean))
            for place, level in enumerate(level for level in levels for _ in range(draws)):
                noise = torch.stack([one[place] for one in noises]).repeat_interleave(sizes, 0)
                sigma = torch.full((len(clean),), level, device=clean.device)
                error = field(torch.lerp(clean, noise, level), sigma, condition).float() - (noise - clean)
                loss += error.square().flatten(1).mean(1)
            found += (-loss / (len(levels) * draws)).split(sizes.tolist())
        return torch.stack(found)

    return rewards


def _batches(groups: Sequence[Group], rows: int) -> Iterator[list[Group]]:
    """Neighbours of one layout together, at most `rows` samples where a group has no more."""
    for _, members in groupby(groups, key=lambda group: group.condition.layout):
        some: list[Group] = []
        for group in members:
            if some and sum(len(one.clean) for one in some) + len(group.clean) > rows:
                yield some
                some = []
            some.append(group)
        yield some
