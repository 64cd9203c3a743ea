"""DanceOPD's released training loop, rebuilt on this package's models; `step.py` and `quality.py` compare with it.

Its update takes one sample after another and adds up their gradients; encodes prompt and source again for every sample;
rolls out all steps through the LoRA layers, whichever state is queried; and holds a whole copy of the transformer for
each teacher. `ReleasedOptions` improves these one by one. Written from what the released code does, not from its
text; fp32 and the query law are ours, so that the update is the same to rounding and only its cost differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danceopd.data.routing import sample_batch
from danceopd.engine.query import draw_queries, place
from danceopd.engine.trainer import STUDENT
from danceopd.models.backbone import Backbone
from danceopd.models.lora import Adapter
from danceopd.pipelines.condition import Condition
from danceopd.recipe.sampling import Sampling


@dataclass(frozen=True)
class ReleasedOptions:
    """What is improved of the released loop; by default nothing."""

    encode_once: bool = False  # prompts and sources come from a cache
    stop_at_query: bool = False  # a rollout ends at the state that is queried
    merged_weights: bool = False  # rollouts run on W + BA


@dataclass(frozen=True)
class ReleasedTeacher:
    """A teacher's own transformer, its conditions (rows), and a function that encodes one of them again."""

    backbone: Backbone
    condition: Condition
    encode: Callable[[int], Any]


class ReleasedTrainer:
    """Trains a LoRA of `rank` on the transformer of `student`; `update()` makes one optimizer step of `batch` samples.
    """

    def __init__(
        self,
        student: Backbone,
        teachers: Sequence[ReleasedTeacher],
        sigmas: Tensor,
        rank: int,
        batch: int,
        options: ReleasedOptions,
    ) -> None:
        self.student, self.teachers, self.sigmas, self.batch, self.options = student, teachers, sigmas, batch, options
        self.parameters = student.new_student(STUDENT, rank)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)
        self.step = 0

    def update(self) -> None:
        """Samples one after another, then one optimizer step."""
        lengths = [len(teacher.condition) for teacher in self.teachers]
        shares = (1 / len(lengths),) * len(lengths)
        teachers, samples = sample_batch(Sampling(0, 1, self.batch, shares), self.step, lengths)
        query_steps, _ = place(draw_queries(0, self.step, self.batch), self.sigmas)
        for m, row, query_step in zip(teachers, samples, query_steps[:, 0].tolist(), strict=True):
            self._sample(self.teachers[m], row, query_step)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _sample(self, teacher: ReleasedTeacher, row: int, query_step: int) -> None:
        """Roll out one sample, query the teacher at grid index `query_step`, add the gradient."""
        if not self.options.encode_once:
            teacher.encode(row)
        condition = teacher.condition.rows([row])
        x, states = torch.randn(1, *condition.shape), []
        merged = self.student.merged if self.options.merged_weights else self.student.acting_as
        with torch.no_grad(), merged(STUDENT):
            for k in range(query_step + 1 if self.options.stop_at_query else len(self.sigmas) - 1):
                states.append(x.clone())
                if len(states) > query_step and self.options.stop_at_query:
                    break
                velocity = self.student.velocity(x, self.sigmas[k : k + 1], condition)
                x = x + (self.sigmas[k + 1] - self.sigmas[k]) * velocity
        state, sigma = states[query_step], self.sigmas[query_step : query_step + 1]
        with torch.no_grad():
            target = teacher.backbone.velocity(state, sigma, condition)
        with self.student.acting_as(STUDENT):
            loss = (self.student.velocity(state, sigma, condition) - target).square().mean()
        (loss / self.batch).backward()


@torch.no_grad()
def copy_with(transformer: torch.nn.Module, adapter: Adapter, family: Any) -> Backbone:
    """A whole copy of the transformer with an adapter merged into its weights."""
    whole = copy.deepcopy(transformer)
    for path in adapter.tensors:
        whole.get_submodule(path).weight.add_(adapter.delta(path))
    return Backbone(whole, family)
