"""Ragged attention: its meaning, its CUDA source on a CPU, its Triton twin in the interpreter, and when it is asked."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attend_cases import BF16, CASES, FP32, alone, compare, inputs, kernel
from cuda_on_cpu import Emulator
from kernel_cases import draw
from test_kernels_build import EVERY, compiled, disassembler
from torch.library import opcheck

from danceopd.attention import build, choose, core, driver, using
from danceopd.attention.core import attend
from danceopd.attention.cores import Call, Source, absent, candidates
from danceopd.attention.masks import rows_of
from danceopd.attention.ragged import ragged_attention

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
def test_the_meaning_is_sdpa_of_each_sample_alone(name):
    case = CASES[name]
    assert torch.allclose(kernel(case, "op", torch.float64), alone(case, torch.float64), rtol=1e-10, atol=1e-12)


@on_cpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != FP32])
def test_the_source_is_no_further_from_float64_than_sdpa(emulator, name):
    before = len(emulator.launched)
    found = compare(name, "cuda")
    assert emulator.launched[before:] == ["ragged_attention"]
    assert found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


@pytest.fixture(scope="module")
def twins():
    """Every case, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed (it comes with danceopd[gpu], on Linux)")
    here = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(here)}
    command = [sys.executable, str(here / "attend_cases.py"), "triton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != BF16])
def test_the_twin_is_no_further_from_float64_than_sdpa(twins, name):
    found = twins[name]
    assert found["error"] <= 1.1 * found["eager"] and found["hidden"] == 0


def test_the_operator_keeps_the_rules_of_torch():
    for name in ("listed-source-128-fp32", "packed-64-fp32"):
        (q, k, v, *more), facts = inputs(CASES[name])
        longest = facts.pop("longest")
        arguments = (q, k, v, *facts.values(), *(more or (None, None)), longest, 0.1)
        opcheck(ragged_attention, arguments)
        with using("op"):
            traced = torch.compile(ragged_attention, fullgraph=True, backend="aot_eager")(*arguments)
            assert torch.equal(traced, ragged_attention(*arguments))


# As a core


def tensors(dtype=torch.float16, dim=64, tokens=70):
    q, k, v = (draw(i, 2, tokens, 2, dim).to(dtype) for i in range(3))
    return q, k, v, Source(*(draw(5 + i, 2, 20, 2, dim).to(dtype) for i in range(2)), 30)


MASK = torch.arange(30) < torch.tensor([[30], [11]])


@on_cpu
@pytest.mark.parametrize("masked", [True, False])
def test_it_stands_in_for_sdpa(emulator, masked):
    """Under a mask and with a source: the same answer wherever a token is."""
    q, k, v, source = tensors()
    mask = MASK if masked else None
    plain = attend(q, k, v, mask, source)
    with core.forced("ours"), using("cuda"):
        found = attend(q, k, v, mask, source)
    there = torch.ones(2, 70, dtype=torch.bool)
    there[:, :30] = MASK if masked else True
    assert (found - plain)[there].norm() < 1e-3 * plain[there].norm()
    assert emulator.launched[-1] == "ragged_attention" and not found[~there].any()


def test_it_is_never_asked_for_dense_rows():
    q, k, v, source = tensors()
    ragged = Call(q, k, v, MASK, rows_of(MASK, 70))
    assert "ours" not in candidates(Call(q, k, v)) and "ours" in candidates(ragged)
    assert "ours" in candidates(Call(q, k, v, source=source))
    assert "ours" not in candidates(Call(q, k, v, MASK[:, None, None, :]))


def test_with_a_gradient_it_gives_way_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(choose, "_said", set())
    q, k, v, source = tensors(torch.float32)
    q.requires_grad_()
    plain = attend(q, k, v, MASK, source)
    with caplog.at_level(logging.WARNING, "danceopd"), core.forced("ours"), using("op"):
        for _ in range(2):
            assert torch.equal(attend(q, k, v, MASK, source), plain)
    assert plain.requires_grad and len(caplog.records) == 1 and "has no gradient" in caplog.text


OUTSIDE = {
    "heads of 48 columns": tensors(dim=48),
    "bf16 and fp16 only": tensors(torch.float32),
    "heads are not next to each other": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()[:3]],
    "multiples of 16 bytes": [torch.cat([x, x[:, :, :, :4]], -1)[..., 4:] for x in tensors()[:3]],
    "mixed with": [tensors()[0], tensors(torch.bfloat16)[1], tensors()[2]],
}


@pytest.mark.parametrize("reason", OUTSIDE)
def test_outside_the_envelope(reason):
    q, k, v = OUTSIDE[reason][:3]
    with using("cuda"):
        said = absent("ours", Call(q, k, v, MASK, rows_of(MASK, 70)))
    assert reason in said or "heads are not next" in said and reason == "multiples of 16 bytes"
    with using("torch"):
        assert "off" in absent("ours", Call(q, k, v, MASK, rows_of(MASK, 70)))


# For GPUs that are not here


ARCHS = ("90", "100") if EVERY else ("90",)
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from danceopd.attention import attend_twin

FLAGS = {"RAGGED": 1, "LISTED": 1, "SOURCE": 1, "D": 128, "BD": 128, "BM": 64, "BN": 64}
kernel = attend_twin._attend
constants, signature, divisible = {}, {}, {}
for i, p in enumerate(kernel.params):
    if p.is_constexpr:
        constants[p.name], signature[p.name] = FLAGS[p.name], "constexpr"
    elif p.name == "scale":
        signature[p.name] = "fp32"
    elif p.name.endswith(("_batch", "_token")):
        signature[p.name], divisible[(i,)] = "i32", [["tt.divisibility", 16]]
    elif p.name in ("heads", "length", "source"):
        signature[p.name] = "i32"
    else:
        signature[p.name] = "*i32" if p.name in ("cumulative", "tokens") else "*bf16"
        divisible[(i,)] = [["tt.divisibility", 16]]
source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
for arch in map(int, sys.argv[1:]):
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    text = made.asm["ptx"]
    print(arch, "mma" in text or "tcgen05" in text, ".local" in text)
"""


def test_the_twin_compiles_for_gpus_that_are_not_here(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed (it comes with danceopd[gpu], on Linux)")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, *ARCHS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{arch} True False" for arch in ARCHS]


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc here")
def test_every_product_is_a_tensor_core_s(tmp_path):
    """In the machine code: matrix products, asynchronous 16-byte copies in, 16-byte stores out, no local memory."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump here (Triton's package has one)")
    cubin, _ = compiled("ragged_attention", {"DTYPE": 1, "HEAD_DIM": 128}, "sm_90", tmp_path)
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=env)
    listing = done.stdout
    assert listing.count("HMMA.16816.F32.BF16") >= 128 and "LDSM.16.MT88.4" in listing, done.stderr
    copies = [word for word in listing.split() if word.startswith("LDGSTS")]
    stores = [word for word in listing.split() if word.startswith("STG")]
    assert copies and all(".128" in word for word in copies) and stores and set(stores) == {"STG.E.128"}
    assert "LDL" not in listing and "STL" not in listing
