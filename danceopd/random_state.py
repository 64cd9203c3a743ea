"""The state of every random generator of this process, as tensors and plain data, and putting it back.

What an update draws is a function of (seed, step) and needs none of this; what libraries draw on the side does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Of torch on the CPU and on each GPU, numpy and Python: `tensors` for safetensors, `plain` for JSON."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """This process's."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
        if torch.cuda.is_available():
            for index, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"cuda.{index}"] = state
        version, internal, gauss_next = random.getstate()
        return cls(
            tensors,
            {
                "python": [version, list(internal), gauss_next],
                "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
            },
        )

    def restore(self) -> None:
        """Make it this process's state."""
        version, internal, gauss_next = self.plain["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, *rest = self.plain["numpy"]
        np.random.set_state((kind, self.tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(self.tensors["torch"])
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if f"cuda.{index}" in self.tensors:
                    torch.cuda.set_rng_state(self.tensors[f"cuda.{index}"], index)
