"""Queries and routes: the laws are what they say, and everything is a function of (seed, step, row)."""

import numpy as np
import pytest
import torch

from danceopd.data.routing import route
from danceopd.engine.query import LEVELS, LOWEST, draw_queries, place, step_weights


def shifted(steps: int, shift: float) -> torch.Tensor:
    grid = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * grid / (1 + (shift - 1) * grid), torch.zeros(1)])


def many(law: str, sigmas: torch.Tensor, beta=None) -> torch.Tensor:
    return place(drawn(law, beta), sigmas, law)[0]


def drawn(law: str, beta=None, count: int = 1) -> torch.Tensor:
    return torch.cat([draw_queries(0, step, 64, count, law, beta) for step in range(200)])


def test_paper_law_is_beta_over_the_index():
    stops = many("paper", shifted(16, 3.0))
    assert stops.min() >= 0 and stops.max() == 15
    # Beta(5, 2) on 16 steps takes 10.93 of them on average (measured on the official code).
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


def test_draws_are_a_function_of_seed_and_step():
    assert torch.equal(draw_queries(3, 7, 32), draw_queries(3, 7, 32))
    assert not torch.equal(draw_queries(3, 7, 32), draw_queries(3, 8, 32))
    assert not torch.equal(draw_queries(3, 7, 32), draw_queries(4, 7, 32))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [4, 16])
def test_jittered_levels_follow_the_law_itself(shift, steps):
    """On any grid, however coarse: the law's own mean and quartiles, which the grid's points cannot have."""
    sigmas = shifted(steps, shift)
    for law, (a, b) in LEVELS.items():
        levels = place(drawn(law), sigmas, law, jitter=True)[1][:, 0]
        wanted = torch.from_numpy(np.random.default_rng(0).beta(a, b, 10**6)).float()
        assert float(levels.mean()) == pytest.approx(a / (a + b), abs=0.01), law
        for share in (0.1, 0.5, 0.9):
            assert float(levels.quantile(share)) == pytest.approx(float(wanted.quantile(share)), abs=0.02), law


@pytest.mark.parametrize("law", ["paper", "low-noise", "high-noise"])
def test_a_jittered_level_lies_on_the_step_to_its_stop(law):
    sigmas = shifted(6, 3.0)
    stops, levels = place(drawn(law, count=3), sigmas, law, jitter=True)
    assert stops.shape == levels.shape == (64 * 200, 3)
    assert bool((levels >= sigmas[stops]).all()) and bool((levels <= sigmas[(stops - 1).clamp(min=0)]).all())
    assert float(levels.min()) >= LOWEST and int(stops.max()) == 6
    plain, on_grid = place(drawn(law, count=3), sigmas, law)
    assert torch.equal(on_grid, sigmas[plain]) and bool((stops - plain <= 1).all())


def test_paper_law_jittered_is_beta_over_the_rollout():
    sigmas = shifted(16, 1.0)  # unshifted: the noise level is 1 less the share of the rollout
    levels = place(drawn("paper"), sigmas, "paper", jitter=True)[1]
    assert float(1 - levels.mean()) == pytest.approx(5 / 7, abs=0.005)


def test_step_weights_are_those_of_the_steps_that_leave():
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.0])
    squares = torch.tensor([0.01, 0.09, 0.36])
    stops = torch.tensor([[0], [1], [2], [2], [3]])
    levels = torch.tensor([[1.0], [0.9], [0.6], [0.7], [0.1]])  # the last two between grid points
    got = step_weights(stops, levels, sigmas)[:, 0]
    torch.testing.assert_close(got, (squares / squares.mean())[[0, 1, 2, 1, 2]])


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


def test_a_route_does_not_depend_on_the_order_of_calls():
    first = [route(5, 11, row, 8, [0.5, 0.5]) for row in range(8)]
    assert [route(5, 11, row, 8, [0.5, 0.5]) for row in reversed(range(8))] == first[::-1]


@pytest.mark.parametrize("groups", [1, 3])
def test_turns_go_round(groups):
    drawn = [[route(0, step, row, 4, [0.5, 0.3, 0.2], "turn", groups) for row in range(4)] for step in range(18)]
    assert [rows[0] for rows in drawn] == [step // groups % 3 for step in range(18)]
    assert all(len(set(rows)) == 1 for rows in drawn)
