"""Velocity fields: `field(x, sigma, condition) -> v`, the one thing rollouts and objectives ask for.

`x (B, …)` fp32, `sigma (B,)` in [0, 1] with 1 pure noise, a Condition of B rows; the answer has the shape
of `x`, fp32, `v = ε − x0`. Fields are frozen: they never build a graph. (The student's own velocity with a
gradient is `backbone.velocity` inside `backbone.acting_as("student")`.) Fields compose.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition
from danceopd.questions import unprompted

VelocityField = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class AdapterField:
    """The backbone acting as one adapter; `name` None is the bare base."""

    backbone: Backbone
    name: str | None

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the backbone is what this field asks."""
        return self.backbone.acting_as(self.name)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        with self.acting():
            return self.backbone.velocity(x, sigma, condition)


def BaseField(backbone: Backbone) -> AdapterField:  # noqa: N802 (a field like the others, named like them)
    """The bare base model."""
    return AdapterField(backbone, None)


@dataclass(frozen=True)
class MergedField:
    """The backbone with one adapter merged into its weights: the same velocity, without the LoRA's time.

    Costs one copy of the adapted weights; for rollouts, and for teachers that are asked often.
    """

    backbone: Backbone
    name: str

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the backbone is what this field asks."""
        return self.backbone.merged(self.name)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        with self.acting():
            return self.backbone.velocity(x, sigma, condition)


@dataclass(frozen=True)
class GuidedField:
    """Classifier-free guidance of another field as its family does it: most often `v_null + scale · (v − v_null)`.

    `null_condition` is the recorded condition of the null prompt, one row or as many as the batch; only its
    prompt is used, so a source image stays in place on both sides, as in the stock pipelines. Scale 1 is
    the plain field. Two calls of `field` for each answer.
    """

    field: VelocityField
    null_condition: Condition
    scale: float

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        away = self.field(x, sigma, unprompted(condition, self.null_condition))
        return FAMILIES[condition.family].guide(self.field(x, sigma, condition), away, self.scale)

