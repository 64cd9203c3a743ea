"""How updates sample teachers and rows of their data: what a recipe says of it, in one part.

`recipe.sampling` makes it; `danceopd.data.routing.sample_batch` draws from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from danceopd.recipe.parts import Routing


@dataclass(frozen=True)
class Sampling:
    """`steps` updates of `groups_per_step` groups each; a group gets a teacher by `routing` and one row of its data.

    `shares` of the teachers, in the recipe's order, sum to 1. With `distinct` below `round`, the first so many updates
    of each round sample, and the others of it sample the same again.
    """

    seed: int
    steps: int
    groups_per_step: int
    shares: tuple[float, ...]
    routing: Routing = Routing()
    round: int = 1
    distinct: int = 1

    def drawn_at(self, step: int) -> int:
        """The update of this one's round whose samples it has: itself, or an earlier one."""
        return step - step % self.round + step % self.round % self.distinct
