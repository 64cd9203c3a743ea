"""The CUDA sources without a GPU: built by the C++ compiler, run on a CPU, compared with eager torch and float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch
from cuda_on_cpu import ENTRIES, HERE, Emulator
from kernel_cases import CASES, FP32, compare
from tiny_transformers import build as tiny
from tiny_transformers import forward

from danceopd.kernels import installed, using
from danceopd.kernels.cuda import build, driver, launch

on_cpu = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA sources for a CPU")


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
    assert {"qkv_prep_forward", "add_norm_forward"} <= set(emulator.launched)


@on_cpu
def test_structs_of_python_and_of_the_sources_are_the_same():
    checks = ["#include <cstddef>", '#include "cuda.h"']
    for name, (struct, _) in ENTRIES.items():
        checks.append(f'namespace of_{name} {{\n#include "{name}.cu"\n}}')
        kinds = {struct: getattr(launch, struct)}
        kinds |= {"Stream": launch.CStream} if name == "qkv_prep" else {}
        for kind, python in kinds.items():
            checks.append(f'static_assert(sizeof(of_{name}::{kind}) == {ctypes.sizeof(python)}, "");')
            for field, *_ in python._fields_:
                offset = getattr(python, field).offset
                checks.append(f'static_assert(offsetof(of_{name}::{kind}, {field}) == {offset}, "{kind}.{field}");')
    shared = '#include "cuda.h"\n#include "common.cuh"\n#include "rows.cuh"'
    source = "\n".join(checks).replace('#include "cuda.h"', shared)
    command = ["g++", "-fsyntax-only", "-w", "-std=c++17", "-x", "c++", "-", f"-I{HERE}", f"-I{build.SOURCES}"]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
