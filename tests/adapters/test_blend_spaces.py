"""Methods on singular vectors and the core space, against their papers' formulas; weights by layer; the strength."""

from __future__ import annotations

import pytest
import torch

from danceopd.adapters.blend import blend, blend_with_residual, delta_norm
from danceopd.adapters.blending.entries import ties
from danceopd.adapters.blending.layers import parse_blocks, parse_layers
from danceopd.adapters.blending.methods import METHODS
from danceopd.adapters.blending.subspace import project, restore
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

INTO, OUT = 12, 20


def adapter(seed: int, rank: int, modules=("x", "y")) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {m: (torch.randn(rank, INTO, generator=draw), torch.randn(OUT, rank, generator=draw)) for m in modules}
    return Adapter(pairs)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def parts() -> list[Adapter]:
    return [adapter(1, 2), adapter(2, 3)]


@pytest.fixture
def deltas(parts) -> list[torch.Tensor]:
    return [part.delta("x").double() for part in parts]


def svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """M (MᵀM)^(-1/2), by eigenvalues: the closest matrix with orthonormal columns."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


# The papers' formulas, on whole matrices


def test_knots_is_ties_in_the_shared_basis(parts, deltas):
    u, s, vh = svd(torch.cat(deltas, dim=1), 5)
    scaled = torch.diag(s) @ vh
    want = u @ ties([scaled[:, :INTO], scaled[:, INTO:]], [2.0, 1.0], 0.3, [])
    close(blend(parts, [2.0, 1.0], method="knots", density=0.3).delta("x"), want.float())
    close(blend(parts, [2.0, 1.0], method="knots", density=0.3, space="full").delta("x"), want.float())
    plain = blend(parts, [2.0, 1.0], method="ties", density=0.3, rank=12).delta("x")
    assert (plain - want).norm() > 0.1 * want.norm()


def test_tsv_makes_the_singular_vectors_orthogonal(parts, deltas):
    found = [svd(delta, rank) for delta, rank in zip(deltas, (2, 3))]
    u = polar(torch.cat([u for u, _, _ in found], dim=1))
    v = polar(torch.cat([vh.T for _, _, vh in found], dim=1))
    s = torch.cat([2.0 * found[0][1], -1.0 * found[1][1]])
    close(blend(parts, [2.0, -1.0], method="tsv").delta("x"), (u @ torch.diag(s) @ v.T).float())
    ours = torch.linalg.svdvals(blend(parts, method="tsv").delta("x"))[:5]
    close(ours, torch.cat([s for _, s, _ in found]).sort(descending=True).values.float())  # none of them is lost


def test_tsv_keeps_a_share_where_ranks_add_up_to_more_than_the_layer_has():
    many = [adapter(seed, 5) for seed in (1, 2, 3)]  # 15 in a layer of 12: 4 of each
    found = [svd(part.delta("x").double(), 4) for part in many]
    u, v = polar(torch.cat([u for u, _, _ in found], 1)), polar(torch.cat([vh.T for _, _, vh in found], 1))
    want = u @ torch.diag(torch.cat([s for _, s, _ in found])) @ v.T
    close(blend(many, method="tsv").delta("x"), want.float())


def test_iso_c_has_one_singular_value(parts, deltas):
    u, s, vh = svd(0.5 * deltas[0] + deltas[1], 5)
    close(blend(parts, [0.5, 1.0], method="iso-c").delta("x"), (s.mean() * u @ vh).float())


def test_core_space_loses_nothing_and_runs_any_method(parts, deltas):
    pairs = [part.tensors["x"] for part in parts]
    left, right, small = project(pairs, "core")
    assert left.shape == (OUT, 5) and right.shape == (INTO, 5)
    close(left.T @ left, torch.eye(5).double())
    for delta, core in zip(deltas, small):
        close(left @ core @ right.T, delta)
        a, b = restore(left, right, core)
        close(b @ a, delta)
    stacked_b, stacked_a = torch.cat([b for _, b in pairs], 1).double(), torch.cat([a for a, _ in pairs]).double()
    basis_b, basis_a = svd(stacked_b, 5)[0], svd(stacked_a, 5)[2].T
    cores = [basis_b.T @ delta @ basis_a for delta in deltas]
    want = basis_b @ ties(cores, [1.0, 1.0], 0.4, []) @ basis_a.T
    found = blend_with_residual(parts, [1.0, 1.0], method="ties", density=0.4, space="core")
    close(found.adapter.delta("x"), want.float())
    assert found.residual == 0 and found.adapter.ranks == {"x": 5, "y": 5}
    for method in METHODS:
        if METHODS[method].merge is not None:
            assert delta_norm(blend(parts, method=method, space="core")) > 0, method


@pytest.mark.parametrize("method", ["knots", "tsv", "iso-c"])
def test_odd_adapters_have_a_blend(parts, method):
    """Twins span one space, a module may be one adapter's alone, and one adapter is its own blend."""
    one, two = parts[0], adapter(2, 3, ("y",))
    twins = blend([one, one], method=method)
    assert torch.isfinite(twins.delta("x")).all() and twins.rank <= 4 and delta_norm(twins) > 0
    alone = blend([one, two], method=method).delta("x")
    assert torch.isfinite(alone).all() and alone.norm() > 0
    if method == "tsv":
        close(alone, one.delta("x"))
        close(blend([one], method=method).delta("x"), one.delta("x"))
    assert blend([one, two], rank=1, method=method).rank == 1


def test_nothing_large_is_made_in_a_small_space():
    draw = torch.Generator().manual_seed(0)
    big = [
        Adapter({"x": (torch.randn(2, 60_000, generator=draw), torch.randn(80_000, 2, generator=draw))})
        for _ in range(2)
    ]
    for method in ("knots", "tsv", "iso-c"):
        assert blend(big, method=method).ranks == {"x": 4}
    assert blend(big, method="ties", space="core").ranks == {"x": 4}


# Weights by layer

BLOCKS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.10.ff.net", "single_transformer_blocks.0.attn.to_out")


def test_layers_have_weights_of_their_own():
    one, two = adapter(1, 2, BLOCKS), adapter(2, 3, BLOCKS)
    rules = [*parse_layers(["attn=0.5", "single.*=2,0"]), *parse_blocks(["10=0"])]
    found = blend([one, two], [1.0, 1.0], layers=rules)
    close(found.delta(BLOCKS[0]), 0.5 * (one.delta(BLOCKS[0]) + two.delta(BLOCKS[0])))
    close(found.delta(BLOCKS[2]), 2 * one.delta(BLOCKS[2]))
    assert BLOCKS[1] not in found.tensors and found.ranks[BLOCKS[2]] == 2
    ties_there = blend([one, two], method="ties", layers=parse_layers(["attn=0.5"]), rank=12)
    close(ties_there.delta(BLOCKS[0]), 0.5 * blend([one, two], method="ties", rank=12).delta(BLOCKS[0]))


@pytest.mark.parametrize(
    "blocks, fits",
    [
        ("0=3", (0, 2)),
        ("0-9=3", (0, 2)),
        ("1-10=3", (1,)),
        ("transformer_blocks.0=3", (0,)),
        ("single_transformer_blocks.0-3=3", (2,)),
    ],
)
def test_blocks_are_numbers_of_a_stack(blocks, fits):
    one = adapter(1, 2, BLOCKS)
    found = blend([one], layers=parse_blocks([blocks]))
    for i, name in enumerate(BLOCKS):
        close(found.delta(name), (3 if i in fits else 1) * one.delta(name))


@pytest.mark.parametrize(
    "parse, text, says",
    [
        (parse_layers, "attn", "write layers and a weight"),
        (parse_layers, "attn=x", "write layers and a weight"),
        (parse_layers, "=1", "write layers and a weight"),
        (parse_layers, "attn=nan", "write layers and a weight"),
        (parse_layers, "(=1", "no regular expression"),
        (parse_blocks, "7-3=1", "no block or range"),
        (parse_blocks, "x.y.3=1", "no block or range"),
    ],
)
def test_what_is_no_rule(parse, text, says):
    with pytest.raises(UserError, match=says) as caught:
        parse([text])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"layers": parse_layers(["nothing=1"])}, "fits none of the 2 layers"),
        ({"layers": parse_layers(["x=1,2,3"])}, "3 weights and here are 2 adapters"),
        ({"layers": parse_layers(["x|y=0"])}, "leave nothing to blend"),
        ({"layers": parse_layers(["x=1,-1"]), "method": "slerp"}, "two weights of 0 or more"),
        ({"space": "core"}, "linear is a sum, which is the same in every space"),
        ({"space": "cor", "method": "ties"}, "did you mean 'core'"),
        ({"scale": "big"}, "the scale is 'big'"),
        ({"density": 0.5, "method": "tsv"}, "takes no density"),
    ],
)
def test_refusals(parts, how, says):
    with pytest.raises(UserError, match=says):
        blend(parts, **how)


# The strength


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "iso-c"])
@pytest.mark.parametrize("rank", [None, 2])
def test_automatic_strength_keeps_the_mean_energy(parts, method, rank):
    found = blend_with_residual(parts, method=method, rank=rank, scale="auto")
    mean = sum(delta_norm(part) ** 2 for part in parts) / 2
    assert delta_norm(found.adapter) ** 2 == pytest.approx(mean, rel=1e-4)
    plain = blend(parts, method=method, rank=rank)
    close(found.adapter.delta("x"), found.scale * plain.delta("x"))


def test_automatic_strength_takes_the_cosine_into_account(parts):
    one = parts[0]
    assert blend_with_residual([one, one], [1.0, 1.0], scale="auto").scale == pytest.approx(0.5, rel=1e-5)
    against = Adapter({name: (a, -0.5 * b) for name, (a, b) in one.tensors.items()})
    wanted = ((1 + 0.25) / 2) ** 0.5 / 0.25  # half of one, less a quarter
    assert blend_with_residual([one, against], scale="auto").scale == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="cancel out"):
        blend([one, one], [1.0, -1.0], scale="auto")
    only_x = blend_with_residual([one, one], scale="auto", layers=parse_layers(["y=0"]))
    assert only_x.scale == pytest.approx(1, rel=1e-5)
