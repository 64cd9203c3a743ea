"""The device that a merge is planned for: the one at hand, or a card by its name or its memory (`--gpu`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError

CONTEXT = 0.8e9
"""Bytes of a CUDA context with its kernels (0.5 GB), and of the workspaces of cuBLAS and cuDNN."""
CARDS = {
    "t4": (15.6, 40),
    "v100-16gb": (16.9, 90),
    "v100": (34.1, 90),
    "4070": (12.6, 55),
    "4080": (16.9, 90),
    "3090": (25.3, 65),
    "4090": (25.3, 150),
    "5080": (16.6, 105),
    "5090": (33.7, 190),
    "l4": (23.6, 55),
    "a10g": (23.7, 60),
    "a40": (47.6, 110),
    "l40s": (47.6, 240),
    "a6000": (50.9, 120),
    "6000-ada": (50.9, 240),
    "pro-6000": (101.9, 350),
    "a100-40gb": (42.3, 240),
    "a100": (85.1, 250),
    "h100": (85.0, 640),
    "h200": (150.1, 700),
    "b200": (191.5, 1400),
}
"""Memory in GB (1e9 bytes) as torch reports it, and TFLOP/s that a plain matrix product in half precision reaches."""
OLD = ("t4", "v100-16gb", "v100")
"""Cards without bfloat16."""


@dataclass(frozen=True)
class Card:
    """A device: its memory in bytes, and the TFLOP/s of a plain matrix product (None: not known, or to be measured)."""

    name: str
    memory: int
    cuda: bool
    bf16: bool = True
    tflops: float | None = None


def card_here(device: torch.device) -> Card:
    """The device of this process; of a GPU, the memory that other processes leave."""
    if device.type != "cuda":
        return Card(str(device), int(psutil.virtual_memory().total), False)
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device) + CONTEXT
    name, bf16 = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
    return Card(name, int(min(total, free + ours)), True, bf16)


def card_named(text: str) -> Card:
    """The card of `--gpu`: memory such as `24GB`, or a name such as `4090`, `rtx-4090`, `a100-40gb`, `H100 80GB`.

    UserError for a name that is not known.
    """
    given = re.sub(r"[\s_-]+", "-", text.strip().lower())
    memory = re.fullmatch(r"(\d+(?:\.\d+)?)-?g(?:i?b)?", given)
    if memory and 0 < float(memory[1]) < 1e4:
        unit = 2**30 if "gib" in given else 1e9
        return Card(f"a card of {memory[1]} {'GiB' if 'gib' in given else 'GB'}", int(float(memory[1]) * unit), True)
    name = re.sub(r"^(nvidia|geforce|tesla|quadro|rtx|gtx|-)+", "", given)
    bare = re.sub(r"-(sxm\d?|pcie|nvl|blackwell|hbm\d\w?|generation|server-edition)", "", name)
    shorter = re.sub(r"-\d+gb", "", bare)
    names = {"6000": "6000-ada", "ada-6000": "6000-ada", "a10": "a10g"}
    for known in (names.get(one, one) for one in (name, bare, shorter)):
        if known in CARDS:
            size, tflops = CARDS[known]
            return Card(known.upper(), int(size * 1e9), True, known not in OLD, float(tflops))
    raise UserError(f"--gpu is {text!r}; give its memory, such as 24GB, or its name{did_you_mean(shorter, CARDS)}")
