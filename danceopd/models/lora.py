"""`Adapter`: a LoRA in memory, one pair of matrices for each adapted Linear."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Adapter:
    """A LoRA: module path in the transformer -> (A (r, in), B (out, r)), alpha folded into B.

    fp32; the layer computes `W x + B A x`. Ranks may differ between modules; modules are kept sorted.
    ValueError for shapes that do not multiply.
    """

    tensors: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        for name, (a, b) in self.tensors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"{name}: A {tuple(a.shape)}, B {tuple(b.shape)}: not (r, in) and (out, r)")
        self.tensors = {name: (a.float(), b.float()) for name, (a, b) in sorted(self.tensors.items())}

    def __len__(self) -> int:
        """Number of adapted modules."""
        return len(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {name: a.shape[0] for name, (a, _) in self.tensors.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 when there is none."""
        return max(self.ranks.values(), default=0)

    @property
    def parameters(self) -> int:
        """Number of parameters, A and B together."""
        return sum(a.numel() + b.numel() for a, b in self.tensors.values())

    def delta(self, module: str) -> Tensor:
        """What is added to a module's weight: (out, in), fp32. KeyError for a module that is not adapted."""
        a, b = self.tensors[module]
        return b @ a

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and fp32 values: equal for equal adapters, from whatever file."""
        digest = hashlib.sha256()
        for name, pair in self.tensors.items():
            for tensor in pair:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Adapter:
        """A detached copy on `device`, its values rounded to `dtype` when given (they stay fp32)."""

        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(device, copy=True)
            return tensor if dtype is None else tensor.to(dtype).float()

        return Adapter({name: (move(a), move(b)) for name, (a, b) in self.tensors.items()})
