"""This machine and this run: a device by name, peak memory, and for results the machine and the command line."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.errors import UserError

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|failed to|unable to) allocate|_ALLOC_FAILED|"
    r"storage size calculation overflowed|integer multiplication overflow",
    re.I,
)
"""What CUDA, its libraries, torch's and numpy's allocators and `mmap` say."""
CPUINFO = Path("/proc/cpuinfo")
"""Where Linux describes the processor."""


PUBLIC_QUERY = ("api-version", "api_version", "version", "model", "deployment")
"""Names in a URL's query whose values are no keys."""
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_QUERY = re.compile(rf"([?&](?!(?:{'|'.join(PUBLIC_QUERY)})=)[\w.~-]+=)[^&#\s'\"]*", re.I)
_NAMED = re.compile(
    r"((?:^|[\s'\":-])(?:[\w-]*[_-])?(?:key|token|secret|password|bearer)(?:=|\s+|['\"],?\s*['\"]))[^\s'\"]+", re.I
)
_TOKEN = re.compile(r"\b(?:(?:sk|pk|rk|gsk|xai)[-_]|(?:hf|gh[opsu]|r8)_|github_pat_|AIza)[\w-]{16,}")


def redacted(text: str) -> str:
    """The text without the keys in it: of a URL the user and the query's values, what follows a word such as
    --api-key, and what looks like a key of a known service."""
    text = _QUERY.sub(r"\1***", _USER.sub("", text))
    return _TOKEN.sub("***", _NAMED.sub(r"\1***", text))


def command_line() -> str:
    """The command that runs, as results record it: without keys."""
    return redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def describe_machine(device: str = "cpu") -> str:
    """`Linux x86_64, AMD EPYC 7763 64-Core Processor, 8 threads`; for a CUDA device its name instead of the CPU's."""
    import torch

    if device.startswith("cuda"):
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_processor()}, {torch.get_num_threads()} threads".removeprefix(", ")
    return f"{platform.system()} {platform.machine()}, {chip}"


def _processor() -> str:
    """The CPU's model name; empty when it is not known."""
    try:
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    named = platform.processor()
    return "" if named == platform.machine() else named


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu" or "cuda"; UserError for another name, and for cuda without a usable GPU."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and this machine has no CUDA device that torch can use; give --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, of a GPU's libraries, or of the operating system."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(OUT_OF_MEMORY.search(str(error)))


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process(os.getpid()).memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gigabytes(number: float) -> str:
    """A number of bytes in a unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f} {unit}"
    return f"{number / 1e3:.1f} kB"
