"""Velocity fields, `field(x, sigma, condition) -> v`: what rollouts and objectives call for teachers and the student.

`x (B, …)` fp32, `sigma (B,)` in [0, 1] with 1 pure noise, a Condition of B rows; the result has the shape of `x`,
fp32, `v = ε − x0`. Fields compute no gradient; the student's velocity with one is `backbone.velocity` inside
`backbone.acting_as("student")`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims
from danceopd.models.backbone import Backbone
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import FAMILIES, with_prompt_of

VelocityField = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class AdapterField:
    """The velocity of the backbone with one adapter in its LoRA layers; `name` None is the bare base."""

    backbone: Backbone
    name: str | None

    def acting(self) -> AbstractContextManager[None]:
        """The context in which the backbone has this field's weights."""
        return self.backbone.acting_as(self.name)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        with self.acting():
            return self.backbone.velocity(x, sigma, condition)


def BaseField(backbone: Backbone) -> AdapterField:  # noqa: N802 (a field like the others, named like them)
    """The velocity of the bare base model."""
    return AdapterField(backbone, None)


@dataclass(frozen=True)
class MergedField:
    """The velocity of the backbone with one adapter merged into its weights: as `AdapterField`, without LoRA layers.

    Costs one copy of the adapted weights; for rollouts, and for teachers that are queried often.
    """

    backbone: Backbone
    name: str

    def acting(self) -> AbstractContextManager[None]:
        """The context in which the backbone has this field's weights."""
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
    the plain field. Each call makes two calls of `field`.
    """

    field: VelocityField
    null_condition: Condition
    scale: float

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        v_null = self.field(x, sigma, with_prompt_of(condition, self.null_condition))
        return FAMILIES[condition.family].guide(self.field(x, sigma, condition), v_null, self.scale)


@dataclass(frozen=True)
class ContrastField:
    """A field moved away from a reference: `v + weight (v - v_ref)` (arXiv 2602.12125 and 2406.02507).

    Rows whose noise level is outside `sigma` are `field`'s own. `bound` is the largest norm of the shift over that of
    `v`, for each row; `mask(v - v_ref, condition)` weighs tokens and broadcasts to (B, …). Each call makes one call of
    `field` and one of `reference`.
    """

    field: VelocityField
    reference: VelocityField
    weight: float
    sigma: tuple[float, float] = (0.0, 1.0)
    bound: float | None = None
    mask: Callable[[Tensor, Condition], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity = self.field(x, sigma, condition)
        low, high = self.sigma
        rows = ((sigma >= low) & (sigma <= high)).nonzero().flatten().tolist()
        if not rows:
            return velocity
        mine, there = velocity[rows], condition.rows(rows)
        difference = mine - self.reference(x[rows], sigma[rows], there)
        shift = self.weight * difference
        if self.mask is not None:
            shift = shift * self.mask(difference, there)
        if self.bound is not None:
            norms = [v.flatten(1).norm(dim=1) for v in (mine, shift)]
            share = self.bound * norms[0] / norms[1].clamp_min(torch.finfo(shift.dtype).tiny)
            shift = shift * append_dims(share.clamp_max(1), shift)
        velocity[rows] = mine + shift
        return velocity


def acting(field: VelocityField) -> AbstractContextManager[None]:
    """The context in which a field's weights are active, so that a trajectory switches them once, not at each step."""
    enter = getattr(unguided(field), "acting", nullcontext)
    return enter()


def in_micro_batches(field: VelocityField, rows: int) -> VelocityField:
    """`field`, asked for at most `rows` rows at a time."""

    def velocity(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        parts = [slice(start, start + rows) for start in range(0, len(x), rows)]
        return torch.cat([field(x[part], sigma[part], condition.rows(part)) for part in parts])

    return velocity


def unguided(field: VelocityField) -> VelocityField:
    """The field inside any `GuidedField` or `ContrastField`: a teacher's own, without classifier-free guidance."""
    while isinstance(field, GuidedField | ContrastField):
        field = field.field
    return field
