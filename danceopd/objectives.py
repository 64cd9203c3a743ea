"""What the student learns from a lesson: DanceOPD, and the objectives that people compare it with.

Each is one function of a `Lesson`: it decides at which states the student answers and what it should have said, and
adds the gradient. Errors are means over a row's numbers, fp32, so that they do not grow with the picture; no gradient
goes through a state. Equations, sources and where the released codes differ: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danceopd.lesson import Lesson
from danceopd.recipe import Recipe
from danceopd.sde import Diffusion

Objective = Callable[[Lesson], None]


def velocity_error(student: Tensor, answer: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared difference of each row: ``student`` (with gradient) and ``answer`` (B, …) -> (B,).

    ``tokens`` are weights of a row's tokens, of a shape that stands beside (B, …).
    """
    square = (student.float() - answer.float()).square()
    return (square if tokens is None else tokens * square).flatten(1).mean(1)


def danceopd(lesson: Lesson) -> None:
    """Match the routed teacher's velocity at K drawn states of the student's own walk (arXiv 2606.27377).

    Gates, where there are any, weigh its rows and tokens, move some queries and shift some targets (gating.py).
    """
    gates = lesson.gates
    states = lesson.walk(lesson.stops, lesson.levels) if gates is None else gates.walk(lesson)
    for k in range(states.shape[1]):
        _match(lesson, k, states[:, k])


def offpolicy(lesson: Lesson) -> None:
    """Match the routed teacher's velocity at forward-noised clean pictures: the data's, or the teacher's own."""
    clean = lesson.clean() if lesson.recipe.offpolicy.clean == "targets" else lesson.draw_clean()
    for k in range(lesson.levels.shape[1]):
        _match(lesson, k, _noised(lesson, k, clean)[0])


def supervised(lesson: Lesson) -> None:
    """Joint supervised flow matching: match ``noise - clean`` at forward-noised clean pictures of the data."""
    clean = lesson.clean()
    for k in range(lesson.levels.shape[1]):
        x, noise = _noised(lesson, k, clean)
        _match(lesson, k, x, noise - clean)


def diffusionopd(lesson: Lesson) -> None:
    """Match the teacher's transition at every state of the student's walk (arXiv 2605.15055).

    Two transitions whose means differ by ``g (v - u)`` have the divergence ``g² |v - u|² / (2 s²)``; in the limit
    of no noise it is ``g² |v - u|² / 2`` with ``g`` the step's own length in noise level.
    """
    steps = len(lesson.sigmas) - 1
    states = lesson.walk(lesson.everywhere(steps - 1))
    weights = divergence_weights(*lesson.solver().kernel(lesson.sigmas)).tolist()
    for k, weight in enumerate(weights):
        x, sigma = states[:, k], lesson.level(k)
        answer = lesson.ask(x, sigma)
        error = velocity_error(lesson.velocity(x, sigma), answer)
        lesson.learn(weight * error, sigma, error)


def flowopd(lesson: Lesson) -> None:
    """Clipped policy gradient on the transition KL of random walks (arXiv 2605.08063), advantages not detached.

    The reward of a transition is minus its KL to the teacher's; the baseline is the mean over walks of one question.
    The KL depends on the state alone, so a detached advantage has no expected gradient: what teaches is the
    gradient of the reward itself.
    """
    knobs, solver = lesson.recipe.flowopd, lesson.solver()
    if not isinstance(solver, Diffusion):
        raise ValueError("flowopd needs random walks")
    steps = len(lesson.sigmas) - 1
    states = lesson.walk(lesson.everywhere(steps))
    weights = divergence_weights(*solver.kernel(lesson.sigmas)).tolist()
    for k, weight in enumerate(weights):
        x, sigma, to = states[:, k], lesson.level(k), lesson.level(k + 1)
        answer = lesson.ask(x, sigma)
        velocity = lesson.velocity(x, sigma)
        error = velocity_error(velocity, answer)
        reward = -weight * error
        baseline = reward.detach().unflatten(0, (-1, knobs.group)).mean(1).repeat_interleave(knobs.group)
        step = states[:, k + 1] - solver.mean(x, velocity.float(), sigma, to)
        ratio = probability_ratio(step, lesson.noise(f"walk {k}"), solver.deviation(sigma, to))
        lesson.learn(-clipped(ratio, reward - baseline, knobs.clip), sigma, error, -reward)


def divergence_weights(gain: Tensor, deviation: Tensor) -> Tensor:
    """What the velocity error of each step counts in the KL of its transition: ``g² / (2 s²)``, ``g² / 2`` at s = 0."""
    return gain.square() / (2 * torch.where(deviation > 0, deviation, torch.ones_like(deviation)).square())


def probability_ratio(step: Tensor, drawn: Tensor, deviation: Tensor) -> Tensor:
    """How much likelier the walk's step is now than when it was taken, (B,).

    ``step`` (B, …) is the next state less the mean that the student would now go to, with gradient; ``drawn`` the
    standard normal numbers that took it; ``deviation`` (B,) of the transition. Log-likelihoods are means over a
    row's numbers, as in the released codes.
    """
    now = step / deviation.reshape(-1, *[1] * (step.ndim - 1))
    return torch.exp((drawn.square() - now.square()).flatten(1).mean(1) / 2)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's surrogate (arXiv 1707.06347, eq. 7), (B,): what is to be raised."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def needs_targets(recipe: Recipe) -> bool:
    """Whether the recipe's objective learns from finished pictures of the data."""
    return recipe.objective == "supervised" or (recipe.objective == "offpolicy" and recipe.offpolicy.clean == "targets")


def _match(lesson: Lesson, k: int, x: Tensor, answer: Tensor | None = None) -> None:
    """Learn the velocity at the lesson's k-th queries; `answer` None: the teachers'."""
    sigma, weight = lesson.levels[:, k].to(lesson.device), lesson.weights[:, k].to(lesson.device)
    answer = lesson.ask(x, sigma) if answer is None else answer
    if lesson.gates is None:
        error = velocity_error(lesson.velocity(x, sigma), answer)
        lesson.learn(weight * error / lesson.levels.shape[1], sigma, error)
        return
    heard = lesson.gates.ask(lesson, x, sigma, answer)  # all that is frozen, before the student's gradient
    velocity = lesson.velocity(x, sigma)
    trust = heard.trust(velocity.detach())
    error = velocity_error(velocity, trust.target, trust.tokens)
    plain = velocity_error(velocity.detach(), answer)
    lesson.learn(weight * (trust.weights * error) / lesson.levels.shape[1], sigma, plain, gate=trust.figures)


def _noised(lesson: Lesson, k: int, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents at the k-th queries' noise levels, and the noise."""
    noise = lesson.noise(f"forward {k}")
    sigma = lesson.levels[:, k].to(lesson.device).reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise, noise


OBJECTIVES: dict[str, Objective] = {
    f.__name__: f for f in (danceopd, diffusionopd, flowopd, offpolicy, supervised)
}
