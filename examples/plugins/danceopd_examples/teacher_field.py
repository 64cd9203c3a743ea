"""A teacher's field: its velocity, with a bound on its size."""

from torch import Tensor

from danceopd.common.tensors import append_dims
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import Condition


def bounded(field: VelocityField, most: float = 2.0) -> VelocityField:
    """The teacher's `field`, whose velocity is shortened where its root mean square is above `most`."""

    def velocity(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        found = field(x, sigma, condition)
        size = found.flatten(1).square().mean(1).sqrt()
        return found * append_dims((most / size).clamp(max=1), found)

    return velocity
