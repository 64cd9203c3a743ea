"""The signals that an audit tries: the recipe's rewards, and beside them the usual ones, one noise level at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.rewards import REWARDS, Group, Reward, likelihood, rewards_of
from danceopd.models.fields import VelocityField, unguided
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import with_prompt_of
from danceopd.recipe import nft as parts

LEVELS = (0.85, 0.75, 0.65, 0.5, 0.3)
HIGH = (0.85, 0.75, 0.65)
"""Noise levels that are tried one by one; those of the two other denoising losses."""
DRAWS = 2
SAMPLES = "the samples alone"


@dataclass(frozen=True)
class Signal:
    """A reward, what its numbers come from, forwards of one row for a sample, and whether the recipe asks for it."""

    reward: Reward
    kind: str
    forwards: int = 0
    asked: bool = False


def signals_of(
    rewards: parts.NFT, teacher: RoutedTeacher, capability: str, teachers: Sequence[RoutedTeacher],
    base: VelocityField, null: Condition | None, levels: Sequence[float] = LEVELS, rows: int = 64,
) -> dict[str, Signal]:  # fmt: skip
    """The signals for samples of a teacher's questions, by name; at most about `rows` samples are asked at a time.

    `teachers` have the fields that the recipe's rewards may ask, `null` is the null prompt of the teacher's capability.
    """
    field, found = unguided(teacher.field), dict[str, Signal]()
    source = "base" if getattr(field, "name", "") is None else teacher.name  # a teacher may be the bare base
    own = rewards_of(rewards, teachers, base, rows)[teacher.name]
    for name in rewards.applying(capability):
        part = rewards.rewards[name]
        count, kind = 0, name if isinstance(part, parts.OwnReward) else SAMPLES
        if isinstance(part, parts.Likelihood):
            count, kind = len(part.levels) * part.draws, loss_of(part.teacher or source)
        found[f"reward {name}"] = Signal(own[name], kind, count, asked=True)
    for level in levels:
        one = likelihood(field, (level,), DRAWS, rows)
        found[f"likelihood at {level:g}"] = Signal(one, loss_of(source), DRAWS)
    if null is not None:
        found["null contrast"] = Signal(null_contrast(field, null, rows), loss_of(source), 2 * len(HIGH))
    found["likelihood of the base"] = Signal(likelihood(base, HIGH, 1, rows), loss_of("base"), len(HIGH))
    for name in parts.EDITING_ONLY if capability == "editing" else ():
        if name not in rewards.rewards:
            found[name] = Signal(REWARDS[name](), SAMPLES)
    return found


def loss_of(name: str) -> str:
    """The kind of a signal that is a denoising loss."""
    return f"the loss of {'the base' if name == 'base' else name}"


def null_contrast(field: VelocityField, null: Condition, rows: int) -> Reward:
    """A reward: how much less the denoising loss is under the prompt than under the null prompt, at `HIGH` noise."""

    def without(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return field(x, sigma, with_prompt_of(condition, null))

    prompted, unprompted = likelihood(field, HIGH, 1, rows), likelihood(without, HIGH, 1, rows)

    @torch.no_grad()
    def rewards(groups: Sequence[Group]) -> Tensor:
        return prompted(groups) - unprompted(groups)

    return rewards
