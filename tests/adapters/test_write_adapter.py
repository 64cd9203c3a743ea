"""`write_adapter`: what stock diffusers makes of the file, its metadata, and what it refuses."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from lora_files import klein_adapter, klein_transformer, merged, probe, saved_base, stock
from safetensors import safe_open
from tiny import random_adapter

from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.load import load_student
from danceopd.adapters.read import adapter_shapes, read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

base = pytest.fixture(scope="module")(saved_base)
transformer = pytest.fixture(scope="module")(klein_transformer)
adapter = pytest.fixture(scope="module")(klein_adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_the_stock_pipeline(base, transformer, adapter, tmp_path, dtype):
    write_adapter(adapter, tmp_path, dtype)
    ours = merged(transformer, adapter.to(dtype=dtype))
    assert (stock(base, tmp_path) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - probe(transformer)).abs().max() > 0.01 * ours.abs().max()
    back = read_adapter(tmp_path, transformer)
    assert back.sha256 == adapter.to(dtype=dtype).sha256


def test_ranks_may_differ_between_modules(base, transformer, tmp_path):
    pairs = random_adapter(transformer, rank=4).tensors
    mixed = Adapter({name: (a[: 1 + i % 4], b[:, : 1 + i % 4]) for i, (name, (a, b)) in enumerate(pairs.items())})
    write_adapter(mixed, tmp_path / "one")
    write_adapter(mixed, tmp_path / "own", one_rank=False)
    for folder, ranks in (("one", {4}), ("own", {1, 2, 3, 4})):
        assert set(inspect_adapter(tmp_path / folder).ranks.values()) == ranks
        assert read_adapter(tmp_path / folder, transformer).sha256 == mixed.sha256
        assert adapter_shapes(tmp_path / folder, transformer).ranks == mixed.ranks
        torch.testing.assert_close(stock(base, tmp_path / folder), merged(transformer, mixed), rtol=1e-5, atol=1e-5)
        load_student(tmp_path / folder, base)  # compares every layer


def test_same_adapter_same_bytes(adapter, tmp_path):
    notes = {f"key{i}": "x" for i in range(8)}
    files = [write_adapter(adapter, tmp_path / str(i), metadata=notes).read_bytes() for i in range(4)]
    assert len(set(files)) == 1


def test_keys_metadata_and_header_without_weights(adapter, tmp_path):
    file = write_adapter(adapter, tmp_path, torch.bfloat16, {"base": "abc"})
    assert file == tmp_path / WEIGHTS and os.listdir(tmp_path) == [WEIGHTS]
    header = inspect_adapter(tmp_path)
    assert (header.dialect, header.rank, header.dtypes, len(header.ranks)) == (
        "diffusers",
        4,
        ("BF16",),
        len(adapter),
    )
    assert header.record == {
        "base": "abc",
        "modules": len(adapter),
        "sha256": adapter.to(dtype=torch.bfloat16).sha256,
    }
    assert header.shapes["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == (4, 32)
    with safe_open(str(file), "pt") as opened:
        assert set(header.shapes) == set(opened.keys())


def test_writing_refuses_nonsense(adapter, tmp_path):
    with pytest.raises(ValueError, match="strings"):
        write_adapter(adapter, tmp_path, metadata={"steps": 3})
    with pytest.raises(ValueError, match="without layers"):
        write_adapter(Adapter({}), tmp_path)
    for number in (torch.nan, torch.inf):  # also where it is not first
        odd = {"x": (torch.ones(1, 2), torch.ones(2, 1)), "y": (torch.ones(1, 2), torch.full((2, 1), number))}
        with pytest.raises(ValueError, match="NaN or infinite"):
            write_adapter(Adapter(odd), tmp_path)
    with pytest.raises(UserError, match="up to 1e.30 and float16 ends at 6.55e.04; write it as bf16 or fp32"):
        write_adapter(Adapter({"x": (torch.full((1, 2), 1e30), torch.ones(2, 1))}), tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_whole(adapter, tmp_path):
    """The kernel itself cuts the write short: files may not pass 8 KiB."""
    file = write_adapter(Adapter({"x": (torch.ones(1, 2), torch.ones(2, 1))}), tmp_path)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{WEIGHTS}.*too large"):
            write_adapter(adapter, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [WEIGHTS]


def test_a_folder_that_is_a_file_is_a_sentence(adapter, tmp_path):
    (tmp_path / "student").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        write_adapter(adapter, tmp_path / "student")
    assert (tmp_path / "student").read_text() == "mine"
