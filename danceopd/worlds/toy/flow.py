"""`Trainer`: supervised flow matching, for the small base from scratch and for teachers as LoRAs on it.

``v = noise - clean`` is regressed at ``x = (1 - sigma) clean + sigma noise`` with sigma = sigmoid(N(m, s)), m above 0:
composition is decided at high noise, and so is what an edit leaves unchanged. Matrices of the blocks are trained by
Muon, all else by AdamW; the exponential average of the weights is kept. Every step is a function of (seed, step) and of
the saved state, so an interrupted run continues to the same weights; one that is continued to more steps has its
learning rate rise again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from danceopd.common.signals import Interrupts
from danceopd.errors import UserError
from danceopd.models.lora import Adapter
from danceopd.worlds.toy.batches import Batch, Batches
from danceopd.worlds.toy.small import SHIFT
from danceopd.worlds.toy.state import load_state, save_state

SAVE_EVERY = 200
CHANGED = 8.0
"""Extra loss weight of tokens that an edit changes: in a local edit that is one token of sixteen."""


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates: warm up, hold, then fall linearly to zero over the last ``decay`` share.

    ``noise`` is the mean and the deviation of the noise level's logit.
    """

    steps: int
    muon: float = 3e-3
    adamw: float = 2e-3
    warmup: int = 50
    decay: float = 0.5
    ema: float = 0.998
    guidance: float = 1.0
    noise: tuple[float, float] = (1.0, 1.0)

    def factor(self, step: int) -> float:
        """Multiplier of the learning rates at a step."""
        rising = min(1.0, (step + 1) / self.warmup)
        return rising * min(1.0, (self.steps - step) / (self.decay * self.steps))


def velocity(model: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, source: Tensor | None) -> Tensor:
    """The transformer's velocity (n, 16, C) at tokens x (n, 16, C), sigma (n,)."""
    tokens = x if source is None else torch.cat([x, source], dim=1)
    return model(
        hidden_states=tokens,
        timestep=sigma,
        encoder_hidden_states=text,
        txt_ids=_ids(text.shape[1], text=True),
        img_ids=_ids(tokens.shape[1]),
        return_dict=False,
    )[0][:, : x.shape[1]]


def _ids(count: int, text: bool = False) -> Tensor:
    """Position ids (count, 4) in klein's layout: (time, row, column, word); a source has time 10."""
    ids = torch.zeros(count, 4)
    place = torch.arange(count)
    if text:
        ids[:, 3] = place
    else:
        ids[:, 0], ids[:, 1], ids[:, 2] = 10 * (place // 16), place % 16 // 4, place % 4
    return ids


def loss_of(model: nn.Module, batch: Batch, generator: torch.Generator, schedule: Schedule) -> Tensor:
    """Mean squared velocity error of a batch; tokens that an edit changes weigh `1 + CHANGED`, the others 1.

    With the schedule's ``guidance`` s above 1 the target moves by 1 - 1/s of the model's own difference between prompt
    and no prompt. Its fixed point is the guided velocity ``v0 + s (v - v0)``, so the trained model needs no guidance
    when it is sampled (model guidance, arXiv 2502.12154).
    """
    n, guidance, (mean, deviation) = len(batch.clean), schedule.guidance, schedule.noise
    noise = torch.randn(batch.clean.shape, generator=generator)
    sigma = torch.sigmoid(mean + deviation * torch.randn(n, generator=generator))
    mixed = torch.lerp(batch.clean, noise, sigma[:, None, None])
    v = velocity(model, mixed, sigma, batch.text, batch.source)
    target = noise - batch.clean
    if guidance > 1:
        with torch.no_grad():
            v_null = velocity(model, mixed, sigma, batch.empty.expand_as(batch.text), batch.source)
            prompted = (batch.text != batch.empty).flatten(1).any(1)[:, None, None]
            target = target + (1 - 1 / guidance) * prompted * (v.detach() - v_null)
    error = (v - target).square().mean(-1)
    if batch.source is None:
        return error.mean()
    weight = 1 + CHANGED * (batch.clean != batch.source).any(-1)
    return (weight * error).sum() / weight.sum()


def optimizers(parameters: Iterable[tuple[str, Tensor]], schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (and a LoRA's factors there), AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in parameters:
        (matrices if parameter.ndim == 2 and "blocks." in name else rest).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=schedule.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        found.append(torch.optim.AdamW(rest, lr=schedule.adamw, weight_decay=0.0, betas=(0.9, 0.99)))
    return found


class LoraTransformer(nn.Module):
    """A frozen transformer with weights `W + B A`, computed once a call: with few tokens cheaper than LoRA layers.

    ``factors`` maps ``<module>.lora_A`` (r, in) and ``<module>.lora_B`` (out, r) to what is trained.
    """

    def __init__(self, transformer: nn.Module, modules: Iterable[str], rank: int, seed: int) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(False)
        self.factors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            linear: Any = transformer.get_submodule(module)
            out_features, in_features = linear.weight.shape
            a = (2 * torch.rand(rank, in_features, generator=generator) - 1) * in_features**-0.5
            self.factors[f"{module}.lora_A"] = a.requires_grad_()
            self.factors[f"{module}.lora_B"] = torch.zeros(out_features, rank).requires_grad_()

    def forward(self, **call: Tensor) -> tuple[Tensor, ...]:
        weights = {}
        for name, a in self.factors.items():
            module, _, half = name.rpartition(".")
            if half == "lora_A":
                linear: Any = self.transformer.get_submodule(module)
                weights[f"{module}.weight"] = torch.addmm(linear.weight, self.factors[f"{module}.lora_B"], a)
        return torch.func.functional_call(self.transformer, weights, kwargs=call)

    @torch.no_grad()
    def start(self, adapter: Adapter) -> None:
        """Take the values of a LoRA of the same layers and rank; UserError for one of other layers."""
        if missing := {name.rpartition(".")[0] for name in self.factors} ^ set(adapter.tensors):
            raise UserError(f"the LoRA to start from has other layers ({min(missing)}); give one that this stage wrote")
        for module, (a, b) in adapter.tensors.items():
            self.factors[f"{module}.lora_A"].copy_(a)
            self.factors[f"{module}.lora_B"].copy_(b)

    @staticmethod
    def adapter(factors: dict[str, Tensor]) -> Adapter:
        """The factors (or their average) as an adapter."""
        modules = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
        return Adapter({m: (factors[f"{m}.lora_A"].detach(), factors[f"{m}.lora_B"].detach()) for m in modules})


class FlowTrainer:
    """Trains ``parameters`` of ``model``; ``run`` returns their exponential average.

    ``facts`` describe the training besides its schedule and seed: a saved one with others is not continued.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        batches: Batches,
        schedule: Schedule,
        folder: Path,
        **facts: object,
    ) -> None:
        self.meta = {**asdict(schedule), "seed": batches.seed, **facts}
        del self.meta["steps"]
        self.model, self.parameters, self.batches = model, parameters, batches
        self.schedule, self.folder = schedule, folder
        self.average = {n: p.detach().clone() for n, p in parameters.items()}
        self.optimizers = optimizers(parameters.items(), schedule)
        self.step = 0

    def run(self, report: Callable[[int, float], None]) -> dict[str, Tensor]:
        """Train to the end; ``report(step, loss)`` is called after every step. A signal that came ends it after a
        save."""
        self.step = load_state(self.folder, self.parameters, self.average, self.optimizers, self.meta)
        with Interrupts() as interrupts:
            while self.step < self.schedule.steps:
                loss = self._update()
                self.step += 1
                report(self.step, loss)
                if self.step % SAVE_EVERY == 0 or self.step == self.schedule.steps or interrupts.caught:
                    save_state(self.folder, self.step, self.parameters, self.average, self.optimizers, self.meta)
                interrupts.end()
        return self.average

    def _update(self) -> float:
        factor = self.schedule.factor(self.step)
        for optimizer, rate in zip(self.optimizers, self._rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        generator = torch.Generator().manual_seed(1_000_003 * self.batches.seed + self.step)
        loss = loss_of(self.model, self.batches(self.step), generator, self.schedule)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay
        )
        return loss.item()

    def _rates(self) -> list[float]:
        return [self.schedule.muon, self.schedule.adamw][: len(self.optimizers)]


@torch.no_grad()
def sample(
    model: Flux2Transformer2DModel,
    text: Tensor,
    source: Tensor | None = None,
    steps: int = 10,
    seed: int = 0,
    guidance: float = 1.0,
    empty: Tensor | None = None,
) -> Tensor:
    """Euler samples (n, 16, C) on the shifted grid; ``guidance`` above 1 needs the text states of ``""``."""
    n = len(text)
    x = torch.randn(n, 16, model.config.in_channels, generator=torch.Generator().manual_seed(seed))
    grid = torch.linspace(1, 1 / steps, steps)
    grid = torch.cat([SHIFT * grid / (1 + (SHIFT - 1) * grid), torch.zeros(1)])
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        v = velocity(model, x, now.expand(n), text, source)
        if guidance > 1 and empty is not None:
            v_null = velocity(model, x, now.expand(n), empty.expand(n, -1, -1), source)
            v = v_null + guidance * (v - v_null)
        x = x + (then - now) * v
    return x
