"""`Adapter`: counts, hashes, products, rounding and copies."""

from __future__ import annotations

import pytest
import torch

from danceopd.models.lora import Adapter


def test_adapter_counts_hashes_and_multiplies():
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    one = Adapter({"y": (a, b), "x": (a[:1], b[:, :1])})
    assert (one.rank, one.ranks, one.parameters, len(one)) == (2, {"x": 1, "y": 2}, 24, 2)
    assert torch.equal(one.delta("y"), b @ a)
    assert one.sha256 == Adapter({"x": (a[:1], b[:, :1]), "y": (a, b)}).sha256
    assert one.sha256 != Adapter({"y": (a, b), "z": (a[:1], b[:, :1])}).sha256
    assert one.sha256 != Adapter({"y": (a + 1e-6, b), "x": (a[:1], b[:, :1])}).sha256
    with pytest.raises(ValueError, match="y"):
        Adapter({"y": (a, b.T)})


def test_adapter_to_rounds_and_copies():
    one = Adapter({"y": (torch.randn(2, 5), torch.randn(3, 2))})
    low = one.to(dtype=torch.bfloat16)
    assert low.tensors["y"][0].dtype == torch.float32
    assert torch.equal(low.tensors["y"][0], one.tensors["y"][0].bfloat16().float())
    copy = one.to()
    copy.tensors["y"][0].zero_()
    assert one.tensors["y"][0].abs().min() > 0
