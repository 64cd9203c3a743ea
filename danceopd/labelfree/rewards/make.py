"""The rewards of a recipe, and ranks from their numbers.

Rewards have units of their own, so each is turned into standard scores inside every group before they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.rewards.agreement import consensus, preserve
from danceopd.labelfree.rewards.group import Reward
from danceopd.labelfree.rewards.likelihood import likelihood
from danceopd.labelfree.rewards.own import own
from danceopd.models.fields import VelocityField, unguided
from danceopd.recipe import nft as parts

REWARDS: dict[str, Callable[..., Reward]] = {
    "likelihood": likelihood,
    "consensus": lambda: consensus,
    "preserve": lambda: preserve,
}
"""Makes each registered reward: `likelihood` of a field, `consensus` and `preserve` of nothing."""
SPREAD = 1e-6
"""Deviation of a reward in a group, over the largest of its numbers there, below which the samples are alike."""


def rewards_of(
    part: parts.NFT, teachers: Sequence[RoutedTeacher], base: VelocityField, rows: int = 64
) -> dict[str, dict[str, Reward]]:
    """The rewards of each teacher's rows by their names in the recipe; fields are asked without guidance or contrast.

    `base` is the bare base's field; `rows` are asked at a time.
    """
    fields = {teacher.name: teacher.field for teacher in teachers} | {"base": base}
    return {teacher.name: rewards_for(part, teacher.name, fields, rows) for teacher in teachers}


def rewards_for(
    part: parts.NFT, teacher: str, fields: Mapping[str, VelocityField], rows: int = 64
) -> dict[str, Reward]:
    """The same for one teacher's rows; `fields` are all teachers' by name, and the bare base's as "base"."""
    found: dict[str, Reward] = {}
    for name, reward in part.rewards.items():
        if isinstance(reward, parts.Likelihood):
            found[name] = likelihood(unguided(fields[reward.teacher or teacher]), reward.levels, reward.draws, rows)
        else:
            found[name] = own(name, reward.options) if isinstance(reward, parts.OwnReward) else REWARDS[name]()
    return found


def standard_scores(rewards: Tensor) -> Tensor:
    """(Q, G) rewards as standard scores inside each group; zeros where its samples are alike, NaN where one is NaN."""
    wide = rewards.double()
    deviation = wide.std(1, correction=0, keepdim=True)
    alike = deviation <= SPREAD * wide.abs().amax(1, keepdim=True)
    scores = (wide - wide.mean(1, keepdim=True)) / torch.where(alike, torch.ones_like(deviation), deviation)
    return torch.where(alike, torch.zeros_like(scores), scores).float()


def combined(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean (Q, G) of the rewards' standard scores; a reward that is NaN for a question does not count.

    Where none says anything all samples are equal: zeros. Rewards that disagree leave scores near zero.
    """
    total = wanted = torch.zeros(())
    for name, values in rewards.items():
        scores = standard_scores(values)
        there = torch.isfinite(scores).all(1, keepdim=True)
        total = total + weights[name] * torch.where(there, scores, torch.zeros_like(scores))
        wanted = wanted + weights[name] * there.float()
    return total / torch.where(wanted > 0, wanted, torch.ones_like(wanted))
