"""The `fast` part of a recipe: a student of few steps, trained with the steps that it will draw with.

    fast: {steps: 8, adapter: ./lightning-8steps.safetensors}     a step-distilled LoRA, which the student takes in
    fast: {steps: 4}                                              on a step-distilled base
    fast: {steps: 4, teacher_steps: 4}                            learnt from teachers that need many steps

docs/many-teachers.md says when which is right.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from danceopd.recipe.parts import Part, Rollout, Steps, Strength, existing

FEW_STEP_NAMES = re.compile(r"turbo|schnell|lightning|lcm|hyper-?sd|(?<!un)(?<!de-)(?<!de)distill")
"""In the name of a base: it was most likely distilled to few steps."""
FEW_STEPS = 4
"""Steps that most distilled models are made for."""
STEPS = {"z-image-turbo": 8}
"""Of models that are made for others, by name."""


def _adapter(value: Any) -> Any:
    return None if value is None else existing(value, "adapter", shipped_names=False)


class Fast(Part):
    """A student of few steps: its rollouts have as many as it will draw with, and its file says so."""

    steps: Steps | None = Field(None, examples=[4])
    """Denoising steps of rollouts, and of the pipeline's call with the exported student. It must be given."""
    adapter: Annotated[str | None, BeforeValidator(_adapter)] = Field(None, examples=["lightning-8steps.safetensors"])
    """A LoRA that distils the base to few steps (Lightning, Turbo): the student starts with it on top of `student.init`
    and has it in its file. null: the base itself is distilled, or the teachers show it by `teacher_steps`."""
    scale: Strength = 1.0
    """Strength of `adapter`."""
    accept: tuple[Literal["base"], ...] = Field((), examples=[["base"]])
    """Refusals that you have looked into: an `adapter` that was trained on another base."""
    teacher_steps: Steps = Field(1, examples=[4])
    """Steps of a teacher within one step of the student. 1: teachers draw in few steps themselves, or with `adapter` on
    top of them, and their velocity is learnt. More, for teachers that need many steps: the mean velocity of so many
    small steps is learnt, so that one step of the student lands where theirs do."""

    @property
    def stacks(self) -> bool:
        """Whether teachers are asked with `adapter` on top of them."""
        return self.adapter is not None and self.teacher_steps == 1


def few_step_name(base: str) -> str | None:
    """The word in the last part of a base's path or hub name that says that it was distilled to few steps, if any."""
    found = FEW_STEP_NAMES.search(re.split(r"[\\/]", base.rstrip("\\/"))[-1].lower())
    return found[0] if found else None


def steps_of(name: str) -> int:
    """The number of steps that the name of a distilled model or LoRA says; most often it says none, and means 4."""
    name = re.split(r"[\\/]", name.lower().rstrip("\\/"))[-1]
    said = re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", name)
    return int(said[1]) if said and int(said[1]) else STEPS.get(name, FEW_STEPS)


def with_fast_steps(
    fast: Fast, base: str, rollout: Rollout, call: dict[str, Any]
) -> tuple[Rollout, dict[str, Any]]:
    """The rollout and the pipeline's call of a recipe with the steps of `fast`; ValueError where they disagree."""
    if fast.steps is None:
        named = fast.adapter or base
        raise ValueError(
            f"fast says no number of steps; write fast: {{steps: {steps_of(named)}}}, or what {named} is made for"
        )
    given = {"call.num_inference_steps": call.get("num_inference_steps")}
    if "steps" in rollout.model_fields_set:
        given["rollout.steps"] = rollout.steps
    for key, steps in given.items():
        if steps not in (None, fast.steps):
            raise ValueError(f"fast.steps is {fast.steps} and {key} is {steps}; leave {key} out, or give the same")
    return rollout.model_copy(update={"steps": fast.steps}), {**call, "num_inference_steps": fast.steps}
