"""`functional.py`, operators and the choice of kernel backend, on a CPU: gradients, tracing, autocast, fallbacks."""

from __future__ import annotations

import logging

import pytest
import torch
from kernel_cases import CASES, draw
from torch.library import opcheck

from danceopd.errors import UserError
from danceopd.kernels import attention_backends
from danceopd.kernels import backend as kernel_backend
from danceopd.kernels.cuda import build
from danceopd.kernels.functional import add_norm, joint_qkv, swiglu_concat
from danceopd.kernels.inputs import Stream
from danceopd.kernels.ops import attention_ops, row_ops
from danceopd.kernels.ops.dispatch import run


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("rope", ["twice", "pairs", "batch"])
def test_gradients_of_joint_qkv(rope, text_first):
    """The written-out derivative of the operator against finite differences, in float64, weights included."""
    heads, dim, image, text = 2, 4, 3, 2
    shape = (2, image + text, dim // 2) if rope == "batch" else (image + text, dim // 2)
    angle = draw(7, *shape)
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    if rope == "pairs":
        cos, sin = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2), None
    rows = (slice(text, None), slice(0, text)) if text_first else (slice(0, image), slice(image, None))
    ropes = [tuple(None if t is None else t[..., r, :] for t in (cos, sin)) for r in rows]

    def function(q, k, v, wq, wk, packed, text_wq, text_wk):
        streams = Stream(q, k, v, wq, wk, *ropes[0]), Stream(packed, None, None, text_wq, text_wk, *ropes[1])
        return joint_qkv(*streams, head_dim=dim, eps=1e-6, text_first=text_first)

    inputs = [draw(i, 2, image, heads * dim) for i in range(3)] + [draw(3, dim), draw(4, dim)]
    inputs += [draw(5, 2, text, 3 * heads * dim), draw(6, dim), draw(8, dim)]
    with kernel_backend.using("op"):
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], nondet_tol=1e-12)


@pytest.mark.parametrize("form", ["layer", "rms", "none", "rms-branch"])
def test_gradients_of_add_norm(form):
    """All seven inputs, modulation of a row for a sample and of a row for a token."""
    kind, branch = form.split("-")[0], form.endswith("branch")

    def function(x, y, gate, scale, shift, weight, y_weight):
        given = {"weight": weight} if kind == "rms" else {}
        given |= {"y_weight": y_weight, "rms_y": True} if branch else {}
        return add_norm(x, y, gate, scale=scale, shift=shift, kind=kind, **given)

    inputs = [draw(0, 2, 3, 6), draw(1, 2, 3, 6), draw(2, 2, 1, 6), draw(3, 2, 3, 6), draw(4, 1, 1, 6)]
    inputs += [draw(5, 6), draw(6, 6)]
    with kernel_backend.using("op"):
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], nondet_tol=1e-12)


def test_gradients_of_swiglu():
    x, up, kept = (draw(i, 2, 3, n).requires_grad_() for i, n in enumerate((6, 6, 4)))
    with kernel_backend.using("op"):
        assert torch.autograd.gradcheck(swiglu_concat, (x, up))
        assert torch.autograd.gradcheck(lambda x, kept: swiglu_concat(x, None, kept), (x, kept))


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw(seed, *shape).float().requires_grad_()


def test_opcheck_of_every_operator():
    """Schemas, shapes for tracing, autograd registration; separate, packed, without v, without norm."""
    dim, width = 4, 8
    cos, sin = draw(1, 3, dim).float(), draw(2, 3, dim).float()
    q, k, v, packed = (leaf(2, 3, n) for n in (width, width, width, 3 * width))
    text, weight, none = [leaf(2, 2, width) for _ in range(3)], leaf(dim), (None,) * 7
    fixed = (dim, 1e-6, True, False)
    ropes = (cos[:2], sin[:2])
    opcheck(attention_ops.qkv_prep, (q, k, v, weight, weight, cos, sin, *text, weight, weight, *ropes, *fixed))
    opcheck(attention_ops.qkv_prep, (packed, None, None, None, None, cos, sin, *none, *fixed))
    opcheck(attention_ops.qkv_prep, (q.detach(), k, None, weight, weight, cos, None, *none, *fixed))
    block = leaf(2, 3, 3 * width + 12)
    opcheck(attention_ops.parallel_prep, (block, weight, weight, cos, sin, dim, width, 1e-6, False))
    x, y, row, c = leaf(2, 3, 6), leaf(2, 3, 6), leaf(2, 1, 6), leaf(6)
    opcheck(row_ops.add_norm, (x, y, row, None, None, row, row, "layer", False, 1e-6, 1e-6))
    opcheck(row_ops.add_norm, (x, y, row.detach(), c, c, None, None, "rms", True, 1e-6, 1e-6))
    opcheck(row_ops.swiglu, (x, None, y))
    opcheck(row_ops.swiglu, (x, y, None))


@pytest.mark.parametrize("case", ["sd3-64-fp16", "layer-1536-fp16", "swiglu-behind-fp16"])
def test_one_graph_under_compile(case):
    """`torch.compile(fullgraph=True)` through the operators: the same values and gradients, no break."""
    dtype, (function, inputs) = CASES[case]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    with kernel_backend.using("op"):
        plain = function(*inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    grads = []
    for out in (plain, compiled):
        out = out if isinstance(out, tuple) else (out,)
        loss = sum(o.float().square().sum() for o in out)
        grads.append([*out, *torch.autograd.grad(loss, inputs, allow_unused=True)])
    assert all(torch.equal(a, b) for a, b in zip(*grads) if a is not None)


def test_autocast():
    """bf16 projections beside fp32 norm weights: bf16 out, the weight not rounded, gradients in their own dtypes."""
    linear, weight = torch.nn.Linear(8, 3 * 8), leaf(4)
    x = draw(0, 2, 3, 8).float()
    results = []
    for backend in ("op", "torch"):
        with kernel_backend.using(backend), torch.autocast("cpu", torch.bfloat16):
            packed = linear(x)
            q, k, v = joint_qkv(Stream(packed, None, None, weight, weight), head_dim=4, eps=1e-6, round_first=True)
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        loss = sum(o.float().pow(2).sum() for o in (q, k, v))
        results.append((q, *torch.autograd.grad(loss, [linear.weight, weight])))
    for fused, plain in zip(*results):
        assert fused.dtype == plain.dtype and (fused - plain).norm() < 1e-2 * plain.norm()


# The choice


def test_an_unknown_backend_is_one_sentence(danceopd):
    done = danceopd("kernels", DANCEOPD_KERNELS="cuad")
    assert done.returncode == 2 and "DANCEOPD_KERNELS=cuad" in done.stderr
    assert "auto, cuda, triton, torch" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run the CUDA backend")
def test_a_backend_that_cannot_run_is_one_sentence(danceopd, monkeypatch):
    done = danceopd("kernels", DANCEOPD_KERNELS="cuda")
    assert done.returncode == 2 and "DANCEOPD_KERNELS=cuda, but " in done.stderr
    monkeypatch.setenv(kernel_backend.VARIABLE, "cuda")
    from danceopd.kernels import install

    with pytest.raises(UserError, match="use auto"):
        install(torch.nn.Linear(1, 1))


def test_the_command_shows_what_runs(danceopd):
    done = danceopd("kernels", DANCEOPD_KERNELS="torch")
    assert done.returncode == 0 and "plain torch" in done.stdout and "torch (DANCEOPD_KERNELS)" in done.stdout
    assert attention_backends.flash4_version() or "danceopd[flash]" in done.stdout  # brackets, not markup


def test_a_cpu_runs_plain_torch(monkeypatch):
    monkeypatch.delenv(kernel_backend.VARIABLE, raising=False)
    assert kernel_backend.active("cpu") == "torch"
    calls = []
    monkeypatch.setattr(row_ops, "add_norm", lambda *a: calls.append(a))
    add_norm(draw(0, 1, 2, 4), scale=draw(1, 1, 1, 4))
    assert not calls


UNSUPPORTED = {
    "head dim 48": lambda: joint_qkv(stream(96), head_dim=48, eps=1e-6),
    "float64 on cpu": lambda: joint_qkv(stream(128, torch.float64), head_dim=64, eps=1e-6),
    "not contiguous": lambda: joint_qkv(stream(256, step=2), head_dim=64, eps=1e-6),
    "multiples of 16 bytes": lambda: joint_qkv(stream(130, first=1), head_dim=64, eps=1e-6),
    "mixed with": lambda: add_norm(draw(0, 1, 2, 8).float(), draw(1, 1, 2, 8).bfloat16()),
    "rows of 8192 columns": lambda: add_norm(draw(0, 1, 2, 8192).float()),
    "4 dimensions": lambda: swiglu_concat(draw(0, 1, 2, 3, 16).float()),
}


def stream(width, dtype=torch.float32, step=1, first=0) -> Stream:
    end = first + 128 if first else None
    q, k, v = (draw(i, 1, 3, width).to(dtype)[..., first:end:step] for i in range(3))
    dim = 48 if width == 96 else 64
    return Stream(q, k, v, torch.ones(dim, dtype=dtype), torch.ones(dim, dtype=dtype))


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_calls_run_in_plain_torch(reason, caplog, monkeypatch):
    """With the same result; logged the first time only."""
    monkeypatch.setattr(kernel_backend, "_warned", set())
    with kernel_backend.using("torch"):
        plain = UNSUPPORTED[reason]()
    for backend in ("cuda", "cuda"):
        with caplog.at_level(logging.WARNING, "danceopd"), kernel_backend.using(backend):
            fused = UNSUPPORTED[reason]()
    plain, fused = (out if isinstance(out, tuple) else (out,) for out in (plain, fused))
    assert all(torch.equal(a, b) for a, b in zip(plain, fused))
    assert len(caplog.records) == 1 and reason in caplog.text


def test_a_kernel_that_cannot_be_built_is_replaced(monkeypatch, caplog):
    """In `auto` by the next backend, logged once; a backend requested by name is an error."""
    monkeypatch.setattr(kernel_backend, "_disabled", {})
    monkeypatch.setattr(kernel_backend, "_warned", set())
    monkeypatch.setattr(kernel_backend, "active", lambda device: "torch" if kernel_backend._disabled else "cuda")

    def refuse(*arguments):
        raise build.CannotBuild("no compiler")

    monkeypatch.setattr("danceopd.kernels.cuda.launch.swiglu", refuse)
    out, x, up = torch.empty(1, 2, 8), draw(0, 1, 2, 8).float(), draw(1, 1, 2, 8).float()
    with caplog.at_level(logging.WARNING, "danceopd"):
        run("swiglu", x, out, x, up, None)
    assert torch.equal(out, torch.nn.functional.silu(x) * up) and "no compiler" in caplog.text
    monkeypatch.setenv(kernel_backend.VARIABLE, "cuda")
    with pytest.raises(UserError, match="no compiler"):
        kernel_backend.disable("cuda", "no compiler")


# The cache of machine code


@pytest.mark.skipif(build.compiler() is None, reason="no CUDA compiler here")
def test_machine_code_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    code = build.cubin("swiglu", "sm_90", {"DTYPE": 1})
    assert code[:4] == b"\x7fELF"
    monkeypatch.setattr(build, "compile_source", lambda *a: pytest.fail("compiled twice"))
    assert build.cubin("swiglu", "sm_90", {"DTYPE": 1}) == code
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".cubin"]
    digests = {build.digest("swiglu", arch, {"DTYPE": t}) for arch in ("sm_90", "sm_80") for t in (0, 1)}
    monkeypatch.setattr(build, "sources", lambda name: ["other"])
    assert len(digests | {build.digest("swiglu", "sm_90", {"DTYPE": 1})}) == 5


@pytest.mark.skipif(build.compiler() is None, reason="no CUDA compiler here")
def test_no_place_for_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "file"))
    assert build.cubin("swiglu", "sm_90", {"DTYPE": 1})[:4] == b"\x7fELF"


def test_no_compiler_says_so(monkeypatch):
    monkeypatch.setattr(build, "nvrtc", lambda: None)
    monkeypatch.setattr(build, "nvcc", lambda: None)
    with pytest.raises(build.CannotBuild, match="nvcc"):
        build.compile_source("swiglu", "sm_90", [])
    assert build.compiler() is None
