"""What the student learns from an answer.

``danceopd`` (arXiv 2606.27377): the mean squared difference of the student's and the routed teacher's velocity
at a state of the student's own walk; unweighted over noise levels, fp32, no gradient through the state.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def danceopd(student: Tensor, answer: Tensor, weight: Tensor) -> Tensor:
    """Velocity error of each row: ``student`` (with gradient) and ``answer`` (B, …), ``weight`` (B,) -> (B,)."""
    return weight * (student.float() - answer.float()).square().flatten(1).mean(1)


OBJECTIVES: dict[str, Objective] = {"danceopd": danceopd}
