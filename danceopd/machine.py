"""What a number was measured on, in words: the same words in every result."""

from __future__ import annotations

import platform
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")
"""Where Linux says which processor this is."""


def describe(device: str = "cpu") -> str:
    """`Linux x86_64, AMD EPYC 7763 64-Core Processor, 8 threads`; for a CUDA device its name instead of the CPU's."""
    import torch

    if device.startswith("cuda"):
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_processor()}, {torch.get_num_threads()} threads".removeprefix(", ")
    return f"{platform.system()} {platform.machine()}, {chip}"


def _processor() -> str:
    """The CPU's model name, or nothing where nobody says it."""
    try:
        for line in CPU_FACTS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    named = platform.processor()
    return "" if named == platform.machine() else named
