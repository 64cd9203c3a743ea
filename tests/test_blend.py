"""Blending adapters against dense deltas."""

import pytest
import torch

from danceopd.blend import blend, residual, truncate
from danceopd.errors import UserError
from danceopd.lora import Adapter


def adapter(seed: int, rank: int, modules=("x", "y"), into=12, out=20) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        {m: (torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)) for m in modules}
    )


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_sum_is_exact_and_ranks_may_differ():
    one, two, three = adapter(1, 2), adapter(2, 3), adapter(3, 1)
    merged = blend([one, two, three], [0.5, 2.0, -1.0])
    assert merged.ranks == {"x": 6, "y": 6}
    for name in "xy":
        close(merged.delta(name), 0.5 * one.delta(name) + 2 * two.delta(name) - three.delta(name))


def test_modules_of_one_adapter_only_are_kept():
    one, two = adapter(1, 2, ("x",)), adapter(2, 3, ("x", "z"))
    merged = blend([one, two], [1.0, 0.5])
    assert merged.ranks == {"x": 5, "z": 3}
    close(merged.delta("z"), 0.5 * two.delta("z"))


def test_weight_zero_takes_no_rank_and_weight_one_changes_nothing():
    one, two = adapter(1, 2), adapter(2, 3)
    assert blend([one, two], [1.0, 0.0]).sha256 == one.sha256
    assert blend([one], [1.0]).sha256 == one.sha256


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_smaller_rank_is_the_best_one(rank):
    one, two = adapter(1, 4), adapter(2, 3)
    dense = {name: one.delta(name) + two.delta(name) for name in "xy"}
    merged = blend([one, two], [1.0, 1.0], rank=rank)
    assert set(merged.ranks.values()) == {rank}
    lost, whole = 0.0, 0.0
    for name, delta in dense.items():
        u, s, vh = torch.linalg.svd(delta)
        close(merged.delta(name), (u[:, :rank] * s[:rank]) @ vh[:rank])
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    assert residual(blend([one, two], [1.0, 1.0]), merged) == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_a_rank_large_enough_is_exact():
    one, two = adapter(1, 4), adapter(2, 3)
    exact = blend([one, two], [1.0, 1.0])
    assert blend([one, two], [1.0, 1.0], rank=7).sha256 == exact.sha256
    assert residual(exact, exact) < 1e-6
    wide = blend([adapter(i, 4) for i in range(5)], [1.0] * 5)  # rank 20 on a 20x12 matrix
    assert residual(wide, blend([wide], [1.0], rank=12)) < 1e-6


def test_a_shared_rank_is_found_again():
    """Two copies of one rank-3 adapter sum to rank 3; the SVD keeps all of it."""
    one = adapter(1, 3)
    merged = blend([one, one], [0.25, 0.5], rank=3)
    for name in "xy":
        close(merged.delta(name), 0.75 * one.delta(name))


def test_no_large_matrix_is_formed():
    """A (r, 200000) by (300000, r) delta would take 240 GB."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 200_000, generator=draw), torch.randn(300_000, 4, generator=draw)
    small_a, small_b = truncate(a, b, 2)
    assert small_a.shape == (2, 200_000) and small_b.shape == (300_000, 2)
    assert 0 < residual(Adapter({"x": (a, b)}), Adapter({"x": (small_a, small_b)})) < 1


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: blend([], []), "0 adapters"),
        (lambda: blend([adapter(1, 2)], [1.0, 2.0]), "1 adapters and 2 weights"),
        (lambda: blend([adapter(1, 2)], [float("nan")]), "not finite"),
        (lambda: blend([adapter(1, 2)], [0.0]), "all zero"),
        (lambda: blend([adapter(1, 2)], [1.0], rank=0), "rank 0"),
        (
            lambda: blend([adapter(1, 2)], [1.0], method="ties"),
            "no blend method 'ties'; choose one of linear",
        ),
        (
            lambda: blend([adapter(1, 2), adapter(1, 2, into=13)], [1.0, 1.0]),
            "different bases: x maps 12 to 20, 13 to 20",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_nothing_to_lose_is_an_error():
    empty = Adapter({"x": (torch.zeros(1, 2), torch.zeros(2, 1))})
    with pytest.raises(ValueError, match="changes nothing"):
        residual(empty, empty)
