"""The student's optimizer: AdamW on the adapter, warm-up and decay, clipping, the fp16 loss scale, and the EMA.

An update whose loss or gradient is not finite is skipped; too many in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from danceopd.engine.metrics import StepMetrics
from danceopd.errors import UserError
from danceopd.recipe.parts import Optimizer

MAX_SKIPPED = 5
"""Updates in a row whose loss may be NaN or infinite before the run gives up."""
MAX_SAME = 10
"""Updates whose gradient may be exactly zero before the first that changes a weight: a teacher may equal the student's
init, or adapt only one of two transformers, and a small batch may ask for no other."""
MIN_LOSS_SCALE = 1.0
"""The loss scale of an fp16 backbone below which an infinite gradient is no longer the scale's fault."""


class Diverged(UserError):
    """The loss was not finite for `MAX_SKIPPED` updates in a row, or the student's velocity is not; `last` is the
    update that made it so."""

    def __init__(self, sentence: str, last: int) -> None:
        super().__init__(sentence)
        self.last = last


class StudentOptimizer:
    """Updates `parameters` (A, B of each module) for `steps` updates; `ema` are their averages, in the same order."""

    def __init__(
        self, parameters: Sequence[Parameter], options: Optimizer, ema_decay: float, steps: int, fp16: bool = False
    ) -> None:
        self.parameters, self.options, self.ema_decay, self.steps = list(parameters), options, ema_decay, steps
        self.ema = [p.detach().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.scaler.scale(torch.ones((), device=device))  # makes its state now: there may be no row to scale
        self.skipped, self.updating = 0, False
        self.idle = 0  # updates in a row, up to now, that changed no weight

    def lr(self, step: int) -> float:
        """The learning rate of an update: warm-up, then constant, or linear or cosine decay to zero."""
        factor = min(1.0, (step + 1) / max(1, self.options.warmup))
        if self.options.schedule == "cosine":
            factor *= 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())
        elif self.options.schedule == "linear":
            factor *= 1 - step / self.steps
        return self.options.lr * factor

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Clip, step and average by the gradients that are there; writes what it did into `metrics`.

        UserError after `MAX_SAME` gradients of exactly zero, and after `MAX_SKIPPED` updates that were not finite.
        """
        self.scaler.unscale_(self.adamw)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip))
        metrics.grad_norm, metrics.lr = norm, self.lr(step)
        if self.scaler.is_enabled():
            metrics.loss_scale = self.scaler.get_scale()
            self.scaler.update()
        if not (math.isfinite(norm) and metrics.loss == metrics.loss):
            self._skip(step, metrics)
            return
        if norm == 0.0 and not self.adamw.state:
            self.idle, metrics.skipped = self.idle + 1, True
            self.adamw.zero_grad(set_to_none=True)
            if self.idle >= min(MAX_SAME, self.steps):
                raise UserError(
                    f"the student's gradient is exactly zero up to step {step + 1}: teacher and student are the same "
                    "model; give teachers that differ from the student's init"
                )
            return
        self.skipped = self.idle = 0
        for group in self.adamw.param_groups:
            group["lr"] = metrics.lr
        self.updating = True  # until the end of it the weights are of no step
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        self.updating = False

    def _skip(self, step: int, metrics: StepMetrics) -> None:
        """Forget this update; where the fp16 loss scale was too large it is less now, and nothing is amiss."""
        overflow = metrics.loss == metrics.loss and (metrics.loss_scale or 0.0) > MIN_LOSS_SCALE
        self.skipped, self.idle, metrics.skipped = self.skipped + (not overflow), self.idle + 1, True
        self.adamw.zero_grad(set_to_none=True)
        if self.skipped >= MAX_SKIPPED:
            raise Diverged(
                f"the loss was NaN or infinite {MAX_SKIPPED} updates in a row at step {step + 1}; "
                f"lower optimizer.lr (now {self.options.lr:g}) or check the teachers",
                step + 1 - self.idle,
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, EMA, Adam's moments and the loss scale, by flat names."""
        out: dict[str, Tensor] = {}
        for i, (weight, ema) in enumerate(zip(self.parameters, self.ema, strict=True)):
            out[f"weight.{i}"], out[f"average.{i}"] = weight.detach(), ema
            for key, value in self.adamw.state.get(weight, {}).items():
                out[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
        for key, value in self.scaler.state_dict().items():
            out[f"scaler.{key}"] = torch.tensor(value, dtype=torch.float64)
        out["skipped"] = torch.tensor(self.skipped)
        return out

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved `state_dict` back."""
        self.skipped = self.idle = int(state.get("skipped", torch.tensor(0)))
        scaler = {k.removeprefix("scaler."): v.item() for k, v in state.items() if k.startswith("scaler.")}
        if scaler:
            self.scaler.load_state_dict(scaler | {k: int(scaler[k]) for k in ("growth_interval", "_growth_tracker")})
        self.adamw.state.clear()  # a state of before the first update has none
        for i, (weight, ema) in enumerate(zip(self.parameters, self.ema, strict=True)):
            weight.copy_(state[f"weight.{i}"])
            ema.copy_(state[f"average.{i}"])
            prefix = f"optimizer.{i}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if moments:
                self.adamw.state[weight] = {k: v if k == "step" else v.to(weight) for k, v in moments.items()}
