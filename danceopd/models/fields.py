"""Velocity fields, `field(x, sigma, condition) -> v`: what rollouts and objectives call for teachers and the student.

`x (B, …)` fp32, `sigma (B,)` in [0, 1] with 1 pure noise, a Condition of B rows; the result has the shape of `x`,
fp32, `v = ε − x0`. Fields compute no gradient; the student's velocity with one is `backbone.velocity` inside
`backbone.acting_as("student")`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from danceopd.common.tensors import append_dims, compute_dtype
from danceopd.models.backbone import Backbone
from danceopd.models.lora import RowsNotTold
from danceopd.pipelines.condition import Condition, stack
from danceopd.pipelines.registry import FAMILIES, with_prompt_of

_log = logging.getLogger("danceopd")
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
        return FAMILIES[condition.family].guide(self.field(x, sigma, condition), v_null, self.scale, condition)


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


class Ask(NamedTuple):
    """A field and the rows that it is asked for: `x (n, …)`, `sigma (n,)`, a Condition of n rows."""

    field: VelocityField
    x: Tensor
    sigma: Tensor
    condition: Condition


MOST_ROWS, MOST_MERGED_ROWS = 8, 4
"""Rows of each field up to which one forward for all costs less than one for each; the second of merged fields. By
trial on a CPU with the shipped model and LoRAs of rank 40."""
EXACT = 0.02
"""How far rows that are asked together may be from the same asked alone, as a share of what the adapters change."""


@torch.no_grad()
def ask_together(asks: Sequence[Ask]) -> list[Tensor]:
    """Each field's velocity `(n, …)` of its own rows; adapters of one backbone share a forward where layouts are equal.

    Rows do not see each other in a transformer, so the base is computed once for all of them, and each row gets its
    own adapter. The first such forward of a kind is compared with the fields asked one by one; where it is not the
    same but for rounding, or a layer cannot tell the rows, fields are asked one by one from then on.
    """
    inner = [one._replace(field=one.field.field) if isinstance(one.field, GuidedField) else one for one in asks]
    nulls = {
        i: one._replace(field=one.field.field, condition=with_prompt_of(one.condition, one.field.null_condition))
        for i, one in enumerate(asks)
        if isinstance(one.field, GuidedField)
    }
    found, null = _by_layout(inner), dict(zip(nulls, _by_layout(list(nulls.values()))))
    return [
        FAMILIES[one.condition.family].guide(v, null[i], one.field.scale, one.condition)
        if isinstance(one.field, GuidedField) else v
        for i, (one, v) in enumerate(zip(asks, found))
    ]


def _by_layout(asks: Sequence[Ask]) -> list[Tensor]:
    groups: dict[Hashable, list[int]] = {}
    for i, one in enumerate(asks):
        key: Hashable = i
        if isinstance(one.field, AdapterField | MergedField) and len(asks) > 1:
            key = id(one.field.backbone), one.condition.layout
        groups.setdefault(key, []).append(i)
    found = dict[int, Tensor]()
    for members in groups.values():
        found |= zip(members, _one_forward([asks[i] for i in members]))
    return [found[i] for i in range(len(asks))]


def _one_forward(asks: Sequence[Ask]) -> Sequence[Tensor]:
    """The velocities of adapters of one backbone, whose rows share a layout; or of one field, of any kind."""
    fields: Any = [one.field for one in asks]
    rows = [len(one.x) for one in asks]
    most = MOST_MERGED_ROWS if all(isinstance(field, MergedField) for field in fields) else MOST_ROWS

    def alone() -> list[Tensor]:
        return [field(*one[1:]) for field, one in zip(fields, asks)]

    if len(asks) == 1 or sum(rows) > most * len(asks):
        return alone()
    backbone, held = fields[0].backbone, asks[0].condition
    kind = held.context is None, *(key for key, value in sorted(held.kwargs.items()) if value is not None)
    exact = backbone.rows_apart.get(kind)
    if exact is False:
        return alone()
    x, sigma = torch.cat([one.x for one in asks]), torch.cat([one.sigma for one in asks])
    condition = stack([one.condition for one in asks])
    try:
        with backbone.acting_by_rows([(field.name, n) for field, n in zip(fields, rows)]):
            together = backbone.velocity(x, sigma, condition)
    except RowsNotTold:
        backbone.rows_apart[kind] = False
        _log.info("teachers are asked one by one: a layer's input does not tell the rows of a batch")
        return alone()
    if exact is None:
        apart = alone()
        exact = _same(together, torch.cat(apart), BaseField(backbone)(x, sigma, condition), backbone)
        backbone.rows_apart[kind] = exact
        if not exact:
            _log.info("teachers are asked one by one: asked in one forward, they are not the same but for rounding")
            return apart
    return together.split(rows)


def _same(together: Tensor, alone: Tensor, base: Tensor, backbone: Backbone) -> bool:
    """Whether two velocities are equal but for rounding, beside what the adapters change of the base's."""
    dtype = next((compute_dtype(m) for m in backbone.transformer.modules() if isinstance(m, nn.Linear)), alone.dtype)
    rounding = torch.finfo(dtype).eps * float(alone.norm())
    return float((together - alone).norm()) <= EXACT * float((alone - base).norm()) + rounding


def mean_velocity(
    field: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, sigmas: Tensor, small_steps: int
) -> Tensor:
    """The mean velocity of `small_steps` equal Euler steps of `field(x, sigma)` from `x (B, …)` at `sigma (B,)` down to
    the next level of the schedule `sigmas` (N+1,): one step with it lands where the small ones do. 1: the field's own.
    """
    if small_steps == 1:
        return field(x, sigma)
    grid = sigmas.to(sigma)
    # a row's next level: the first that is below its own, not by rounding alone
    following = grid[(grid[None] >= sigma[:, None] - 1e-6).sum(1).clamp(max=len(grid) - 1)]
    total, state = torch.zeros_like(x), x
    for step in range(small_steps):
        velocity = field(state, sigma + (following - sigma) * (step / small_steps))
        total = total + velocity
        state = state + append_dims((following - sigma) / small_steps, x) * velocity
    return total / small_steps


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
