"""The CUDA sources of danceopd compiled by the C++ compiler and run on a CPU, one fiber a CUDA thread.

What this checks: indexing, strides, alignment, lanes missing at a shuffle, arithmetic, the structs that Python fills.
What it cannot check: the compiler for the GPU, races between blocks (there is no such traffic), speed.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from danceopd.kernels.cuda import build

HERE = Path(__file__).parent
ENTRIES = {
    "qkv_prep": ("Prep", ("qkv_prep_forward", "qkv_prep_backward")),
    "add_norm": ("AddNorm", ("add_norm_forward", "add_norm_backward")),
    "swiglu": ("Swiglu", ("swiglu_forward", "swiglu_backward")),
}
LAUNCH = """
extern "C" int launch_{entry}(int x, int y, int threads, const void* argument) {{
    return run(x, y, threads, [](const void* a) {{ {entry}(*static_cast<const {struct}*>(a)); }}, argument);
}}
"""


class Emulator:
    """`launch` in place of `driver.launch`. Libraries are built into `folder` on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.libraries, self.launched = folder, dict[str, ctypes.CDLL](), list[str]()

    def launch(
        self,
        like: torch.Tensor,
        name: str,
        entry: str,
        defines: Mapping[str, int],
        grid: tuple[int, int],
        threads: int,
        argument: ctypes.Structure,
    ) -> None:
        assert threads % 32 == 0 and 32 <= threads <= 256
        key = "-".join([name, *(f"{k}{v}" for k, v in sorted(defines.items()))])
        if key not in self.libraries:
            self.libraries[key] = self.build(name, defines, self.folder / f"{key}.so")
        self.launched.append(entry)
        status = getattr(self.libraries[key], f"launch_{entry}")(*grid, threads, ctypes.byref(argument))
        assert status == 0, f"{entry}: a lane waits for one that has left"

    @staticmethod
    def build(name: str, defines: Mapping[str, int], out: Path) -> ctypes.CDLL:
        struct, entries = ENTRIES[name]
        source = f'#include "cuda.h"\n#include "{name}.cu"\n'
        source += "".join(LAUNCH.format(entry=entry, struct=struct) for entry in entries)
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        folders = [f"-I{HERE}", f"-I{build.SOURCES}"]
        command = ["g++", "-O1", "-w", "-shared", "-fPIC", "-std=c++17", "-x", "c++", "-", *folders, *flags]
        subprocess.run([*command, "-o", str(out)], input=source, text=True, check=True)
        return ctypes.CDLL(str(out))
