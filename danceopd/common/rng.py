"""Random numbers: a generator for (seed, step, name), and saving and restoring the state of all global generators.

What a training step draws depends on (seed, step) alone. The global state is saved for libraries that draw from it.
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
    """The state of torch on the CPU and each GPU, numpy and Python: `tensors` for safetensors, `plain` for JSON."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """The current state of this process."""
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
        """Set the generators of this process to this state."""
        version, internal, gauss_next = self.plain["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, *rest = self.plain["numpy"]
        np.random.set_state((kind, self.tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(self.tensors["torch"])
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if f"cuda.{index}" in self.tensors:
                    torch.cuda.set_rng_state(self.tensors[f"cuda.{index}"], index)


def stream(seed: int, step: int, name: str) -> np.random.Generator:
    """A numpy generator whose numbers depend on (seed, step, name) alone."""
    return np.random.default_rng([seed, step, *name.encode()])
