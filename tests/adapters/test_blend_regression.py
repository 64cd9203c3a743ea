"""RegMean and SSR against their papers' formulas and what makes them right; odd layers; the activation recorder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from danceopd.adapters.blend import blend, blend_with_residual, delta_norm
from danceopd.adapters.blending.layers import parse_layers
from danceopd.adapters.blending.methods import METHODS
from danceopd.adapters.regression.methods import ALPHA, RIDGE, regmean
from danceopd.adapters.regression.moments import Moments, moments_bytes
from danceopd.adapters.regression.recorder import reached, record
from danceopd.engine.calibration.inputs import block_of, stages
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

INTO, OUT = 12, 20
REGRESSIONS = [name for name in METHODS if METHODS[name].regress is not None]


def adapter(seed: int, rank: int, modules=("x", "y")) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {m: (torch.randn(rank, INTO, generator=draw), torch.randn(OUT, rank, generator=draw)) for m in modules}
    return Adapter(pairs)


def noise(seed: int, rows: int = 400, columns: int = INTO) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        columns, INTO, generator=torch.Generator().manual_seed(seed + 100)
    )


class Given:
    """`Inputs` that are known: x (n, in) of each adapter, the same in every layer."""

    def __init__(self, *xs: torch.Tensor) -> None:
        self.xs, self.done = xs, {}

    def begin(self, adapters, parts, how):
        self.adapters, self.parts, self.how = adapters, parts, how
        return list(parts)

    def of(self, layer):
        active = self.parts[layer].adapters
        found = Moments([self.adapters[i].tensors.get(layer) for i in active], self.how.latent)
        for place, i in enumerate(active):
            for batch in self.xs[i].split(100):
                found.add(place, batch, len(batch) / max(1, len(self.xs[i])))
        return found

    def solved(self, layer, pair):
        self.done[layer] = pair


def close(one: torch.Tensor, other: torch.Tensor, size: float = 1e-3) -> None:
    assert float((one.double() - other.double()).norm()) <= size * float(other.double().norm()), (one, other)


@pytest.fixture
def parts() -> list[Adapter]:
    return [adapter(1, 2), adapter(2, 3)]


@pytest.fixture
def xs() -> list[torch.Tensor]:
    return [noise(1), noise(2, 300)]


# The papers' formulas, on whole matrices


def test_regmean_without_shrinking_is_the_least_squares_solution(parts, xs):
    """Of one linear layer: no change of its weight is closer to what each LoRA does to its own inputs."""
    inputs = Given(*xs)
    inputs.begin(parts, {"x": type("Part", (), {"adapters": [0, 1]})}, METHODS["regmean"])
    a, b = regmean([part.tensors["x"] for part in parts], [1.0, 1.0], inputs.of("x"), alpha=1.0)
    rows = [x.double() / len(x) ** 0.5 for x in xs]  # each LoRA's mean counts once, however many inputs it has
    wanted = torch.cat([x @ part.delta("x").double().T for x, part in zip(rows, parts)])
    best = torch.linalg.lstsq(torch.cat(rows), wanted).solution.T
    close(b @ a, best)
    assert a.shape[0] == 5


def test_regmean_is_the_papers_formula(parts, xs):
    found = blend(parts, [1.0, 0.5], method="regmean", inputs=Given(*xs)).delta("x")
    top = bottom = 0
    for part, x, weight in zip(parts, xs, (1.0, 0.5)):
        gram = x.double().T @ x.double() / len(x)
        gram = ALPHA * gram + (1 - ALPHA) * torch.diag(gram.diagonal())
        top, bottom = top + weight * gram @ part.delta("x").double().T, bottom + gram  # its W is (in, out)
    close(found, torch.linalg.solve(bottom, top).T, 1e-4)


def test_ssr_is_the_papers_formula(parts, xs):
    found = blend(parts, [1.0, 0.5], method="ssr", inputs=Given(*xs))
    a = torch.cat([part.tensors["x"][0] for part in parts]).double()
    b = torch.cat([weight * part.tensors["x"][1] for part, weight in zip(parts, (1.0, 0.5))], dim=1).double()
    g, q = torch.zeros(5, 5).double(), torch.zeros(5, 5).double()
    for x, rows in zip(xs, ([0, 1], [2, 3, 4])):
        z = a @ x.double().T
        g += z @ z.T / len(x)
        q[rows] += z[rows] @ z.T / len(x)
    router = q @ torch.linalg.inv(g + RIDGE * torch.diag(g.diagonal()))
    close(found.delta("x"), b @ router @ a, 1e-4)
    assert found.ranks == {"x": 5, "y": 5}


def test_ssr_does_not_mind_how_a_lora_shares_its_size(parts, xs):
    other = Adapter({name: (100 * a, b / 100) for name, (a, b) in parts[1].tensors.items()})
    one, two = (blend([parts[0], last], method="ssr", inputs=Given(*xs)).delta("x") for last in (parts[1], other))
    close(one, two)


# What makes them right


def apart(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs of different LoRAs in different directions, no more of them than the LoRAs have ranks."""
    found = [torch.zeros_like(x) for x in xs]
    found[0][:, :2], found[1][:, 6:9] = xs[0][:, :2], xs[1][:, 6:9]
    return found


@pytest.mark.parametrize("method", REGRESSIONS)
def test_where_inputs_are_apart_each_lora_keeps_its_own(parts, xs, method):
    """The blend does to each LoRA's inputs exactly what the LoRA does."""
    mine = apart(xs)
    found = blend(parts, method=method, inputs=Given(*mine)).delta("x")
    linear = blend(parts).delta("x")
    for x, part in zip(mine, parts):
        wanted = x @ part.delta("x").T
        close(x @ found.T, wanted, 1e-2)
        assert (x @ linear.T - wanted).norm() > 0.3 * wanted.norm()


@pytest.mark.parametrize("method", REGRESSIONS)
def test_each_is_nearer_to_the_loras_than_any_sum(parts, xs, method):
    def error(delta: torch.Tensor) -> float:
        return sum(float((x @ (delta - part.delta("x")).T).square().sum() / len(x)) for x, part in zip(xs, parts))

    found = error(blend(parts, method=method, inputs=Given(*xs)).delta("x"))
    sums = [error(blend(parts, [w, v]).delta("x")) for w in (0.3, 0.5, 0.7, 1.0) for v in (0.3, 0.5, 0.7, 1.0)]
    assert found < min(sums)


# Odd layers


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_a_layer_that_one_lora_lacks_stays_the_bases_on_its_inputs(parts, xs, method):
    mine = apart(xs)
    found = blend([parts[0], adapter(2, 3, ("y",))], method=method, inputs=Given(*mine)).delta("x")
    close(mine[0] @ found.T, mine[0] @ parts[0].delta("x").T, 1e-2)
    assert (mine[1] @ found.T).norm() < 1e-2 * (mine[0] @ found.T).norm()
    alone = blend([parts[0], Adapter({})], method=method, inputs=Given(*mine)).delta("x")  # the bare base as a teacher
    close(alone, found, 1e-5)


def test_ssr_passes_on_what_one_lora_alone_has(parts, xs):
    for other in (adapter(2, 3, ("y",)), Adapter({})):
        close(blend([parts[0], other], method="ssr", inputs=Given(*xs)).delta("x"), parts[0].delta("x"))


@pytest.mark.parametrize("method", REGRESSIONS)
def test_layers_without_inputs_and_with_too_few_have_a_blend(parts, xs, method):
    nothing = [torch.zeros(5, INTO)] * 2
    plain = blend(parts, [0.5, 0.5] if method != "ssr" else [1.0, 1.0]).delta("x")
    close(blend(parts, method=method, inputs=Given(*nothing)).delta("x"), plain)
    close(blend(parts, method=method, inputs=Given(torch.zeros(0, INTO), torch.zeros(0, INTO))).delta("x"), plain)
    few = blend(parts, method=method, inputs=Given(xs[0][:2], xs[1][:1]))  # a singular Gram matrix
    assert torch.isfinite(few.delta("x")).all() and 0 < delta_norm(few) < 20 * delta_norm(parts[0])
    twins = blend([parts[0]] * 2, method=method, inputs=Given(xs[0], xs[0]))
    close(twins.delta("x"), parts[0].delta("x"), 1e-2)  # and not twice it


@pytest.mark.parametrize("method", REGRESSIONS)
def test_rank_strength_and_weights_by_layer(parts, xs, method):
    whole = blend_with_residual(parts, method=method, inputs=Given(*xs))
    assert whole.residual == 0
    small = blend_with_residual(parts, method=method, rank=2, scale="auto", inputs=Given(*xs))
    assert small.adapter.rank == 2 and small.residual > 0
    assert delta_norm(small.adapter) ** 2 == pytest.approx(sum(delta_norm(p) ** 2 for p in parts) / 2, rel=1e-4)
    rules, given = parse_layers(["x=0.5", "y=0,1"]), Given(*xs)
    found = blend(parts, method=method, layers=rules, inputs=given)
    close(found.delta("x"), 0.5 * whole.adapter.delta("x"), 1e-5)
    close(found.delta("y"), parts[1].delta("y"), 1e-2)  # the other takes no part there, nor do its inputs
    assert given.done.keys() == {"x", "y"}


def test_refusals(parts, xs):
    for method in REGRESSIONS:
        with pytest.raises(UserError, match="looks at the inputs of layers, and none are recorded"):
            blend(parts, method=method)
    with pytest.raises(UserError, match="linear looks at no inputs"):
        blend(parts, inputs=Given(*xs))
    with pytest.raises(UserError, match="a regression, which is the same in every space"):
        blend(parts, method="ssr", space="core", inputs=Given(*xs))


def test_memory_does_not_grow_with_the_loras():
    one, three = ([adapter(i, 2).tensors["x"] for i in range(count)] for count in (1, 3))
    for pairs in (one, three):
        found = Moments(pairs, latent=False)
        assert found.total.shape == (INTO, INTO)
        held = [found.total, *found.crossed]
        assert sum(t.nbytes for t in held) == moments_bytes(2 * len(pairs), INTO, False)
    assert Moments(three, latent=True).total.shape == (6, 6)


# Recording


def test_a_forward_ends_where_enough_was_seen():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    x, seen, ran = torch.randn(2, 3), [], []
    model[3].register_forward_hook(lambda *_: ran.append(3))
    assert reached(model, ["2", "0"], lambda: model(x)) == ["0", "2"] and ran == [3]
    record(model, ["0", "2"], lambda name, found: seen.append((name, found)), lambda: model(x))
    assert [name for name, _ in seen] == ["0", "2"] and ran == [3]
    torch.testing.assert_close(seen[1][1], model[:2](x))
    assert all(not module._forward_pre_hooks for module in model)
    twice = lambda: model[0](model[0](x))  # noqa: E731
    assert reached(model, ["0"], twice) == ["0", "0"]
    with pytest.raises(ValueError, match="mine"):  # an error of the model's own is not swallowed
        record(model, ["0"], lambda name, found: (_ for _ in ()).throw(ValueError("mine")), twice)


def test_stages_are_blocks_or_what_has_room():
    names = ["emb", "blocks.0.q", "blocks.0.k", "single_blocks.0.q", "blocks.10.q"]
    assert [block_of(name) for name in names] == ["emb", "blocks.0", "blocks.0", "single_blocks.0", "blocks.10"]
    sizes = dict(zip(names, (3, 3, 9, 2, 2)))
    assert stages(names, sizes, True, 4) == [["emb"], ["blocks.0.q", "blocks.0.k"], ["single_blocks.0.q"], [names[4]]]
    assert stages(names, sizes, False, 6) == [names[:2], [names[2]], names[3:]]
    assert stages(names, sizes, False, 100) == [names]
