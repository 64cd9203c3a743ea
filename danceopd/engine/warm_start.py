"""What the student starts as (`student.init`): the bare base, a teacher, another LoRA, or a blend of the teachers.

An init whose rank fits is taken over exactly: the student equals it at step 0. One of a larger rank is reduced to the
student's by SVD, the closest there is, and what that loses is said in the log and in the model card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danceopd.adapters.blend import blend_with_residual, scaled
from danceopd.adapters.blending.methods import method_of
from danceopd.adapters.regression.moments import Inputs
from danceopd.models.lora import Adapter

if TYPE_CHECKING:
    from danceopd.recipe.parts import Student


@dataclass(frozen=True)
class StudentInit:
    """The adapter that a student starts as (None: the bare base), how much of it its rank lost, and that in words.

    `pending`: it is not known yet, for inputs of layers have to be recorded first.
    """

    adapter: Adapter | None
    residual: float
    sentence: str
    pending: bool = False


def blend_weights(student: Student, names: Iterable[str], teachers: int) -> list[float]:
    """The weights of these teachers in the blend that a student starts as, of so many `teachers` in all."""
    even = method_of(student.init_method).weights(teachers)[0]
    return [student.init_weights.get(name, even) for name in names]


def student_init(
    student: Student,
    teachers: Mapping[str, tuple[Adapter | None, float]],
    read: Callable[[str], tuple[Adapter, str]],
    seed: int = 0,
    fast: Adapter | None = None,
    inputs: Inputs | None = None,
) -> StudentInit:
    """What `student.init` names. `teachers`: name -> (adapter, strength), None for the bare base; `read` reads a LoRA,
    and says what it is. `inputs` are the layers', of these teachers in their order, where the method looks at them.

    In a blend a teacher that is the bare base takes its share of the weights and adds nothing; in a regression its
    inputs should see the base. A step-distilled LoRA `fast` comes on top of the base, of a teacher and of a blend; a
    LoRA that is read may have one already. Raises UserError as `blend_with_residual` does.
    """
    init = student.init
    if fast is not None and (init in ("base", "blend") or init in teachers):
        rank = fast.rank + sum(adapter.rank for adapter, _ in teachers.values() if adapter is not None)
        start = student_init(student.model_copy(update={"rank": rank}), teachers, read, seed)
        both = [fast] if start.adapter is None else [start.adapter, fast]
        found = blend_with_residual(both, [1.0] * len(both), student.rank)
        what = start.sentence.removesuffix(", exactly.")
        lost = f", at rank {student.rank}, which lost {found.residual:.1%} of it" if found.residual else ""
        return StudentInit(found.adapter, found.residual, f"{what.removesuffix('.')}, with fast.adapter on top{lost}.")
    if init == "blend":
        regresses = method_of(student.init_method).regress is not None
        held = {
            name: Adapter({}) if adapter is None else scaled(adapter, scale)
            for name, (adapter, scale) in teachers.items()
            if regresses or adapter is not None
        }
        weights = blend_weights(student, held, len(teachers))
        shares = " and ".join(f"{weight:.3g} x {name}" for name, weight in zip(held, weights))
        what = f"the {student.init_method} blend of {shares}"
        if regresses and inputs is None:
            said = f"The student starts as {what}, for which inputs of the layers are recorded first."
            return StudentInit(None, 0.0, said, pending=True)
        found = blend_with_residual(
            list(held.values()), weights, student.rank, student.init_method, seed=seed, inputs=inputs
        )
    else:
        if init in teachers:
            (adapter, scale), what = teachers[init], init
        else:
            (adapter, what), scale = (None, "") if init == "base" else read(init), 1.0
        if adapter is None:
            return StudentInit(None, 0.0, "The student started as the bare base.")
        found = blend_with_residual([scaled(adapter, scale)], [1.0], student.rank)
        what = f"{what}, of rank {adapter.rank}"
    if not found.residual:
        return StudentInit(found.adapter, 0.0, f"The student started as {what}, exactly.")
    lost = f"which lost {found.residual:.1%} of it"
    return StudentInit(found.adapter, found.residual, f"The student started as {what}, at rank {student.rank}, {lost}.")
