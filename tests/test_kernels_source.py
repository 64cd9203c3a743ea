"""The CUDA sources without a GPU: run on a CPU against float64, and compiled for every architecture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import ENTRIES, HERE, Emulator
from kernel_cases import CASES, FP32, compare
from tiny_transformers import build as tiny
from tiny_transformers import forward

from danceopd.attention import build, cuda, driver, installed, using

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
EVERY = os.environ.get("DANCEOPD_EVERY_KERNEL") == "1"
FORMS = {
    "qkv_prep": [{"DTYPE": t, "HEAD_DIM": d} for t in (1, 0, 2) for d in (128, 64, 96)],
    "norm_site": [{"DTYPE": t, "PER_THREAD": n} for t in (1, 0, 2) for n in (2, 1, 3, 4)],
    "swiglu": [{"DTYPE": t} for t in (1, 0, 2)],
}
on_cpu = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA sources for a CPU")
with_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    emulator = Emulator(tmp_path_factory.mktemp("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "launch", emulator.launch)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        yield emulator
        torch.use_deterministic_algorithms(False)


@on_cpu
@pytest.mark.parametrize("case", CASES)
def test_the_sources_compute_what_eager_torch_computes(emulator, case):
    """Forward bit for bit where torch rounds to 16 bits; no gradient further from float64 than eager's."""
    before = len(emulator.launched)
    found = compare(case, "cuda")
    assert len(emulator.launched) >= before + 2  # forward and backward did run
    if CASES[case][0] == FP32:
        assert max(found["errors"]) < 4e-7
        return
    assert min(found["same"]) > 0.999
    for error, eager in zip(found["errors"], found["eager"]):
        assert error <= 1.1 * eager + 1e-6


@on_cpu
@pytest.mark.parametrize("name", ["flux2", "z-image"])
def test_a_whole_transformer_on_the_sources(emulator, name):
    model, call = tiny(name)
    with torch.no_grad():
        stock = forward(model, call)
        with installed(model), using("cuda"):
            fused = forward(model, call)
    assert (fused - stock).norm() < 1e-6 * stock.norm()
    assert {"qkv_prep_forward", "norm_site_forward"} <= set(emulator.launched)


@on_cpu
def test_structs_of_python_and_of_the_sources_are_the_same():
    checks = ["#include <cstddef>", '#include "cuda.h"']
    for name, (struct, _) in ENTRIES.items():
        checks.append(f'namespace of_{name} {{\n#include "{name}.cu"\n}}')
        kinds = {struct: getattr(cuda, struct)}
        kinds |= {"Stream": cuda.CStream} if name == "qkv_prep" else {}
        for kind, python in kinds.items():
            checks.append(f'static_assert(sizeof(of_{name}::{kind}) == {__import__("ctypes").sizeof(python)}, "");')
            for field, *_ in python._fields_:
                offset = getattr(python, field).offset
                checks.append(f'static_assert(offsetof(of_{name}::{kind}, {field}) == {offset}, "{kind}.{field}");')
    source = "\n".join(checks).replace('#include "cuda.h"', '#include "cuda.h"\n#include "common.cuh"')
    command = ["g++", "-fsyntax-only", "-w", "-std=c++17", "-x", "c++", "-", f"-I{HERE}", f"-I{build.SOURCES}"]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def compiled(name: str, defines: dict[str, int], arch: str, folder: Path) -> tuple[Path, str]:
    """The machine code and what ptxas says of it."""
    out = folder / f"{name}-{arch}.cubin"
    flags = [f"-D{key}={value}" for key, value in defines.items()]
    command = [build.nvcc(), "-cubin", f"-arch={arch}", *build.OPTIONS, *flags, f"-I{build.SOURCES}", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", out, build.SOURCES / f"{name}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


@with_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", FORMS)
def test_kernels_compile_without_spills_or_local_memory(name, arch, tmp_path):
    """One form of each kernel for each architecture; all forms under DANCEOPD_EVERY_KERNEL=1."""
    for defines in FORMS[name] if EVERY else FORMS[name][:1]:
        _, report = compiled(name, defines, arch, tmp_path)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frames == [("0", "0", "0")] * len(ENTRIES[name][1]), (defines, report)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert len(registers) == len(frames) and max(registers) <= 128, (defines, registers)


def disassembler() -> str | None:
    triton = Path(sys.prefix) / "lib"
    found = sorted(triton.glob("python*/site-packages/triton/backends/nvidia/bin/cuobjdump"))
    return str(found[0]) if found else shutil.which("cuobjdump")


@with_nvcc
@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump here (Triton's package has one)")
@pytest.mark.parametrize("name", FORMS)
def test_rows_move_sixteen_bytes_at_a_time(name, tmp_path):
    """In the machine code: every load that bypasses L1, and every store of rows, is 128 bits wide."""
    cubin, _ = compiled(name, FORMS[name][0], "sm_90", tmp_path)
    tool = disassembler()
    assert tool is not None
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=env)
    listings = re.split(r"Function : ", done.stdout)[1:]
    assert len(listings) == 2, done.stderr
    for listing in listings:
        once = re.findall(r"LDG\.E\.NA\S*", listing)
        stores = re.findall(r"STG\.E\S*", listing)
        assert once and all(".128" in load for load in once)
        assert stores.count("STG.E.128") >= 2
        if not listing.startswith("qkv_prep_backward"):  # which also writes weight gradients, one float a thread
            assert set(stores) == {"STG.E.128"}
        assert not re.search(r"\b(LDL|STL)\b", listing)
