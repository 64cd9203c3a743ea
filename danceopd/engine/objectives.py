"""What the student learns from a batch: DanceOPD's velocity matching, and the objectives it is compared with.

An objective is `objective(batch, velocities) -> Iterator[RowLoss]`: it decides at which states the student is queried
and what it should have said there, and yields a loss for each query, one graph at a time; the trainer calls `backward`
before it asks for the next. Errors are means over a row's numbers, fp32, so that they do not grow with the picture; no
gradient goes through a state. Equations, sources and where the released codes differ: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims
from danceopd.engine.batches import Batch
from danceopd.engine.solvers import FlowSDE
from danceopd.engine.velocities import Velocities
from danceopd.errors import UserError
from danceopd.plugins import check_options, load


@dataclass(frozen=True)
class RowLoss:
    """One query of B rows: `loss (B,)` with its graph, the noise level, the mean squared velocity error.

    `reported` is what to log where the loss's value says nothing; `metrics` are further figures by name, (B,) each.
    """

    loss: Tensor
    sigma: Tensor
    error: Tensor
    reported: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def detach(self) -> RowLoss:
        """Without graphs; the loss is the one to report."""
        reported = self.loss if self.reported is None else self.reported
        return RowLoss(reported.detach(), self.sigma, self.error.detach(), None, self.metrics)


Objective = Callable[[Batch, Velocities], Iterator[RowLoss]]
MOVED = "moved"
"""The metric of `nft` that says how far the student is from what drew its samples, squared."""


def velocity_error(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared difference of each row: ``student`` (with gradient) and ``teacher`` (B, …) -> (B,).

    ``tokens`` are weights of a row's tokens, of a shape that broadcasts to (B, …).
    """
    square = (student.float() - teacher.float()).square()
    return (square if tokens is None else tokens * square).flatten(1).mean(1)


def danceopd(batch: Batch, velocities: Velocities) -> Iterator[RowLoss]:
    """Match the routed teacher's velocity at K drawn states of the student's own trajectory (arXiv 2606.27377)."""
    if batch.hook is not None:  # it may move queries
        states = batch.hook.rollout(batch, velocities)
    else:
        states = velocities.rollout(batch, batch.query_step, batch.query_sigma)
    for k in range(states.shape[1]):
        yield _match(batch, velocities, k, states[:, k])


def offpolicy(batch: Batch, velocities: Velocities, clean: str = "targets") -> Iterator[RowLoss]:
    """Match the routed teacher's velocity at forward-noised clean pictures: the data's, or the teacher's own."""
    x0 = batch.clean() if clean == "targets" else velocities.teacher_samples(batch)
    for k in range(batch.query_sigma.shape[1]):
        yield _match(batch, velocities, k, _noised(batch, k, x0)[0])


def supervised(batch: Batch, velocities: Velocities) -> Iterator[RowLoss]:
    """Joint supervised flow matching: match ``noise - clean`` at forward-noised clean pictures of the data."""
    x0 = batch.clean()
    for k in range(batch.query_sigma.shape[1]):
        x, noise = _noised(batch, k, x0)
        yield _match(batch, velocities, k, x, noise - x0)


def diffusionopd(batch: Batch, velocities: Velocities) -> Iterator[RowLoss]:
    """Match the teacher's transition at every state of the student's trajectory (arXiv 2605.15055).

    Two transitions whose means differ by ``g (v - u)`` have the divergence ``g² |v - u|² / (2 s²)``; in the limit
    of no noise it is ``g² |v - u|² / 2`` with ``g`` the step's own length in noise level.
    """
    steps = len(batch.sigmas) - 1
    states = velocities.rollout(batch, _every_step(batch, steps - 1))
    weights = divergence_weights(*velocities.rollout.solver(batch).kernel(batch.sigmas)).tolist()
    for k, weight in enumerate(weights):
        x, sigma = states[:, k], batch.sigma_at(k)
        teacher = velocities.teacher(batch, x, sigma)
        error = velocity_error(velocities.student(batch, x, sigma), teacher)
        yield RowLoss(weight * error, sigma, error)


def flowopd(batch: Batch, velocities: Velocities, group: int = 8, clip: float = 1e-4) -> Iterator[RowLoss]:
    """Clipped policy gradient on the transition KL of stochastic rollouts (arXiv 2605.08063), advantages not detached.

    The reward of a transition is minus its KL to the teacher's; the baseline is the mean over `group` rollouts of one
    sample. The KL depends on the state alone, so a detached advantage has no expected gradient: what teaches is the
    gradient of the reward itself.
    """
    solver = velocities.rollout.solver(batch)
    if not isinstance(solver, FlowSDE):
        raise ValueError("flowopd needs stochastic rollouts")
    steps = len(batch.sigmas) - 1
    states = velocities.rollout(batch, _every_step(batch, steps))
    weights = divergence_weights(*solver.kernel(batch.sigmas)).tolist()
    for k, weight in enumerate(weights):
        x, sigma, to = states[:, k], batch.sigma_at(k), batch.sigma_at(k + 1)
        teacher = velocities.teacher(batch, x, sigma)
        velocity = velocities.student(batch, x, sigma)
        error = velocity_error(velocity, teacher)
        reward = -weight * error
        baseline = reward.detach().unflatten(0, (-1, group)).mean(1).repeat_interleave(group)
        step = states[:, k + 1] - solver.mean(x, velocity.float(), sigma, to)
        ratio = probability_ratio(step, batch.noise(f"walk {k}"), solver.deviation(sigma, to))
        yield RowLoss(-clipped(ratio, reward - baseline, clip), sigma, error, -reward)


def nft(
    batch: Batch, velocities: Velocities, beta: float = 1.0, share: float = 1.0, anchor: float = 0.0
) -> Iterator[RowLoss]:
    """Towards the better of the student's own samples, away from the worse (DiffusionNFT, arXiv 2509.16117).

    A `share` of the loss is `r |v+ - u|² + (1 - r) |v- - u|²` at the samples, noised, with `u = noise - clean`, and
    `anchor |v - teacher|²` there beside it; the rest is `danceopd`'s. Without ranked samples all of it is.
    """
    ranked = batch.ranked
    if ranked is None or share < 1:
        rest = 1.0 if ranked is None else 1 - share
        for one in danceopd(batch, velocities):
            yield replace(one, loss=rest * one.loss)
    if ranked is None:
        return
    queries = batch.query_sigma.shape[1]
    for k in range(queries):
        sigma = batch.query_sigma[:, k].to(batch.device)
        x, noise = _noised(batch, k, ranked.clean)
        old = ranked.old(x, sigma, batch.condition)
        teacher = velocities.teacher(batch, x, sigma) if anchor else None
        velocity, target = velocities.student(batch, x, sigma).float(), noise - ranked.clean
        loss = contrasted_error(velocity, old, target, ranked.optimality, beta)
        if teacher is not None:
            loss = loss + anchor * velocity_error(velocity, teacher)
        weight = batch.query_weight[:, k].to(batch.device) * ranked.weights(sigma)
        moved = velocity_error(velocity.detach(), old)
        error = velocity_error(velocity.detach(), target)
        yield RowLoss(share * weight * loss / queries, sigma, error, metrics={**ranked.metrics, MOVED: moved})


def contrasted_error(velocity: Tensor, old: Tensor, target: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """`r |v+ - u|² + (1 - r) |v- - u|²` (B,), `v+ = (1 - β) old + β v`, `v- = (1 + β) old - β v`.

    `velocity` with gradient, `old` and `target` without, (B, …) each; `optimality` r (B,).
    """
    step = beta * (velocity - old)
    good, bad = velocity_error(old + step, target), velocity_error(old - step, target)
    return optimality * good + (1 - optimality) * bad


def divergence_weights(gain: Tensor, deviation: Tensor) -> Tensor:
    """Weight of each step's velocity error in the KL of its transition: ``g² / (2 s²)``, ``g² / 2`` at s = 0."""
    return gain.square() / (2 * torch.where(deviation > 0, deviation, torch.ones_like(deviation)).square())


def probability_ratio(step: Tensor, noise: Tensor, deviation: Tensor) -> Tensor:
    """How much likelier the rollout's step is now than when it was taken, (B,).

    ``step`` (B, …) is the next state less the mean that the student would now go to, with gradient; ``noise`` the
    standard normal numbers that took it; ``deviation`` (B,) of the transition. Log-likelihoods are means over a
    row's numbers, as in the released codes.
    """
    now = step / append_dims(deviation, step)
    return torch.exp((noise.square() - now.square()).flatten(1).mean(1) / 2)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's surrogate (arXiv 1707.06347, eq. 7), (B,): what is to be raised."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def _match(batch: Batch, velocities: Velocities, k: int, x: Tensor, target: Tensor | None = None) -> RowLoss:
    """Match the velocity at the batch's k-th queries; `target` None: the teachers'."""
    sigma, weight = batch.query_sigma[:, k].to(batch.device), batch.query_weight[:, k].to(batch.device)
    queries = batch.query_sigma.shape[1]
    target = velocities.teacher(batch, x, sigma) if target is None else target
    if batch.hook is None:
        error = velocity_error(velocities.student(batch, x, sigma), target)
        return RowLoss(weight * error / queries, sigma, error)
    answers = batch.hook.query(batch, velocities, x, sigma, target)  # all that is frozen, before the student's gradient
    velocity = velocities.student(batch, x, sigma)
    gate = answers.weights(velocity.detach())
    error = velocity_error(velocity, gate.target, gate.tokens)
    plain = velocity_error(velocity.detach(), target)
    return RowLoss(weight * (gate.rows * error) / queries, sigma, plain, metrics=gate.metrics)


def _every_step(batch: Batch, last: int) -> Tensor:
    """Grid indices (B, last + 1): every one up to `last`."""
    return torch.arange(last + 1).expand(len(batch), last + 1)


def _noised(batch: Batch, k: int, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents at the k-th queries' noise levels, and the noise."""
    noise = batch.noise(f"forward {k}")
    sigma = append_dims(batch.query_sigma[:, k].to(batch.device), clean)
    return (1 - sigma) * clean + sigma * noise, noise


OBJECTIVES: dict[str, Callable[..., Iterator[RowLoss]]] = {
    f.__name__: f for f in (danceopd, diffusionopd, flowopd, offpolicy, supervised, nft)
}


def objective_of(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective of a name with its options; a plug-in's losses are looked at as they come.

    UserError as `load`, for options that it does not take, and for anything but a loss with a gradient for each row.
    """
    function = load("objective", name, OBJECTIVES)
    if name in OBJECTIVES:
        return partial(function, **options)
    check_options("objective", name, function, options)

    def objective(batch: Batch, velocities: Velocities) -> Iterator[RowLoss]:
        found = None
        for found in function(batch, velocities, **options) or ():
            if not isinstance(found, RowLoss) or found.loss.shape != (len(batch),) or not found.loss.requires_grad:
                loss = getattr(found, "loss", found)
                what = f"a {type(found).__name__}"
                what += f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
                raise UserError(
                    f"objective {name} yielded {what} for {len(batch)} rows; let it yield RowLoss(loss, sigma, error) "
                    "with one loss a row, made of velocities.student, which has the gradient"
                )
            yield found
        if found is None:
            raise UserError(f"objective {name} yielded no RowLoss; let it yield one for each query")

    return objective
