"""Targets that go past a teacher: its velocity, moved away from a frozen reference's (recipe key `contrast`).

`v* = v + w (v - v_ref)`: what the teacher changed of the reference is done more strongly, so the minimiser of the
velocity error is no longer the teacher itself (ExOPD, arXiv 2602.12125, with lambda = 1 + w; autoguidance, 2406.02507;
V-Zero's irrelevant evidence, 2606.25319, as a reference). `contrasted` wraps the teachers' fields; nothing else of a
merge knows of it. One more frozen forward a query; for "others" one for each other teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from danceopd.data.dataset import Dataset
from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.gates.evidence import edit_mask
from danceopd.models.fields import ContrastField, VelocityField, unguided
from danceopd.pipelines.condition import Condition, stack
from danceopd.pipelines.registry import FAMILIES, with_prompt_of
from danceopd.recipe.recipe import Recipe

NEAR = 8
"""Rows of each layout of the sampled data among which another prompt, or another source image, is sought."""


def contrasted(recipe: Recipe, teachers: Sequence[RoutedTeacher], base: VelocityField) -> list[RoutedTeacher]:
    """The teachers, those that the recipe's `contrast` names with a `ContrastField`; `base` is the bare base's field.

    Called once the teachers are on the backbone. A reference is asked without guidance.
    """
    fields = {teacher.name: unguided(teacher.field) for teacher in teachers}
    found = []
    for teacher, part in zip(teachers, recipe.teachers, strict=True):
        contrast = recipe.contrast_of(part)
        if contrast is None:
            found.append(teacher)
            continue
        own, reference = fields[teacher.name], contrast.reference
        asked: VelocityField
        if reference == "others":
            asked = _Mean([one for name, one in fields.items() if name != teacher.name])
        elif reference == "weaker":
            assert teacher.weaker is not None  # merge attaches it
            asked = unguided(teacher.weaker)
        elif reference == "null":
            assert teacher.null is not None  # merge records it where `needs_null`
            asked = _NullPrompt(own, teacher.null)
        elif reference in ("prompt", "source"):
            asked = _OtherRow(own, teacher.dataset, reference == "source")
        else:
            asked = base if reference == "base" else fields[reference]
        mask = _edit_mask if contrast.mask else None
        moved = ContrastField(teacher.field, asked, contrast.weight, contrast.sigma, contrast.bound, mask)
        found.append(replace(teacher, field=moved))
    return found


def contrast_forwards(recipe: Recipe) -> dict[str, float]:
    """Forwards of a reference, at most, for each query of a teacher's rows; empty where no target is moved."""
    if not any(map(recipe.contrast_of, recipe.teachers)):
        return {}
    prompted = 1 - recipe.guidance.unconditional
    found = {}
    for teacher in recipe.teachers:
        contrast = recipe.contrast_of(teacher)
        each = 0 if contrast is None else len(recipe.teachers) - 1 if contrast.reference == "others" else 1
        found[teacher.name] = prompted * each
    return found


def _edit_mask(difference: Tensor, condition: Condition) -> Tensor:
    return edit_mask(difference, FAMILIES[condition.family].grid(condition))


@dataclass(frozen=True)
class _Mean:
    """The mean velocity of several fields."""

    fields: Sequence[VelocityField]

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return torch.stack([one(x, sigma, condition) for one in self.fields]).mean(0)


@dataclass(frozen=True)
class _NullPrompt:
    """A field under the null prompt; `null` has one row."""

    field: VelocityField
    null: Condition

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.field(x, sigma, with_prompt_of(condition, self.null))


@dataclass(frozen=True)
class _OtherRow:
    """A field under the prompt, or with the source image, of the first row of the data that has another one.

    A row for which the data has none is asked as it is, which moves nothing.
    """

    field: VelocityField
    dataset: Dataset
    source: bool
    _near: dict[object, Condition | None] = dataclasses.field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.field(x, sigma, self._elsewhere(condition, x.device))

    def _elsewhere(self, condition: Condition, device: torch.device) -> Condition:
        near = self._of_layout(condition, device)
        if near is None:
            return condition
        picked = []
        for row in range(len(condition)):
            mine = condition.rows([row])
            others = (near.rows([k]) for k in range(len(near)))
            picked.append(next((other for other in others if self._differs(mine, other)), mine))
        made = stack(picked)
        return with_prompt_of(made, condition) if self.source else with_prompt_of(condition, made)

    def _of_layout(self, condition: Condition, device: torch.device) -> Condition | None:
        layout = condition.layout
        if layout not in self._near:
            rows = [row for row in range(len(self.dataset)) if self.dataset.layout(row) == layout][:NEAR]
            self._near[layout] = self.dataset.rows(rows).to(device) if rows else None
        return self._near[layout]

    def _differs(self, one: Condition, other: Condition) -> bool:
        both = stack([one, other])  # padded to one length
        keys = FAMILIES[one.family].prompt_kwargs
        parts = [both.context] if self.source else [both.kwargs[key] for key in keys]
        return any(part is not None and not torch.equal(part[0], part[1]) for part in parts)
