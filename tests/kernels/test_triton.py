"""The Triton kernels: run by Triton's interpreter on a CPU, and compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
from kernel_cases import BF16, CASES, FP32

pytest.importorskip("triton", reason="triton is not installed (it comes with danceopd[gpu], on Linux)")


@pytest.fixture(scope="module")
def found():
    """Every case, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    script = Path(kernel_cases.__file__)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parent)}
    command = [sys.executable, str(script), "triton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_what_eager_torch_computes(found, case):
    """As the CUDA sources; in bf16 only roughly, for the interpreter cuts mantissas off where a GPU rounds them."""
    row, dtype = found[case], CASES[case][0]
    if dtype == FP32:
        assert max(row["errors"]) < 4e-7
    elif dtype == BF16:
        assert max(row["errors"]) < 2e-2
    else:
        assert min(row["same"]) > 0.999
        for error, eager in zip(row["errors"], row["eager"]):
            assert error <= 1.1 * eager + 1e-6


COMPILE = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from danceopd.kernels.triton import qkv, rows

FLAGS = {"D": 128, "BH": 32, "BD": 128, "BLOCK": 2048, "KIND": 1}
FORMS = [(qkv._qkv_forward, {}), (qkv._qkv_backward, {}), (rows._add_norm_forward, {"KIND": 2}),
         (rows._add_norm_backward, {}), (rows._swiglu_forward, {}), (rows._swiglu_backward, {})]
FP32 = {"cos", "sin", "partial", "eps", "y_eps"}
for kernel, more in FORMS:
    constants, signature, divisible = {}, {}, {}
    for i, p in enumerate(kernel.params):
        if p.is_constexpr:
            constants[p.name] = {**FLAGS, **more}.get(p.name, 1)
            signature[p.name] = "constexpr"
        elif p.name in ("eps", "y_eps"):
            signature[p.name] = "fp32"
        elif p.name.endswith(("_batch", "_token", "_head")) or p.name in ("width", "passed_width"):
            signature[p.name], divisible[(i,)] = "i32", [["tt.divisibility", 16]]
        elif p.name in ("first", "tokens", "heads") or (p.name == "total" and "_qkv" in kernel.__name__):
            signature[p.name] = "i32"
        else:
            signature[p.name] = "*fp32" if p.name in FP32 else "*bf16"
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
    for arch in map(int, sys.argv[1:]):
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        wide = re.findall(r"(?:ld|st)[.]global[^ ]*[.]v[48][.]", made.asm["ptx"])
        print(kernel.__name__, arch, made.metadata.shared, len(wide), "local" if ".local" in made.asm["ptx"] else "")
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For two architectures; vector accesses throughout, and no local memory."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, "90", "100"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert len(row) == 4 and int(row[3]) >= 3, row
