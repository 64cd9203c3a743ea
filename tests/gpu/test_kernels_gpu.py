"""The kernels on a GPU: every case against float64, whole transformers, capture and replay, compile, memory.

One command, under two minutes: `python -m pytest tests/gpu`. Without a CUDA device all of it is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CASES, FP32, compare
from tiny_transformers import FAMILIES, build, forward

from danceopd.kernels import attention, installed, using
from danceopd.kernels import backend as kernel_backend
from danceopd.kernels.attention_backends import AttentionCall, CachedKV, candidates
from danceopd.kernels.functional import joint_qkv
from danceopd.kernels.inputs import Stream
from danceopd.kernels.masks import extend, unpad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
BACKENDS = ["cuda", "triton"]


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty returns is NaN, so that a value no kernel writes shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def needs(backend: str) -> None:
    if kernel_backend.unavailable(backend):
        pytest.skip(str(kernel_backend.unavailable(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_float64_than_eager(case, backend):
    needs(backend)
    found = compare(case, backend, "cuda")
    for error, eager in zip(found["errors"], found["eager"]):
        assert error <= 1.1 * eager + (4e-7 if CASES[case][0] == FP32 else 1e-6)
    if CASES[case][0] != FP32:
        assert min(found["same"]) > 0.99


def model_shape(heads: int, dim: int, image: int, text: int, dtype: torch.dtype, grad: bool = False):
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, device="cuda", dtype=dtype)  # noqa: E731
    angle = torch.rand(image + text, dim // 2, generator=generator, device="cuda") * 6
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    x, y = (make(1, n, 3 * heads * dim).requires_grad_(grad) for n in (image, text))
    weights = [make(dim) for _ in range(4)]

    def run():
        image_stream = Stream(x, None, None, *weights[:2], cos[text:], sin[text:])
        text_stream = Stream(y, None, None, *weights[2:], cos[:text], sin[:text])
        return joint_qkv(image_stream, text_stream, head_dim=dim, eps=1e-6)

    return run, [x, y]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24, 64, 1024, 333), (24, 128, 4096, 512), (30, 128, 4096, 224), (38, 64, 1000, 77)])
def test_model_shapes(shape, backend):
    """At full size, forward and backward, against plain torch."""
    needs(backend)
    run, inputs = model_shape(*shape, torch.bfloat16, grad=True)
    with using("torch"):
        eager = run()
    with using(backend):
        fused = run()
    grads = [torch.randn_like(o) for o in eager]
    plain = torch.autograd.grad(eager, inputs, grads)
    found = torch.autograd.grad(fused, inputs, grads)
    for a, b in zip(fused, eager):
        assert (a == b).float().mean() > 0.999
    for a, b in zip(found, plain):
        assert (a - b).float().norm() <= 8e-3 * b.float().norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_transformers(name, dtype, backend):
    needs(backend)
    model, call = build(name)
    model = model.to("cuda", dtype)
    call = {key: moved(value, dtype, key) for key, value in call.items()}
    with torch.no_grad():
        exact_model, exact_call = build(name)
        exact = forward(exact_model, exact_call)
        stock = forward(model, call)
        with installed(model), using(backend):
            fused = forward(model, call)
    error, eager = ((out.float().cpu() - exact).norm() / exact.norm() for out in (fused, stock))
    # in half types the attention backend may differ
    assert error <= 1.1 * eager + (1e-5 if dtype == torch.float32 else 1e-3)


def moved(value, dtype, key):
    if isinstance(value, list):
        return [moved(v, dtype, key) for v in value] if torch.is_tensor(value[0]) else value
    keep = key.endswith("ids") or not value.is_floating_point()
    return value.to("cuda") if keep else value.to("cuda", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_and_replayed(backend):
    """A CUDA graph of the kernels, replayed on new inputs, equals calling them."""
    needs(backend)
    run, (x, y) = model_shape(24, 128, 1024, 512, torch.bfloat16)
    with torch.no_grad(), using(backend):
        run()  # compiles and loads, which cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        x.copy_(torch.randn_like(x))
        y.copy_(torch.randn_like(y))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))


ALONE = """
import torch
from danceopd.kernels import using
from danceopd.kernels.functional import swiglu_concat
x = torch.randn(1, 64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
with using("cuda"):
    out = swiglu_concat(x)
(grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
print("finite", bool(grad.isfinite().all()))
"""


def test_first_on_autograd_s_thread():
    """A gradient whose first work on the device is ours: its thread has no context of CUDA yet."""
    needs("cuda")
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "finite True", done.stderr


def test_compiled_without_a_break():
    needs("cuda")
    run, _ = model_shape(24, 128, 1024, 512, torch.bfloat16)
    with torch.no_grad(), using("cuda"):
        assert all(torch.equal(a, b) for a, b in zip(torch.compile(run, fullgraph=True)(), run()))


def test_on_another_stream():
    needs("cuda")
    run, _ = model_shape(24, 64, 1024, 333, torch.bfloat16)
    with torch.no_grad(), using("cuda"):
        expected = run()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = run()
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_memory_of_the_training_forward():
    """Fused, the segment keeps its packed input and its outputs; eager keeps what every step between made."""
    needs("cuda")
    peaks = {}
    for backend in ("torch", "cuda"):
        run, _ = model_shape(24, 128, 4096, 512, torch.bfloat16, grad=True)
        with using(backend):
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = run()
            peaks[backend] = torch.cuda.max_memory_allocated() - before
            del out
    assert peaks["cuda"] <= 0.5 * peaks["torch"], peaks


# The attention backend


def attention_shape(tokens: int, text: int, heads: int, dim: int, source: int = 0):
    """q, k, v of two rows, a mask that hides half of the second row's text, and a source."""
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda n: torch.randn(2, n, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    mask = torch.arange(text, device="cuda") < torch.tensor([[text], [text // 2]], device="cuda")
    return [make(tokens) for _ in "qkv"], mask, CachedKV(make(source), make(source), text) if source else None


@pytest.mark.parametrize("shape", [(1280, 256, 24, 128), (4352, 256, 24, 128), (1101, 77, 38, 64)])
@pytest.mark.parametrize("name", ["cudnn", "flash4", "varlen"])
def test_every_attention_backend_agrees_with_sdpa(name, shape):
    """On ragged rows at full size: wherever a token is, within what bf16 allows."""
    needs("cuda")
    (q, k, v), mask, _ = attention_shape(*shape)
    call = AttentionCall(q, k, v, mask, unpad(mask, shape[0]))
    reason = attention.unavailable(name, call)
    if reason:
        pytest.skip(reason)
    with torch.no_grad():
        exact = attention.ATTENTION_BACKENDS["sdpa"](call._replace(q=q.float(), k=k.float(), v=v.float()))
        eager = attention.ATTENTION_BACKENDS["sdpa"](call)
        try:
            found = attention.ATTENTION_BACKENDS[name](call)
        except Exception as error:
            pytest.skip(f"{name} refuses this form, as `measure` would find: {error}")
    there = extend(mask, shape[0])
    error, allowed = ((out.float() - exact)[there].norm() for out in (found, eager))
    assert error <= 1.2 * allowed + 1e-3 * exact[there].norm()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_backend_is_measured_once_and_kept(masked, gradient, tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "_chosen", {})
    (q, k, v), mask, _ = attention_shape(1280, 256, 24, 128)
    q.requires_grad_(gradient)
    mask = mask if masked else None
    out = attention.attend(q, k, v, mask)
    ((key, choice),) = attention.choices().items()
    assert choice.backend in candidates(AttentionCall(q, k, v, mask, None if mask is None else unpad(mask, 1280)))
    assert key.startswith("ragged" if masked else "dense") and out.isfinite().all() and out.requires_grad == gradient
    monkeypatch.setattr(attention, "measure", lambda *a: pytest.fail("measured twice"))
    monkeypatch.setattr(attention, "_chosen", {})
    assert torch.equal(attention.attend(q, k, v, mask), out)
