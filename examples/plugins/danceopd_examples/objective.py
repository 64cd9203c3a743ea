"""An objective: DanceOPD with Huber's loss, which large errors pull less."""

from collections.abc import Iterator

import torch.nn.functional as F

from danceopd.engine.batches import Batch
from danceopd.engine.objectives import RowLoss, velocity_error
from danceopd.engine.velocities import Velocities


def huber(batch: Batch, velocities: Velocities, delta: float = 1.0) -> Iterator[RowLoss]:
    """Match the teacher at the drawn states of the student's own trajectory; `delta` is where the loss turns linear."""
    states = velocities.rollout(batch, batch.query_step, batch.query_sigma)
    queries = states.shape[1]
    for k in range(queries):
        x, sigma = states[:, k], batch.query_sigma[:, k].to(batch.device)
        teacher = velocities.teacher(batch, x, sigma)
        student = velocities.student(batch, x, sigma).float()  # with the gradient
        loss = F.huber_loss(student, teacher, delta=delta, reduction="none").flatten(1).mean(1)
        yield RowLoss(loss / queries, sigma, velocity_error(student.detach(), teacher))
