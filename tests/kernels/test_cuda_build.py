"""The CUDA sources through nvcc for every architecture: no spills, no local memory, 16-byte accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import ENTRIES

from danceopd.kernels.cuda import build

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
EVERY = os.environ.get("DANCEOPD_EVERY_KERNEL") == "1"
FORMS = {
    "qkv_prep": [{"DTYPE": t, "HEAD_DIM": d} for t in (1, 0, 2) for d in (128, 64, 96)],
    "add_norm": [{"DTYPE": t, "PER_THREAD": n} for t in (1, 0, 2) for n in (2, 1, 3, 4)],
    "swiglu": [{"DTYPE": t} for t in (1, 0, 2)],
}
with_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc here")


def compiled(name: str, defines: dict[str, int], arch: str, folder: Path) -> tuple[Path, str]:
    """The machine code and the report of ptxas."""
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
