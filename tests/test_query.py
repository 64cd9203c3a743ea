"""Queries and routes: the laws are what they say, and everything is a function of (seed, step, row)."""

import numpy as np
import pytest
import torch

from danceopd.query import LEVELS, draw_stops
from danceopd.routing import route


def shifted(steps: int, shift: float) -> torch.Tensor:
    grid = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * grid / (1 + (shift - 1) * grid), torch.zeros(1)])


def many(law: str, sigmas: torch.Tensor, beta=None) -> torch.Tensor:
    return torch.cat([draw_stops(0, step, 64, sigmas, law, beta) for step in range(200)])


def test_paper_law_is_beta_over_the_index():
    stops = many("paper", shifted(16, 3.0))
    assert stops.min() >= 0 and stops.max() == 15
    # Beta(5, 2) on 16 steps walks 10.93 of them on average (measured on the official code).
    assert stops.float().mean() == pytest.approx(10.93, abs=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_level_laws_mean_the_same_on_every_schedule(shift):
    sigmas = shifted(64, shift)
    means = {law: float(sigmas[many(law, sigmas)].mean()) for law in LEVELS}
    expected = {law: a / (a + b) for law, (a, b) in LEVELS.items()}
    for law, mean in means.items():
        assert mean == pytest.approx(expected[law], abs=0.06), law
    assert means["low-noise"] < means["uniform"] < means["high-noise"]


def test_beta_replaces_the_laws_own():
    sigmas = shifted(8, 1.0)
    assert many("paper", sigmas, (50.0, 1.0)).float().mean() > many("paper", sigmas, (1.0, 50.0)).float().mean() + 5


def test_stops_are_a_function_of_seed_and_step():
    sigmas = shifted(8, 3.0)
    assert torch.equal(draw_stops(3, 7, 32, sigmas), draw_stops(3, 7, 32, sigmas))
    assert not torch.equal(draw_stops(3, 7, 32, sigmas), draw_stops(3, 8, 32, sigmas))
    assert not torch.equal(draw_stops(3, 7, 32, sigmas), draw_stops(4, 7, 32, sigmas))


@pytest.mark.parametrize("per", ["row", "step"])
def test_routes_keep_to_their_shares(per):
    shares = [0.5, 0.3, 0.2]
    drawn = np.array([[route(0, step, row, 30, shares, per) for row in range(30)] for step in range(1500)])
    assert np.bincount(drawn.ravel(), minlength=3) / drawn.size == pytest.approx(shares, abs=0.05)
    if per == "row":  # every update sees every teacher in proportion, to one row
        for m, share in enumerate(shares):
            assert np.abs((drawn == m).sum(1) - 30 * share).max() <= 1
    else:
        assert (drawn == drawn[:, :1]).all()


def test_route_does_not_depend_on_who_asked_before():
    first = [route(5, 11, row, 8, [0.5, 0.5]) for row in range(8)]
    assert [route(5, 11, row, 8, [0.5, 0.5]) for row in reversed(range(8))] == first[::-1]
