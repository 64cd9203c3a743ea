"""On-policy distillation (DanceOPD, arXiv 2606.27377), as a loop.

One update draws a teacher, a sample and a query for each row; batches of one layout are rolled out by the student to
their queries, the routed teachers are queried there, and the student's velocity is matched to theirs; one optimizer
step follows. Everything drawn is a function of (seed, step), so a run continues exactly where it stopped, and each of
several processes learns its own rows of the same update. Optional parts are a hook and callbacks (callbacks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from danceopd.engine.batches import Batches
from danceopd.engine.callbacks import Callback, QueryHook
from danceopd.engine.metrics import MetricSums, StepMetrics
from danceopd.engine.objectives import Objective, objective_of
from danceopd.engine.optimizer import StudentOptimizer
from danceopd.engine.rollout import StudentRollout
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.velocities import Velocities
from danceopd.models.backbone import Backbone
from danceopd.models.cuda_graphs import CapturedField
from danceopd.models.fields import AdapterField, MergedField
from danceopd.models.lora import Adapter
from danceopd.pipelines.condition import Condition
from danceopd.recipe.recipe import Recipe

STUDENT, EMA = "student", "ema"
"""Names on the backbone: the trained adapter, and its average, which is sampled, validated and exported."""


class Trainer:
    """Trains the adapter `STUDENT` of `backbone`; `field` is that student as it rolls out (None: plainly).

    As process `rank` of `world` it learns its own rows; `all_reduce` sums a tensor over the processes, in place, so
    that the gradients add up to those of the whole update's mean loss.
    """

    def __init__(
        self, recipe: Recipe, backbone: Backbone, teachers: Sequence[RoutedTeacher], device: torch.device,
        rank: int = 0, world: int = 1, all_reduce: Callable[[Tensor], None] = lambda tensor: None,
        field: AdapterField | MergedField | CapturedField | None = None, hook: QueryHook | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        self.backbone, self.device, self.steps, self.rows = backbone, device, recipe.steps, recipe.batch
        self.world, self.all_reduce, self.hook, self.callbacks = world, all_reduce, hook, list(callbacks)
        self.batches = Batches(recipe, teachers, device, rank, world)
        self.objective: Objective = objective_of(recipe.objective, recipe.objective_arguments)
        self.optimizer = StudentOptimizer(
            backbone.parameters(STUDENT), recipe.optimizer, recipe.ema, recipe.steps, recipe.dtype == "fp16"
        )
        self.merged = bool(recipe.rollout.merged)
        field = field or (MergedField if self.merged else AdapterField)(backbone, STUDENT)
        rollout = StudentRollout(field, recipe.rollout)
        self.velocities = Velocities(
            rollout, self._student_velocity, [t.field for t in self.teachers], recipe.small_steps, not recipe.compile
        )
        self.merge_weights = self.merged and not recipe.compile and backbone.merging_is_cheaper(STUDENT)
        self.step, self.ended, self.should_stop = 0, 0, False  # `ended`: the last step whose callbacks have run

    @property
    def teachers(self) -> list[RoutedTeacher]:
        return self.batches.teachers

    def train(self) -> None:
        """Update until the recipe's steps are done or a callback stops."""
        for callback in self.callbacks:
            callback.on_train_start(self)
        self.ended = self.step
        while self.step < self.steps and not self.should_stop:
            for callback in self.callbacks:
                callback.on_step_start(self)
            metrics = self.train_step()
            self.step += 1
            for callback in self.callbacks:
                callback.on_step_end(self, metrics)
                if self.step != metrics.step:  # it restored an earlier state: this step no longer counts
                    break
            self.ended = self.step

    def train_step(self) -> StepMetrics:
        """One update: draw, roll out, query the routed teachers, match, step."""
        metrics = StepMetrics(self.step + 1)
        names = () if self.hook is None else self.hook.metric_names
        sums = MetricSums([teacher.name for teacher in self.teachers], self.device, names)
        draw = self.batches.draw(self.step)
        if self.hook is not None:
            self.hook.begin_step(self.step, draw)
        for batch in self.batches.of(self.step, draw, self.hook):
            queries = []
            for query in self.objective(batch, self.velocities):
                (query.loss.sum() / self.rows).backward()
                queries.append(query.detach())
            sums.add(batch, queries)
        if self.world > 1:
            self._all_reduce_gradients()
        means = sums.mean(metrics, self.all_reduce)
        if self.hook is not None:
            metrics.extra |= self.hook.summary(means)
            self.hook.end_step(self.all_reduce)
        self.optimizer.step(self.step, metrics)
        return metrics

    def ema_adapter(self, weights: Sequence[Tensor] | None = None) -> Adapter:
        """The averaged student on the CPU; `weights` (A and B of each module alternate) in place of the present ones.
        """
        ema = self.optimizer.ema if weights is None else weights
        pairs = zip(self.backbone.modules(STUDENT), ema[::2], ema[1::2], strict=True)
        return Adapter({module: (a.cpu().clone(), b.cpu().clone()) for module, a, b in pairs})

    def ema_field(self, adapter: Adapter | None = None, merged: bool | None = None) -> AdapterField | MergedField:
        """The averaged student as a frozen field, from the one adapter `EMA`; the field before is overwritten.

        `merged` None: where rollouts are.
        """
        merged = self.merged if merged is None else merged
        adapter = self.ema_adapter() if adapter is None else adapter
        if EMA in self.backbone.adapters:
            self.backbone.assign(EMA, adapter)
        else:
            self.backbone.add_adapter(EMA, adapter)
        return (MergedField if merged else AdapterField)(self.backbone, EMA)

    def release(self) -> None:
        """Drop all that only training needs, for what comes after it: gradients, Adam, EMA, adapters, merged weights.

        The backbone's transformer is the bare base then; this trainer trains no more.
        """
        self.optimizer.adamw.zero_grad(set_to_none=True)
        self.optimizer.adamw.state.clear()
        self.optimizer.ema, self.optimizer.parameters = [], []
        self.optimizer.adamw.param_groups.clear()
        rollouts = self.velocities.rollout.field
        if isinstance(rollouts, CapturedField):
            rollouts.clear()
        self.backbone.remove_adapters()

    def _student_velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """With a gradient to the adapter."""
        merged = self.backbone.merged_with_grad(STUDENT) if self.merge_weights else self.backbone.acting_as(STUDENT)
        with merged:
            velocity = self.backbone.velocity(x, sigma, condition)
        if self.optimizer.scaler.is_enabled():  # from here the gradient goes through fp16
            velocity.register_hook(self.optimizer.scaler.scale)
        return velocity

    def _all_reduce_gradients(self) -> None:
        """All in one tensor; a process without rows adds zeros."""
        parameters = self.optimizer.parameters
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, EMA, optimizer and hook, by flat names."""
        return self.optimizer.state_dict() | ({} if self.hook is None else self.hook.state_dict())

    def load_state_dict(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Put a saved `state_dict` back, of after update `step`."""
        self.step = step
        self.optimizer.load_state_dict(state)
        if self.hook is not None:
            self.hook.load_state_dict(state)
