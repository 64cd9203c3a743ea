"""The frozen backbone spread over the processes (FSDP2), a block at a time gathered when it runs.

Only base weights are sharded; adapters are small and whole in every process, so checkpoints and exports are those of
any other run. Each gathering takes all processes, but their rows differ in depth and number. So before each forward
they agree whose turn it is: plain forwards first, then those with a gradient, forward and backward in one turn. Who
has none to do then runs an idle one along: blocks are gathered in the same order everywhere, whatever the rows.
Walks run through the LoRA layers (`W + BA` would need whole weights), and no whole checkpoint can be streamed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from danceopd.backbone import Backbone
from danceopd.blocks import repeated_blocks
from danceopd.pipelines.record import Condition
from danceopd.processes import Processes

REST, PLAIN, GRADIENT = range(3)


def shard(transformer: nn.Module, processes: Processes) -> None:
    """Spread the weights over the processes, each share on its device; adapters that are added later stay whole."""
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in (*repeated_blocks(transformer), transformer):
        fully_shard(block, mesh=mesh)


class Sharded:
    """The forwards of a sharded `backbone`, in step; idle ones ask `question` (its first row) of adapter `student`."""

    def __init__(self, backbone: Backbone, processes: Processes, question: Condition, student: str) -> None:
        self.backbone, self.processes, self.student = backbone, processes, student
        self._idling = False
        self.question = question.rows([0]).to(processes.device)
        self._x = torch.zeros(1, *question.shape, device=processes.device)
        self._sigma = torch.ones(1, device=processes.device)
        backbone.transformer.register_forward_pre_hook(self._before, prepend=True)

    def add(self, tensor: Tensor) -> None:
        """Sum over the processes, after helping the others to the end of their forwards."""
        self._agree(REST)
        self.processes.add(tensor)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._idling:
            self._agree(GRADIENT if torch.is_grad_enabled() else PLAIN)

    def _agree(self, wish: int) -> None:
        """Idle along until it is the turn of `wish`; of REST, until all rest."""
        while True:
            plain, gradient = self.processes.highest([wish == PLAIN, wish == GRADIENT])
            turn = PLAIN if plain else GRADIENT if gradient else REST
            if turn == wish:
                return
            self._idle(turn)

    def _idle(self, turn: int) -> None:
        """A forward that is asked nothing; of GRADIENT with a backward, whose gradient is zero."""
        self._idling = True
        try:
            with torch.set_grad_enabled(turn == GRADIENT), self.backbone.acting_as(self.student):
                velocity = self.backbone.velocity(self._x, self._sigma, self.question)
            if turn == GRADIENT:
                (0 * velocity).sum().backward()
        finally:
            self._idling = False
