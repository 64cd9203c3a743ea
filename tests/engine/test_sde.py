"""Stochastic rollouts: they keep the flow's marginals, are Euler's without noise, and draw their noise from outside."""

from __future__ import annotations

import pytest
import torch
from flows import Gaussian, Rows, shifted

from danceopd.engine.rollout import rollout
from danceopd.engine.solvers import AdamsBashforth, Euler, FlowSDE

FLOW = Gaussian(0.8, 0.4)


def draws(rows: int, width: int, seed: int = 1):
    return lambda step: torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 * seed + step))


def stochastic(noise: float, sigmas: torch.Tensor, stop: torch.Tensor, width: int = 64, rows: int = 0):
    rows = rows or len(stop)
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    solver = FlowSDE(noise, float(sigmas[1]), draws(rows, width))
    return rollout(FLOW, start, sigmas, stop, Rows(rows), solver=solver)


@pytest.mark.parametrize("noise", [0.3, 0.7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_marginals_are_the_flows(noise, shift):
    """At every depth the rollout's mean and variance are those of `x_σ`, to the step's own error."""
    sigmas = shifted(400, shift)
    stops = torch.tensor([100, 200, 300, 360, 390]).expand(2000, 5)
    states = stochastic(noise, sigmas, stops, width=16)
    for k, stop in enumerate(stops[0]):
        mean, variance = FLOW.moments(sigmas[stop])
        x = states[:, k]
        assert float(x.mean()) == pytest.approx(float(mean), abs=0.02), float(sigmas[stop])
        assert float(x.var()) == pytest.approx(float(variance), rel=0.05), float(sigmas[stop])


def test_the_rollout_is_random_and_not_only_its_start():
    """From one and the same noise, rollouts part: their spread is what the noise adds, and grows with it."""
    sigmas, start = shifted(50, 3.0), torch.zeros(1000, 8)
    spread = []
    for noise in (0.0, 0.3, 0.7):
        solver = FlowSDE(noise, float(sigmas[1]), draws(1000, 8))
        spread.append(float(rollout(FLOW, start, sigmas, torch.full((1000,), 25), Rows(1000), solver=solver).std()))
    assert spread[0] < 1e-6 and 0.1 < spread[1] < spread[2]


def test_no_noise_is_eulers_rollout():
    sigmas, stop = shifted(8, 3.0), torch.tensor([3, 8, 0, 5])
    start = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stochastic(0.0, sigmas, stop), rollout(FLOW, start, sigmas, stop, Rows(4)), atol=1e-6)


def test_a_row_draws_the_same_noise_whatever_rows_are_beside_it():
    sigmas = shifted(8, 3.0)
    together = stochastic(0.7, sigmas, torch.tensor([2, 8, 5, 3]))
    level = stochastic(0.7, sigmas, torch.tensor([8, 8, 8, 8]))
    assert torch.equal(together[1], level[1])
    assert torch.equal(together[2], stochastic(0.7, sigmas, torch.tensor([5, 5, 5, 5]))[2])


@pytest.mark.parametrize("make", [Euler, AdamsBashforth, lambda: FlowSDE(0.7, 0.9, draws(1, 1))])
def test_kernel_is_what_a_step_does_with_a_velocity(make):
    """`gain` is the derivative of each step by its velocity, `deviation` the size of what is random in it."""
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])
    solver = make()
    gains, deviations = solver.kernel(sigmas)
    for k in range(4):
        sigma, to = sigmas[k : k + 1], sigmas[k + 1 : k + 2]
        x, v = torch.ones(1, 1), torch.full((1, 1), 0.5)
        moved = solver.advance(x, v + 1, sigma, to, None) - solver.advance(x, v, sigma, to, None)
        assert float(moved) == pytest.approx(float(gains[k]), rel=1e-4)
        if isinstance(solver, FlowSDE):
            drawn = (solver.advance(x, v, sigma, to, None) - solver.mean(x, v, sigma, to)) / solver.draw(k)
            assert float(drawn) == pytest.approx(float(deviations[k]), rel=1e-4)
        else:
            assert float(deviations[k]) == 0
        solver.remember(v, sigma, to)


def test_the_noise_is_flow_grpos():
    """`s = a sqrt(σ / (1 - σ))`, and the schedule's second level for a σ of 1 inside the root."""
    solver = FlowSDE(0.7, 0.9, draws(1, 1))
    got = solver.deviation(torch.tensor([1.0, 0.6]), torch.tensor([0.9, 0.2]))
    wanted = torch.tensor([0.7 * (1 / 0.1 * 0.1) ** 0.5, 0.7 * (0.6 / 0.4 * 0.4) ** 0.5])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
