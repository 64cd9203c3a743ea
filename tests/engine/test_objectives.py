"""Every objective's gradient against an exact one: linear students on Gaussian flows, expectations by formula.

The reference never rolls out: it carries mean and variance of the states through the schedule, and differentiates
the expected loss that each paper states.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch
from flows import Gaussian, Rows, shifted

from danceopd.engine.batches import Batch
from danceopd.engine.objectives import OBJECTIVES, RowLoss, clipped, probability_ratio
from danceopd.engine.query import draw_queries
from danceopd.engine.rollout import StudentRollout
from danceopd.engine.solvers import AdamsBashforth, Euler, FlowSDE
from danceopd.engine.velocities import Velocities
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe

TEACHERS = [Gaussian(0.8, 0.4), Gaussian(-0.5, 0.9)]
SIGMAS = shifted(6, 3.0)
ROWS, WIDTH = 2048, 8


class Linear:
    """The student `(p0 + p1 σ) x + p2 + p3 σ`."""

    def __init__(self) -> None:
        self.p = torch.tensor([0.6, -0.2, -0.3, 0.5], requires_grad=True)

    def line(self, sigma, p=None):
        p = self.p if p is None else p
        return p[0] + p[1] * sigma, p[2] + p[3] * sigma

    def __call__(self, x, sigma, condition=None):
        slope, offset = self.line(sigma.reshape(-1, *[1] * (x.ndim - 1)))
        return slope * x + offset


@pytest.fixture
def update(files):
    """`update(objective, step, student, **recipe)`: the batch of one update, and its velocities; each step draws anew.

    Half the rows go to each teacher.
    """

    def make(objective: str, step: int, student: Linear, **fields) -> tuple[Recipe, Batch, Velocities]:
        recipe = Recipe(**files, batch=ROWS, objective=objective, **fields)
        query = recipe.query
        group = recipe.flowopd.group if objective == "flowopd" else 1
        index = [row // group % 2 for row in range(ROWS)]
        own = torch.tensor(index)[:, None]
        generator = torch.Generator().manual_seed(10_000 + step)
        clean = torch.randn(ROWS, WIDTH, generator=generator)
        means, scales = (torch.tensor([getattr(t, name) for t in TEACHERS])[own] for name in ("mean", "scale"))
        batch = Batch(
            seed=recipe.seed,
            step=step,
            name="0",
            global_size=ROWS,
            rows=list(range(ROWS)),
            teacher_index=index,
            unconditional=[False] * ROWS,
            condition=Rows(ROWS, (WIDTH,)),
            null_condition=None,
            sigmas=SIGMAS,
            query=query,
            query_draws=draw_queries(recipe.seed, step, ROWS, query.count, query.law, query.beta),
            device=torch.device("cpu"),
            targets=lambda: means + scales * clean,
        )
        field = StudentRollout(lambda x, s, c: student(x, s).detach(), recipe.rollout)
        return recipe, batch, Velocities(field, student, TEACHERS)

    return make


def backward(recipe: Recipe, batch: Batch, velocities: Velocities) -> list[RowLoss]:
    """Add the objective's gradient, as the trainer does; its row losses."""
    found = []
    for query in OBJECTIVES[recipe.objective](batch, velocities, **recipe.objective_arguments):
        (query.loss.sum() / ROWS).backward()
        found.append(query.detach())
    return found


def gradient(update, objective: str, steps: int = 8, **fields) -> torch.Tensor:
    """The objective's gradient (steps, 4), one row for each of `steps` updates."""
    found = []
    for step in range(steps):
        student = Linear()
        backward(*update(objective, step, student, **fields))
        found.append(student.p.grad.clone())
    return torch.stack(found)


def error(student, p, teacher, sigma, mean, variance):
    """E[(student - teacher)²] over a Gaussian state, both linear; gradient through `p` alone."""
    (a, b), (c, d) = student.line(sigma, p), teacher.line(sigma)
    return (a - c) ** 2 * (variance + mean**2) + 2 * (a - c) * (b - d) * mean + (b - d) ** 2


def state_moments(student, solver, sigmas=SIGMAS):
    """(mean, variance) of the student's states at every grid point, by the affine map that each step is."""
    mean, variance, moments = torch.zeros(()), torch.ones(()), []
    assert not isinstance(solver, AdamsBashforth)
    for sigma, to in zip(sigmas[:-1], sigmas[1:]):
        moments.append((mean, variance))
        a, b = (value.detach() for value in student.line(sigma))
        if isinstance(solver, FlowSDE):
            one = torch.ones(1, 1)
            keep = solver.mean(one, 0 * one, sigma[None], to[None])[0, 0]
            gain = solver.mean(0 * one, one, sigma[None], to[None])[0, 0]
            noise = solver.deviation(sigma[None], to[None])[0]
        else:
            keep, gain, noise = torch.ones(()), to - sigma, torch.zeros(())
        mean, variance = (keep + gain * a) * mean + gain * b, (keep + gain * a) ** 2 * variance + noise**2
    return moments


def exact(weights, solver=None, teachers=TEACHERS):
    """Gradient of Σ_k weights[k] · E[error at grid point k of the student's rollout], mean over the teachers."""
    student = Linear()
    moments = state_moments(student, solver or Euler())
    p = student.p.detach().clone().requires_grad_()
    total = sum(
        weights[k] * error(student, p, teacher, SIGMAS[k], *moments[k]) / len(teachers)
        for k in range(len(SIGMAS) - 1)
        for teacher in teachers
    )
    return torch.autograd.grad(total, p)[0]


def agree(found: torch.Tensor, wanted: torch.Tensor, size: float | None = 0.1) -> None:
    """Direction to cosine 0.99 (and better), and length to `size`."""
    cosine = torch.nn.functional.cosine_similarity(found.mean(0), wanted, dim=0)
    assert float(cosine) >= 0.99, float(cosine)
    if size is not None:
        assert float(found.mean(0).norm() / wanted.norm()) == pytest.approx(1, abs=size)


def paper_law() -> torch.Tensor:
    """Probability of each grid index: Beta(5, 2) has the distribution function 6 u⁵ - 5 u⁶."""
    u = torch.linspace(0, 1, len(SIGMAS))
    return (6 * u**5 - 5 * u**6).diff()


def dt2() -> torch.Tensor:
    return SIGMAS.diff().square()


@pytest.mark.parametrize("queries", [1, 3])
def test_danceopd(update, queries):
    agree(gradient(update, "danceopd", query={"count": queries}), exact(paper_law()))


def test_danceopd_weighted_by_step(update):
    weights = paper_law() * dt2() / dt2().mean()
    agree(gradient(update, "danceopd", query={"weight": "dt2"}), exact(weights))


def test_danceopd_on_stochastic_rollouts(update):
    solver = FlowSDE(0.7, float(SIGMAS[1]), lambda step: torch.zeros(0))
    agree(gradient(update, "danceopd", rollout={"noise": 0.7}), exact(paper_law(), solver))


def test_diffusionopd_without_noise_weighs_by_the_true_step(update):
    """The released code's 1 / (2 steps²) is another gradient on a shifted schedule."""
    found = gradient(update, "diffusionopd")
    agree(found, exact(dt2() / 2))
    uniform = exact(torch.full_like(dt2(), 0.5 / len(dt2()) ** 2))
    assert float(torch.nn.functional.cosine_similarity(found.mean(0), uniform, dim=0)) < 0.99


def test_diffusionopd_on_stochastic_rollouts_is_the_transition_kl(update):
    """torch's own KL between the two transitions' normals is the reference for the weights."""
    solver = FlowSDE(0.7, float(SIGMAS[1]), lambda step: torch.zeros(0))
    weights, one = [], torch.ones(1, 1)
    for sigma, to in zip(SIGMAS[:-1, None], SIGMAS[1:, None]):
        means = [solver.mean(one, v * one, sigma, to) for v in (0.0, 1.0)]
        normals = [torch.distributions.Normal(mean, solver.deviation(sigma, to)) for mean in means]
        weights.append(torch.distributions.kl_divergence(*normals).squeeze())
    agree(gradient(update, "diffusionopd", rollout={"noise": 0.7}), exact(torch.stack(weights), solver))


FLOWOPD = {"rollout": {"noise": 0.7}, "flowopd": {"group": 8, "clip": 0.2}}


def kl_of_stochastic_rollouts() -> torch.Tensor:
    solver = FlowSDE(0.7, float(SIGMAS[1]), lambda step: torch.zeros(0))
    gain, deviation = solver.kernel(SIGMAS)
    return exact(gain**2 / (2 * deviation**2), solver)


def test_flowopd_is_the_kl_gradient_in_expectation(update):
    agree(gradient(update, "flowopd", 16, **FLOWOPD), kl_of_stochastic_rollouts())


def test_a_detached_advantage_teaches_nothing(update, monkeypatch):
    """The released Flow-OPD: its mean gradient is zero to its standard error, where the other's is many of them."""
    monkeypatch.setattr("danceopd.engine.objectives.clipped", lambda r, a, c: clipped(r, a.detach(), c))
    detached = gradient(update, "flowopd", 32, **FLOWOPD)
    wanted = kl_of_stochastic_rollouts()
    errors = detached.std(0) / 32**0.5
    assert float(errors.min()) > 0  # it does have a gradient, of pure noise
    assert float((detached.mean(0) / errors).abs().max()) < 4
    assert float(detached.mean(0).norm()) < 0.02 * float(wanted.norm())


def test_the_baseline_is_the_groups_mean_reward_and_carries_no_gradient(update, monkeypatch):
    """With a gradient through it, the rewards of a group would cancel and nothing would be learned."""
    seen = []
    monkeypatch.setattr("danceopd.engine.objectives.clipped", lambda r, a, c: seen.append(a) or clipped(r, a, c))
    student = Linear()
    backward(*update("flowopd", 0, student, **FLOWOPD))
    advantage = seen[0].detach().unflatten(0, (-1, 8))
    assert float(advantage.abs().max()) > 1e-3 and float(advantage.mean(1).abs().max()) < 1e-6
    assert not torch.allclose(seen[0].detach().unflatten(0, (8, -1)).mean(0), torch.zeros(ROWS // 8), atol=1e-6)


def test_offpolicy_on_the_data(update):
    """States are the forward-noised data, so their moments are the flow's own."""
    agree(gradient(update, "offpolicy", 16), forward())


def test_supervised_is_offpolicy_with_the_best_teacher(update):
    """Regressing `ε - x0` has the gradient of regressing its mean, with more noise."""
    agree(gradient(update, "supervised", 64), forward())


def forward() -> torch.Tensor:
    student, law = Linear(), paper_law()
    p = student.p.detach().clone().requires_grad_()
    total = sum(
        law[k] * error(student, p, teacher, SIGMAS[k], *teacher.moments(SIGMAS[k])) / 2
        for k in range(len(law))
        for teacher in TEACHERS
    )
    return torch.autograd.grad(total, p)[0]


def test_offpolicy_on_the_teachers_own_pictures(update):
    """Without data: what the teacher draws in these steps, noised again. Its Euler steps are affine, too."""
    student, law = Linear(), paper_law()
    p = student.p.detach().clone().requires_grad_()
    total = 0.0
    for teacher in TEACHERS:
        mean, variance = torch.zeros(()), torch.ones(())
        for sigma, to in zip(SIGMAS[:-1], SIGMAS[1:]):
            a, b = teacher.line(sigma)
            mean, variance = mean + (to - sigma) * (a * mean + b), (1 + (to - sigma) * a) ** 2 * variance
        for k, weight in enumerate(law):
            level = SIGMAS[k]
            noised = (1 - level) * mean, (1 - level) ** 2 * variance + level**2
            total = total + weight * error(student, p, teacher, level, *noised) / 2
    wanted = torch.autograd.grad(total, p)[0]
    agree(gradient(update, "offpolicy", 16, offpolicy={"clean": "teacher"}), wanted)


def test_reported_errors_are_the_velocitys(update):
    """Whatever the loss, the log has the KL as the loss and the plain mean squared error by noise level."""
    recipe, batch, velocities = update("flowopd", 0, Linear(), **FLOWOPD)
    queries = backward(recipe, batch, velocities)
    gain, deviation = velocities.rollout.solver(batch).kernel(SIGMAS)
    assert len(queries) == len(SIGMAS) - 1
    for query, weight in zip(queries, gain**2 / (2 * deviation**2)):
        assert torch.allclose(query.loss, weight * query.error, rtol=1e-4) and bool((query.error > 0).all())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_slice_of_the_rows_is_the_slice_of_the_whole(update, objective):
    """Two processes with half of the rows each add up to the gradient of one with all of them."""
    fields = {"flowopd": FLOWOPD, "nft": {"nft": {"group": 4}}}.get(objective, {})  # nft without ranks is danceopd
    whole = gradient(update, objective, 1, **fields)[0]
    student, numbers = Linear(), count()
    for half in (range(0, ROWS, 2), range(1, ROWS, 2)) if objective != "flowopd" else (range(512), range(512, ROWS)):
        recipe, batch, velocities = update(objective, 0, student, **fields)
        rows = list(half)
        clean = batch.clean()[rows]
        part = replace(
            batch,
            rows=rows,
            condition=batch.condition.rows(torch.tensor(rows)),
            teacher_index=[batch.teacher_index[r] for r in rows],
            unconditional=[False] * len(rows),
            query_draws=batch.query_draws[rows],
            targets=lambda clean=clean: clean,
        )
        backward(recipe, part, velocities)
        next(numbers)
    torch.testing.assert_close(student.p.grad, whole, rtol=1e-3, atol=1e-5)
    assert next(numbers) == 2


def test_ratio_is_that_of_the_likelihoods():
    drawn, deviation = torch.randn(5, 7), torch.rand(5) + 0.5
    moved = 0.1 * torch.randn(5, 7)
    then = torch.distributions.Normal(torch.zeros(5, 7), deviation[:, None])
    now = torch.distributions.Normal(-moved, deviation[:, None])
    taken = deviation[:, None] * drawn
    wanted = torch.exp((now.log_prob(taken) - then.log_prob(taken)).mean(1))
    assert torch.allclose(probability_ratio(taken + moved, drawn, deviation), wanted, rtol=1e-4)


def test_clip_stops_a_ratio_that_has_left_its_range():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    value = clipped(ratio, advantage, 0.2)
    assert value.tolist() == pytest.approx([0.5, 1.0, 1.2, -0.8, -1.0, -1.5])
    assert torch.autograd.grad(value.sum(), ratio)[0].tolist() == [1.0, 1.0, 0.0, 0.0, -1.0, -1.0]


def test_which_objectives_need_finished_pictures(files):
    assert all(Recipe(**files, objective=name).needs_targets for name in ("supervised", "offpolicy"))
    assert not Recipe(**files, objective="offpolicy", offpolicy={"clean": "teacher"}).needs_targets
    assert not Recipe(**files).needs_targets


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"objective": "flowopd"}, "set rollout.noise"),
        ({"objective": "flowopd", "rollout": {"noise": 0.7}, "batch": 9}, "no multiple of flowopd.group"),
        ({"objective": "diffusionopd", "query": {"count": 2}}, "query has no meaning"),
        ({"flowopd": {"group": 4}}, "flowopd is set"),
        ({"offpolicy": {"clean": "teacher"}}, "offpolicy is set"),
        ({"objective": "supervised", "rollout": {"solver": "ab2"}}, "has no student rollout"),
        ({"rollout": {"solver": "ab2", "noise": 0.5}}, "cannot take random steps"),
        ({"routing": {"per": "turn", "weights": {"editing": 2}}}, "equal turns"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(files, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        Recipe(**files, **fields)
