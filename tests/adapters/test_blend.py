"""Blending adapters against dense deltas; the command; and a blend as a student's start."""

from typing import get_args

import pytest
import torch
from tiny import random_adapter, tiny_klein

from danceopd.adapters.blend import blend, blend_with_residual, delta_norm
from danceopd.adapters.blending.methods import METHODS
from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.svd import truncate_matrix, truncate_product
from danceopd.adapters.write import write_adapter
from danceopd.engine.warm_start import student_init
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint
from danceopd.models.lora import Adapter
from danceopd.recipe.parts import Student
from danceopd.recipe.values import BlendMethod


def residual(whole: Adapter, part: Adapter) -> float:
    """‖Δ_whole − Δ_part‖ / ‖Δ_whole‖ over all modules together, Frobenius."""
    return delta_norm(blend([whole, part], [1.0, -1.0])) / delta_norm(whole)


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


def test_no_large_matrix_is_made():
    """A (r, 200000) by (300000, r) delta would take 240 GB."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 200_000, generator=draw), torch.randn(300_000, 4, generator=draw)
    (small_a, small_b), _, _ = truncate_product(a, b, 2)
    assert small_a.shape == (2, 200_000) and small_b.shape == (300_000, 2)
    assert 0 < residual(Adapter({"x": (a, b)}), Adapter({"x": (small_a, small_b)})) < 1


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: blend([], []), "0 adapters"),
        (lambda: blend([adapter(1, 2)], [1.0, 2.0]), "1 adapters and 2 weights"),
        (lambda: blend([adapter(1, 2)], [float("nan")]), r"weights \[nan\] are all 0, or one is .* no number"),
        (lambda: blend([adapter(1, 2)], [0.0]), r"weights \[0.0\] are all 0"),
        (lambda: blend([adapter(1, 2)], [1.0], rank=0), "rank 0"),
        (lambda: blend([adapter(1, 2)], [1.0], method="tie"), "no blend method 'tie'; did you mean 'ties'"),
        (lambda: blend([adapter(1, 2)], [1.0], density=0.5), "linear keeps every entry"),
        (lambda: blend([adapter(1, 2)], [1.0], method="ties", density=0.0), "density 0 is no share"),
        (lambda: blend([adapter(1, 2)], [1.0], method="sce", density=1.5), "density 1.5 is no share"),
        (lambda: blend([adapter(1, 2)], [1.0], scale=0.0), "the scale is 0; give"),
        (lambda: blend([adapter(1, 2)], [1.0], method="slerp"), "slerp blends 2 adapters and here are 1"),
        (lambda: blend([adapter(1, 2)] * 2, [1.0, -1.0], method="slerp"), "two weights of 0 or more"),
        (
            lambda: blend([adapter(1, 2), adapter(1, 2, into=13)], [1.0, 1.0]),
            "different bases: x maps 12 to 20, 13 to 20",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(UserError, match=says):
        call()


# The methods, against their papers' formulas on dense matrices


def dense(*adapters: Adapter, name: str = "x") -> list[torch.Tensor]:
    return [one.delta(name) for one in adapters]


def whole(method: str, *adapters: Adapter, weights=None, **how) -> torch.Tensor:
    """The blend of module x at full rank, where nothing is lost to the SVD."""
    found = blend_with_residual(adapters, weights, rank=12, method=method, **how)
    assert found.residual < 1e-5
    return found.adapter.delta("x")


def top(delta: torch.Tensor, count: int) -> torch.Tensor:
    """The paper's trim, by sorting."""
    order = delta.abs().flatten().argsort(descending=True)[:count]
    kept = torch.zeros(delta.numel())
    kept[order] = 1
    return delta * kept.view_as(delta)


def test_every_method_has_a_default_of_each_setting():
    parts = [adapter(1, 2), adapter(2, 3)]
    for name in (name for name, how in METHODS.items() if how.regress is None):
        found = blend_with_residual(parts, method=name)
        assert set(found.adapter.ranks.values()) == {5}, name  # the summed rank
        assert found.residuals.keys() == {"x", "y"} and 0 <= found.residual < 1, name
        whole = METHODS[name].coefficients is not None or METHODS[name].space != "full"
        assert (found.residual == 0) == whole, name


def test_linear_averages_and_task_arithmetic_adds():
    one, two = adapter(1, 2), adapter(2, 3)
    a, b = dense(one, two)
    close(whole("linear", one, two), (a + b) / 2)
    close(whole("task-arithmetic", one, two), a + b)
    close(whole("task-arithmetic", one, two, scale=0.4), 0.4 * (a + b))


def test_slerp_follows_the_arc():
    one, two = adapter(1, 2), adapter(2, 3)
    a, b = dense(one, two)
    omega = torch.arccos((a * b).sum().double() / (a.double().norm() * b.double().norm()))
    t = 0.3
    want = torch.sin((1 - t) * omega) / torch.sin(omega) * a + torch.sin(t * omega) / torch.sin(omega) * b
    close(whole("slerp", one, two, weights=[0.7, 0.3]), want.float())
    close(whole("slerp", one, two, weights=[1.0, 0.0]), a)
    close(whole("slerp", one, one, weights=[0.4, 0.6]), a)  # no angle
    ours = blend([one, adapter(2, 3, ("y",))], [0.25, 0.75], method="slerp")
    close(ours.delta("x"), 0.25 * a)
    unit = [d / d.norm() for d in (a, b)]
    middle = 0.5 / torch.cos(omega / 2).float() * (unit[0] + unit[1])
    assert middle.norm() == pytest.approx(1, abs=1e-5)


def test_ties_is_the_papers_and_pefts():
    from peft.utils.merge_utils import ties as peft_ties

    parts = [adapter(seed, 3) for seed in (1, 2, 3)]
    deltas = dense(*parts)
    trimmed = [top(d, int(0.4 * d.numel())) for d in deltas]
    sign = sum(trimmed).sign()
    agree = torch.stack([t.sign() == sign for t in trimmed]) & (sign != 0)
    mean = (torch.stack(trimmed) * agree).sum(0) / agree.sum(0).clamp_min(1)
    close(whole("ties", *parts, density=0.4), mean)
    close(mean, peft_ties(deltas, torch.ones(3), density=0.4))
    close(whole("ties", *parts, density=0.4, weights=[5.0, 5.0, 5.0]), mean)  # weights are relative
    close(whole("ties", *parts, density=0.4, scale=0.5), 0.5 * mean)
    a, b, _ = trimmed
    heavy = whole("ties", *parts[:2], density=0.4, weights=[3.0, 1.0])
    both = (a.sign() == b.sign()) & (a != 0)
    close(heavy[both], ((3 * a + b) / 4)[both])
    against = (a.sign() == -b.sign()) & (a != 0) & (3 * a.abs() > b.abs())
    close(heavy[against], a[against])
    assert both.any() and against.any()


def test_magnitude_prune_is_pefts():
    from peft.utils.merge_utils import magnitude_prune as peft_prune

    parts = [adapter(seed, 3) for seed in (1, 2)]
    want = peft_prune(dense(*parts), torch.tensor([0.7, -0.2]), density=0.3)
    close(whole("magnitude-prune", *parts, weights=[0.7, -0.2], density=0.3), want)


def test_dare_drops_scales_and_repeats():
    one, two = adapter(1, 3), adapter(2, 3)
    a, b = dense(one, two)
    found = whole("dare-linear", one, two, weights=[1.0, 0.0], density=0.5, seed=4)
    kept = found.abs() > 1e-4
    close(found[kept], 2 * a[kept])
    assert 0.35 < kept.float().mean() < 0.65
    assert blend([one, two], method="dare-ties", seed=4).sha256 == blend([one, two], method="dare-ties", seed=4).sha256
    assert blend([one, two], method="dare-ties", seed=4).sha256 != blend([one, two], method="dare-ties", seed=5).sha256
    mean = sum(whole("dare-linear", one, two, density=0.5, seed=seed) for seed in range(400)) / 400
    assert (mean - (a + b) / 2).norm() < 0.1 * (a + b).norm()  # unbiased
    close(whole("dare-linear", one, two, density=1.0), (a + b) / 2)
    close(whole("dare-ties", one, two, density=1.0), whole("ties", one, two, density=1.0))


def test_breadcrumbs_leaves_out_both_ends():
    one = adapter(1, 3, into=30, out=40)
    (a,) = dense(one)
    count = a.numel()
    order = a.abs().flatten().argsort(descending=True)
    outliers, kept = int(0.007 * count), int((0.007 + 0.2) * count)
    mask = torch.zeros(count)
    mask[order[outliers:kept]] = 1
    found = blend_with_residual([one], [1.0], rank=30, method="breadcrumbs", density=0.2)
    assert outliers == 8
    close(found.adapter.delta("x"), a * mask.view_as(a))


def test_sce_selects_calculates_erases():
    parts = [adapter(seed, 3) for seed in (1, 2, 3)]
    stack = torch.stack(dense(*parts))
    spread = stack.var(dim=0, unbiased=False)
    chosen = top(spread, int(0.3 * spread.numel())) > 0
    picked = stack * chosen
    eta = picked.square().sum((1, 2)) / picked.square().sum()
    right = picked * (picked.sign() == picked.sum(0).sign())
    close(whole("sce", *parts, density=0.3), (eta[:, None, None] * right).sum(0))


def test_a_missing_module_counts_as_zero():
    """Its variance counts, its sign does not, and order does not matter."""
    one, two = adapter(1, 3), adapter(2, 3, ("y",))
    (a,) = dense(one)
    close(whole("ties", one, two, density=0.5), top(a, int(0.5 * a.numel())))
    close(whole("sce", one, two, density=0.5), top(a, int(0.5 * a.numel())))
    for method in ("ties", "sce", "magnitude-prune", "breadcrumbs", "linear"):
        close(whole(method, one, adapter(2, 3)), whole(method, adapter(2, 3), one))


def test_residuals_say_what_the_rank_lost():
    parts = [adapter(1, 4), adapter(2, 4)]
    full = blend_with_residual(parts, rank=12, method="ties")
    small = blend_with_residual(parts, rank=3, method="ties")
    assert small.residual == pytest.approx(residual(full.adapter, small.adapter), rel=1e-3)
    for name in "xy":
        gap = (full.adapter.delta(name) - small.adapter.delta(name)).norm() / full.adapter.delta(name).norm()
        assert small.residuals[name] == pytest.approx(float(gap), rel=1e-3)
    lost = residual(blend(parts), blend(parts, rank=3))
    assert blend_with_residual(parts, rank=3).residual == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_blend_that_cancels_out_is_nothing_and_lost_nothing_to_speak_of(method, rank):
    """Its residual is a share of next to nothing, and still one: between 0 and 1."""
    part = adapter(1, 4)
    found = blend_with_residual([part, part], [1.0, -1.0], rank=rank, method=method)
    assert 0 <= found.residual <= 1 and all(0 <= lost <= 1 for lost in found.residuals.values())
    for name in "xy":
        close(found.adapter.delta(name), torch.zeros(20, 12))


def test_the_randomised_svd_is_as_good_as_the_exact_one(monkeypatch):
    import danceopd.adapters.svd as module

    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(200, 30, generator=draw) @ torch.randn(30, 150, generator=draw)
    delta += 0.3 * torch.randn(200, 150, generator=draw)
    (a, b), exact, size = truncate_matrix(delta, 20, draw)
    monkeypatch.setattr(module, "EXACT_SIDE", 10)
    (ra, rb), lost, _ = truncate_matrix(delta, 20, torch.Generator().manual_seed(1))
    assert lost == pytest.approx(float((delta - rb @ ra).square().sum()), rel=1e-4)
    assert exact <= lost * (1 + 1e-6) and lost < 1.02 * exact and exact < 0.5 * size


# The command


@pytest.fixture
def loras(tmp_path):
    """A tiny base and two LoRAs of it, of ranks 2 and 3, in other dialects."""
    pipe = tiny_klein(tmp_path / "base")
    said = {"base": str(tmp_path / "base"), "base_sha256": base_fingerprint(tmp_path / "base")}
    parts = [random_adapter(pipe.transformer, rank=2 + i, seed=i) for i in range(2)]
    for part, name in zip(parts, "ab"):
        write_adapter(part, tmp_path / name, metadata=said)
    return parts


def test_the_command_writes_what_blended_gives(danceopd, loras, tmp_path):
    done = danceopd("blend", "a", "b", "--method", "ties", "--weights", "2,1", "--density", "0.3", "-r", "4", "-o", "o")
    assert done.returncode == 0, done.stderr
    want = blend_with_residual(loras, [2.0, 1.0], 4, "ties", 0.3)
    assert read_adapter(tmp_path / "o").sha256 == want.adapter.sha256
    assert f"residual {want.residual:.2%}" in done.stdout and "and 16 more" in done.stdout
    record = inspect_adapter(tmp_path / "o").record
    assert record["base"] == str(tmp_path / "base") and record["blend"] == "ties: 2 x a + 1 x b"


def test_the_command_blends_across_dialects(danceopd, loras, tmp_path):
    from danceopd.cli.blend import Request, run, summary

    done = danceopd("export", "b", "--format", "kohya", "-o", "k")
    assert done.returncode == 0 and "read back by danceopd and by stock diffusers" in done.stdout, done.stderr
    file, found = run(Request([tmp_path / "a", tmp_path / "k" / "b.safetensors"], tmp_path / "o"))
    assert read_adapter(file).sha256 == blend(loras).sha256
    assert "rank 5" in summary(found) and summary(found).endswith("exact")


def test_what_the_command_refuses(danceopd, loras, tmp_path, monkeypatch):
    from danceopd.cli.blend import Request, run

    monkeypatch.chdir(tmp_path)

    def refused(says, *paths, output="blend", **how):
        with pytest.raises(UserError, match=says) as caught:
            run(Request(paths, output, **how))
        assert "\n" not in str(caught.value)

    refused("did you mean 'sce'", "a", "b", method="sec")
    refused("give each its own weight", "a", "b", weights=[1.0])
    refused("is no share", "a", "b", method="ties", density=2.0)
    refused("does not exist", "a", "gone")
    refused("cancel out", "a", "a", weights=[1.0, -1.0], rank=2)
    write_adapter(loras[1], tmp_path / "other", metadata={"base_sha256": "1" * 64})
    refused("different bases", "a", "other")
    refused("trained on another base than", "other", base="base")
    before = (tmp_path / "a" / "pytorch_lora_weights.safetensors").read_bytes()
    refused("not overwritten", "a", "b", output="a")
    assert (tmp_path / "a" / "pytorch_lora_weights.safetensors").read_bytes() == before
    done = danceopd("blend", "a", "b", "--weights", "1,x")
    assert done.returncode == 2 and "which is no number" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "blend").exists()


# A student's start


def test_a_recipe_names_the_methods():
    assert list(get_args(BlendMethod)) == list(METHODS)


def test_a_start_that_fits_is_exact_and_a_larger_one_says_what_it_lost():
    one, two = adapter(1, 4), adapter(2, 3)
    teachers = {"draws": (one, 1.0), "edits": (two, 0.5), "plain": (None, 1.0)}
    read = {"elsewhere": (two, "a LoRA")}.__getitem__

    start = student_init(Student(rank=4, init="draws"), teachers, read)
    assert start.adapter.sha256 == one.sha256 and start.sentence == "The student started as draws, of rank 4, exactly."
    close(student_init(Student(rank=3, init="edits"), teachers, read).adapter.delta("x"), 0.5 * two.delta("x"))
    there = student_init(Student(rank=3, init="elsewhere"), teachers, read)
    assert there.adapter.sha256 == two.sha256 and "started as a LoRA, of rank 3, exactly" in there.sentence
    small = student_init(Student(rank=2, init="draws"), teachers, read)
    assert small.adapter.rank == 2 and small.residual == pytest.approx(residual(one, small.adapter), rel=1e-4)
    assert f"at rank 2, which lost {small.residual:.1%} of it" in small.sentence
    for init in ("base", "plain"):
        assert student_init(Student(init=init), teachers, read).adapter is None


def test_a_blend_as_a_start():
    one, two = adapter(1, 4), adapter(2, 3)
    teachers = {"draws": (one, 1.0), "edits": (two, 0.5), "plain": (None, 1.0)}
    even = student_init(Student(rank=7), teachers, None)
    close(even.adapter.delta("x"), one.delta("x") / 3 + 0.5 * two.delta("x") / 3)
    assert even.residual == 0 and "linear blend of 0.333 x draws and 0.333 x edits, exactly" in even.sentence
    how = Student(rank=5, init_method="ties", init_weights={"draws": 2.0, "edits": 1.0})
    ties = student_init(how, teachers, None)
    half = Adapter({name: (a, b * 0.5) for name, (a, b) in two.tensors.items()})
    assert ties.adapter.sha256 == blend([one, half], [2.0, 1.0], 5, "ties").sha256
    assert ties.residual > 0.05 and "the ties blend of 2 x draws and 1 x edits, at rank 5" in ties.sentence
