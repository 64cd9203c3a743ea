"""Tensor helpers that every room may use: dtype names, a layer's dtype, and a value per row over a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype names of recipes and command-line options."""


def append_dims(value: Tensor, x: Tensor) -> Tensor:
    """`value` (B,) with dimensions of size 1 appended, so that it multiplies the rows of `x` (B, …).

    Any leading dimensions work: `value` (N, B) goes with `x` (N, B, …). As `append_dims` in k-diffusion.
    """
    return value.reshape(*value.shape, *[1] * (x.ndim - value.ndim))


def compute_dtype(linear: Any) -> torch.dtype:
    """The dtype in which a Linear takes its inputs: its weight's, or, where that is packed, the one that it names."""
    return getattr(linear, "compute_dtype", None) or linear.weight.dtype
