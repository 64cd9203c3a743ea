"""Shard the frozen backbone over the processes with FSDP2 (`parallel: fsdp`); each block is gathered when it runs.

Only base weights are sharded. Adapters are small and whole in every process, so checkpoints and exports are those of
any other run. Every all-gather takes all processes, but their rows differ in depth and number. So before each forward
the processes agree on its kind: forwards without a gradient first, then those with one (forward and backward
together). A process that has none to do runs an idle forward, so that blocks are gathered in the same order everywhere.
Rollouts run through the LoRA layers (`W + BA` would need whole weights), and a full checkpoint cannot be a teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from danceopd.common.distributed import Processes
from danceopd.models.backbone import Backbone
from danceopd.models.compile import repeated_blocks
from danceopd.pipelines.condition import Condition

NONE, PLAIN, GRADIENT = range(3)
"""Kinds of forward that a process wants to run next: none, without a gradient, with one."""


def shard(transformer: nn.Module, processes: Processes) -> None:
    """Shard the weights over the processes, each part on its own device; adapters that are added later stay whole."""
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for block in (*repeated_blocks(transformer), transformer):
        fully_shard(block, mesh=mesh)


class ShardedForwards:
    """Keeps the forwards of a sharded `backbone` in the same order in every process.

    Idle forwards run the adapter `student` on the first row of `condition`.
    """

    def __init__(self, backbone: Backbone, processes: Processes, condition: Condition, student: str) -> None:
        self.backbone, self.processes, self.student = backbone, processes, student
        self._idling = False
        self.condition = condition.rows([0]).to(processes.device)
        self._x = torch.zeros(1, *condition.shape, device=processes.device)
        self._sigma = torch.ones(1, device=processes.device)
        backbone.transformer.register_forward_pre_hook(self._before, prepend=True)

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes in place, after all forwards of this step, own and idle ones, are done."""
        self._agree(NONE)
        self.processes.all_reduce(tensor)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._idling:
            self._agree(GRADIENT if torch.is_grad_enabled() else PLAIN)

    def _agree(self, wish: int) -> None:
        """Run idle forwards until the next kind is `wish`; NONE: until no process has a forward left."""
        while True:
            plain, gradient = self.processes.all_max([wish == PLAIN, wish == GRADIENT])
            turn = PLAIN if plain else GRADIENT if gradient else NONE
            if turn == wish:
                return
            self._idle(turn)

    def _idle(self, turn: int) -> None:
        """A forward whose result is not used; with a gradient, also a backward, which adds zero."""
        self._idling = True
        try:
            with torch.set_grad_enabled(turn == GRADIENT), self.backbone.acting_as(self.student):
                velocity = self.backbone.velocity(self._x, self._sigma, self.condition)
            if turn == GRADIENT:
                (0 * velocity).sum().backward()
        finally:
            self._idling = False
