"""Ragged attention: its reference, its CUDA source on a CPU, its Triton kernel in the interpreter, and when it runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attention_cases
import pytest
import torch
from attention_cases import BF16, CASES, FORMS, FP32, alone, compare, compare_prepared, fixed, inputs, kernel, streams
from cuda_on_cpu import Emulator
from kernel_cases import draw
from test_cuda_build import ATTENTION, EVERY, compiled, disassembler
from tiny_transformers import build as tiny
from tiny_transformers import forward
from torch.library import opcheck

from danceopd.kernels import attention, backend, installed, prologue, using
from danceopd.kernels.attention import attend
from danceopd.kernels.attention_backends import AttentionCall, CachedKV, candidates, unavailable
from danceopd.kernels.cuda import build, driver
from danceopd.kernels.masks import unpad
from danceopd.kernels.ops.ragged_ops import prepared_attention, ragged_attention
from danceopd.kernels.prologue import joint_attention, worth_fusing

HELPERS = Path(attention_cases.__file__).parent
on_cpu = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA sources for a CPU")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    emulator = Emulator(tmp_path_factory.mktemp("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "launch", emulator.launch)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        yield emulator
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_sdpa_of_each_sample_alone(name):
    case = CASES[name]
    assert torch.allclose(kernel(case, "op", torch.float64), alone(case, torch.float64), rtol=1e-10, atol=1e-12)


@on_cpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != FP32])
def test_the_cuda_kernel_is_no_further_from_float64_than_sdpa(emulator, name):
    before = len(emulator.launched)
    found = compare(name, "cuda")
    assert emulator.launched[before:] == ["ragged_attention"]
    assert found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


@pytest.fixture(scope="module")
def triton_cases():
    """Every case, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed (it comes with danceopd[gpu], on Linux)")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, str(HELPERS / "attention_cases.py"), "triton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != BF16])
def test_the_triton_kernel_is_no_further_from_float64_than_sdpa(triton_cases, name):
    found = triton_cases[name]
    assert found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


def test_opcheck():
    for name in ("listed-source-128-fp32", "packed-64-fp32"):
        (q, k, v, *more), facts = inputs(CASES[name])
        max_seqlen = facts.pop("max_seqlen")
        arguments = (q, k, v, *facts.values(), *(more or (None, None)), max_seqlen, 0.1)
        opcheck(ragged_attention, arguments)
        with using("op"):
            traced = torch.compile(ragged_attention, fullgraph=True, backend="aot_eager")(*arguments)
            assert torch.equal(traced, ragged_attention(*arguments))


# With norm and rotation in its prologue


@pytest.mark.parametrize("name", FORMS)
def test_the_reference_of_the_prologue_is_prep_and_attention(name):
    form = FORMS[name]
    found = attention_cases.prepared(form, "op", torch.float64)
    assert torch.allclose(found, attention_cases.eager(form, torch.float64), rtol=1e-10, atol=1e-12)


@on_cpu
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.dtype != FP32])
def test_the_cuda_prologue_equals_the_two_kernels(emulator, name):
    """Bit for bit, since both round at the same places; and no further from float64 than eager."""
    before = len(emulator.launched)
    found = compare_prepared(name, "cuda")
    assert emulator.launched[before:] == ["prepared_attention", "qkv_prep_forward", "ragged_attention"]
    assert found["apart"] == 0 and found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.dtype != BF16])
def test_the_triton_prologue_equals_the_two_kernels(triton_cases, name):
    found = triton_cases[f"prologue {name}"]
    assert found["apart"] == 0 and found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


@pytest.mark.parametrize("name", ["flux-128-fp32", "packed-64-fp16"])
def test_opcheck_with_a_prologue(name):
    arguments = attention_cases.arguments(FORMS[name], FP32)
    opcheck(prepared_attention, arguments)
    with using("op"):
        traced = torch.compile(prepared_attention, fullgraph=True, backend="aot_eager")(*arguments)
        assert torch.equal(traced, prepared_attention(*arguments))


def streams_of(name, dtype=None):
    """Streams, mask and source of a form, and the named arguments, as a processor has them."""
    form = FORMS[name]
    image, text, more = streams(form, dtype or form.dtype)
    mask = torch.tensor([n for n, _ in form.mask])[:, None] > torch.arange(form.mask[0][1]) if form.mask else None
    named = dict(zip(("head_dim", "eps", "round_first", "text_first"), fixed(form)))
    return (image, text, mask, CachedKV(*more, form.text) if more else None), named


@on_cpu
@pytest.mark.parametrize("name", ["flux-128-bf16", "image-first-64-fp16", "unnormed-96-fp16"])
def test_few_queries_are_prepared_in_the_attention_kernel(emulator, name, monkeypatch):
    given, named = streams_of(name)
    few = -(-FORMS[name].tokens // 64)

    def launched(blocks=few, **more):
        monkeypatch.setattr(prologue, "MAX_BLOCKS", blocks)
        before = len(emulator.launched)
        with attention.forced("ours"), using("cuda"):
            out = joint_attention(*given, **named, **more)
        return out, emulator.launched[before:]

    (out, one), (apart, two) = launched(), launched(few - 1)
    assert one == ["prepared_attention"] and two == ["qkv_prep_forward", "ragged_attention"]
    assert torch.equal(out, apart) and launched(prologue=False)[1] == two and launched(0, prologue=True)[1] == one


def test_the_prologue_runs_only_where_ours_is_the_backend(monkeypatch):
    q, k, v, source = tensors()
    ragged, dense = AttentionCall(q, k, v, MASK, unpad(MASK, 70)), AttentionCall(q, k, v)
    long = AttentionCall(*tensors(tokens=129)[:3], source=source)
    with attention.forced("ours"):
        assert worth_fusing(ragged) and worth_fusing(AttentionCall(q, k, v, source=source)) and not worth_fusing(long)
        assert not worth_fusing(dense)
        assert not worth_fusing(AttentionCall(q, k, v, MASK, None, source))  # a mask that may not be read
    assert not worth_fusing(ragged)  # a CPU runs SDPA
    monkeypatch.setattr(attention, "uses_plain_sdpa", lambda call: False)
    monkeypatch.setattr(attention, "_chosen", {})
    assert not worth_fusing(ragged)  # not measured yet
    attention._chosen[attention.shape_key(ragged)] = attention.Choice("ours", "measured")
    assert worth_fusing(ragged) and not worth_fusing(AttentionCall(q, k, v, source=source))


def test_a_prologue_that_cannot_run_is_logged_once(monkeypatch, caplog):
    """With a gradient, or streams that differ in kind, q and k are prepared first; the gradient is plain torch's."""
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(prologue, "prepared_attention", lambda *a: pytest.fail("cannot run"))
    (image, text, mask, source), named = streams_of("flux-128-fp32", FP32)
    plain = joint_attention(image, text, mask, source, **named)
    q = image.q.clone().requires_grad_()
    with caplog.at_level(logging.WARNING, "danceopd"), attention.forced("ours"), using("op"):
        found = joint_attention(image._replace(q=q), text, mask, source, **named)
        with torch.no_grad():
            joint_attention(image._replace(cos=None, sin=None), text, mask, source, **named)
    there = attention_cases.eager(FORMS["flux-128-fp32"], torch.float64).abs().sum(dim=(2, 3)) > 0
    assert torch.allclose(found[there], plain[there], atol=1e-6) and found.requires_grad
    assert "the prologue has no gradient" in caplog.text and "differ in norm or rotary table" in caplog.text


@pytest.mark.parametrize("name", ["qwen", "z-image"])
def test_whole_transformers_with_ragged_rows(name, monkeypatch):
    model, call = tiny(name)
    count, forms = [], []
    monkeypatch.setattr(prologue, "prepared_attention", lambda *a: count.append(a) or prepared_attention(*a))
    with torch.no_grad():
        stock = forward(model, call)
        with installed(model), attention.forced("ours"), using("op"):
            assert (forward(model, call) - stock).norm() < 1e-6 * stock.norm()
            monkeypatch.setattr(prologue, "worth_fusing", lambda call: forms.append(call.unpadded) or False)
            forward(model, call)
    assert len(count) == sum(rows is not None for rows in forms) > 1


# As an attention backend


def tensors(dtype=torch.float16, dim=64, tokens=70):
    q, k, v = (draw(i, 2, tokens, 2, dim).to(dtype) for i in range(3))
    return q, k, v, CachedKV(*(draw(5 + i, 2, 20, 2, dim).to(dtype) for i in range(2)), 30)


MASK = torch.arange(30) < torch.tensor([[30], [11]])


@on_cpu
@pytest.mark.parametrize("masked", [True, False])
def test_it_replaces_sdpa(emulator, masked):
    """Under a mask and with a source: the same result at every visible token."""
    q, k, v, source = tensors()
    mask = MASK if masked else None
    plain = attend(q, k, v, mask, source)
    with attention.forced("ours"), using("cuda"):
        found = attend(q, k, v, mask, source)
    there = torch.ones(2, 70, dtype=torch.bool)
    there[:, :30] = MASK if masked else True
    assert (found - plain)[there].norm() < 1e-3 * plain[there].norm()
    assert emulator.launched[-1] == "ragged_attention" and not found[~there].any()


def test_it_is_no_candidate_for_dense_rows():
    q, k, v, source = tensors()
    ragged = AttentionCall(q, k, v, MASK, unpad(MASK, 70))
    assert "ours" not in candidates(AttentionCall(q, k, v)) and "ours" in candidates(ragged)
    assert "ours" in candidates(AttentionCall(q, k, v, source=source))
    assert "ours" not in candidates(AttentionCall(q, k, v, MASK[:, None, None, :]))


def test_with_a_gradient_sdpa_runs_which_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_warned", set())
    q, k, v, source = tensors(torch.float32)
    q.requires_grad_()
    plain = attend(q, k, v, MASK, source)
    with caplog.at_level(logging.WARNING, "danceopd"), attention.forced("ours"), using("op"):
        for _ in range(2):
            assert torch.equal(attend(q, k, v, MASK, source), plain)
    assert plain.requires_grad and len(caplog.records) == 1 and "has no gradient" in caplog.text


UNSUPPORTED = {
    "head dim 48": tensors(dim=48),
    "bf16 and fp16 only": tensors(torch.float32),
    "heads are not next to each other": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()[:3]],
    "multiples of 16 bytes": [torch.cat([x, x[:, :, :, :4]], -1)[..., 4:] for x in tensors()[:3]],
    "mixed with": [tensors()[0], tensors(torch.bfloat16)[1], tensors()[2]],
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported(reason):
    q, k, v = UNSUPPORTED[reason][:3]
    with using("cuda"):
        found = unavailable("ours", AttentionCall(q, k, v, MASK, unpad(MASK, 70)))
    assert reason in found or "heads are not next" in found and reason == "multiples of 16 bytes"
    with using("torch"):
        assert "off" in unavailable("ours", AttentionCall(q, k, v, MASK, unpad(MASK, 70)))


# For GPUs that are not here


ARCHS = ("90", "100") if EVERY else ("90",)
COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from danceopd.kernels.triton import attention, prepared

FLAGS = {"D": 128, "BD": 128, "BM": 64, "BN": 64, "PAIRS": 0}
KINDS = {"cu_seqlens": "*i32", "tokens": "*i32", "cos": "*fp32", "sin": "*fp32", "text_cos": "*fp32",
         "text_sin": "*fp32"}
for kernel in (attention._attend, prepared._attend_prepared):
    constants, signature, divisible = {}, {}, {}
    for i, p in enumerate(kernel.params):
        if p.is_constexpr:
            constants[p.name], signature[p.name] = FLAGS.get(p.name, 1), "constexpr"
        elif p.name in ("scale", "eps"):
            signature[p.name] = "fp32"
        elif p.name.endswith(("_batch", "_token")):
            signature[p.name], divisible[(i,)] = "i32", [["tt.divisibility", 16]]
        elif p.name in ("heads", "length", "source", "first", "text_first", "texts"):
            signature[p.name] = "i32"
        else:
            signature[p.name] = KINDS.get(p.name, "*bf16")
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
    for arch in map(int, sys.argv[1:]):
        few = attention.stages(torch.empty(0, dtype=torch.bfloat16), kernel is prepared._attend_prepared)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_stages": few})
        text = made.asm["ptx"]
        print(arch, "mma" in text or "tcgen05" in text, ".local" in text, made.metadata.shared <= 101376)
"""


def test_the_triton_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed (it comes with danceopd[gpu], on Linux)")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, *ARCHS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{arch} True False True" for arch in ARCHS] * 2


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("name", ATTENTION)
def test_every_product_is_a_tensor_core_s(name, tmp_path):
    """In the machine code: matrix products, asynchronous 16-byte copies in, 16-byte stores out, no local memory."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump here (Triton's package has one)")
    cubin, _ = compiled(name, {"DTYPE": 1, "HEAD_DIM": 128}, "sm_90", tmp_path)
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=env)
    listing = done.stdout
    assert listing.count("HMMA.16816.F32.BF16") >= 128 and "LDSM.16.MT88.4" in listing, done.stderr
    copies = [word for word in listing.split() if word.startswith("LDGSTS")]
    stores = [word for word in listing.split() if word.startswith("STG")]
    assert copies and all(".128" in word for word in copies) and stores and set(stores) == {"STG.E.128"}
    assert "LDL" not in listing and "STL" not in listing
