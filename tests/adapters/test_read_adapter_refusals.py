"""`read_adapter`: every refusal in one sentence, for the path, the file and its tensors."""

from __future__ import annotations

import json
import logging
import re
import struct

import pytest
import torch
from lora_files import changed, flat, klein_adapter, klein_transformer, original_names, refused, saved_base
from safetensors.torch import load_file, save_file

from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.models.lora import Adapter

base = pytest.fixture(scope="module")(saved_base)
transformer = pytest.fixture(scope="module")(klein_transformer)
adapter = pytest.fixture(scope="module")(klein_adapter)

# Refusals: the path


def test_refuses_paths(tmp_path, base):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "holds no safetensors file", WEIGHTS)
    refused(base, "whole pipeline")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04evil")
    refused(tmp_path, "pytorch_lora_weights.bin", "unpickled")
    refused(tmp_path / "pytorch_lora_weights.bin", "pickle")
    torch.save({"x": torch.ones(1)}, tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", "pickle")
    (tmp_path / "b.safetensors").write_bytes(b"")
    refused(tmp_path, "2 safetensors files", "b.safetensors")


def test_refuses_damaged_files(adapter, tmp_path):
    whole = write_adapter(adapter, tmp_path).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    file = tmp_path / "bad.safetensors"

    def is_refused(content: bytes, *says: str) -> None:
        file.write_bytes(content)
        refused(file, *says)

    is_refused(b"", "empty")
    is_refused(whole[:5], "not a safetensors file")
    is_refused(whole[: 8 + length // 2], "cut off inside its header")
    is_refused(whole[:-7], "cut off", "promises")
    is_refused(whole + b"more", "damaged")
    is_refused(b"<!DOCTYPE html><html>not found</html>", "not a safetensors file")
    is_refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer")
    is_refused(struct.pack("<Q", 9) + b'{"a": 12}', "header cannot be read")
    is_refused(struct.pack("<Q", 4) + b"[1]\n", "header cannot be read")
    is_refused(struct.pack("<Q", 2) + b"{}", "no tensors")
    middle = json.loads(whole[8 : 8 + length])
    first = min((v for k, v in middle.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][0])
    first["shape"][0] += 1
    text = json.dumps(middle).encode()
    is_refused(struct.pack("<Q", len(text)) + text + whole[8 + length :], "cannot be read")


def test_a_header_that_begins_like_a_pickle_is_read(adapter, tmp_path):
    """640 bytes of header make the file begin with 0x80 0x02, as a pickle does."""
    save_file({f"x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for size in (640, 1152):
        header = whole[8 : 8 + length].ljust(size)
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", size) + header + whole[8 + length :])
        assert len(read_adapter(tmp_path / "x.safetensors")) == 1


def test_a_lora_beside_a_pipeline_is_found(adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert read_adapter(tmp_path).sha256 == adapter.sha256


# Refusals: what is in the file


Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), ("incomplete: 1 of", "B without A", "blocks.0.attn.to_q")),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ("incomplete: 1 of", "A without B", "blocks.0.attn.to_q")),
        (lambda t: t.update({f"{Q}.alpha": torch.tensor(0.0)}), ("to_q cannot be scaled", "alpha is 0")),
        (lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), ("to_q.alpha", "not one number")),
        (
            lambda t: t.update({"transformer.gone.alpha": torch.tensor(1.0)}),
            ("alpha but no matrices", "gone"),
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 32)}), (r"\(3, 32\)", "to_q", "rank")),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}),
            ("another size", "31 to 32", "32 to 32"),
        ),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), ("NaN or infinite", "blocks.0.attn.to_q")),
        (lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.inf), ("NaN or infinite", "blocks.0.attn.to_q")),
        (
            lambda t: t.update({"transformer.norm.weight": torch.ones(2)}),
            ("1 tensors that belong", "norm.weight"),
        ),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), ("1 tensors that belong", "lora_B.bias")),
        (
            lambda t: t.update({f"text_encoder.x.lora_{h}.weight": torch.ones(1, 1) for h in "AB"}),
            ("text encoder", "text_encoder.x.lora_A"),
        ),
        (
            lambda t: t.update({"lora_te1_text_model_x.lora_down.weight": torch.ones(1, 1)}),
            ("text encoder", "lora_te1"),
        ),
        (lambda t: t.update({f"{Q}.dora_scale": torch.ones(32)}), ("DoRA", "to_q.dora_scale")),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), ("DoRA",)),
        (lambda t: t.update({f"{Q}.lokr_w1": torch.ones(2, 2)}), ("to_q cannot be read", "two kinds")),
        (
            lambda t: t.update(
                {
                    f"transformer.transformer_blocks.9.attn.to_q.lora_{h}.weight": t[f"{Q}.lora_{h}.weight"].clone()
                    for h in "AB"
                }
            ),
            ("1 layers of its", "does not have", r"blocks\.9\.attn\.to_q", "Flux2Transformer2DModel"),
        ),
        (
            lambda t: t.update(
                {
                    f"diffusion_model.transformer_blocks.0.attn.to_q.lora_{h}.weight": t[f"{Q}.lora_{h}.weight"].clone()
                    for h in "AB"
                }
            ),
            ("twice", r"blocks\.0\.attn\.to_q"),
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.other.weight": t[f"{Q}.lora_A.weight"].clone()}),
            ("twice", "to_q"),
        ),
    ],
)
def test_refuses_a_changed_tensor(transformer, adapter, tmp_path, change, says):
    file = changed(adapter, tmp_path, lambda tensors: None)
    assert read_adapter(file, transformer).sha256 == adapter.sha256
    refused(changed(adapter, tmp_path, change), *says, transformer=transformer)


def test_names_three_and_counts_the_rest(transformer, adapter, tmp_path):
    file = changed(
        adapter,
        tmp_path,
        lambda t: [t.pop(k) for k in list(t) if k.endswith("to_q.lora_A.weight") or k.endswith("to_k.lora_A.weight")],
    )
    sentence = refused(file, "and 1 more", transformer=transformer)
    assert len(re.findall(r"\.to_[qk]\b", sentence)) == 3


def test_refuses_another_architecture(transformer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pair = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"transformer.layers.0.attention.to_q.{h}.weight": t for h, t in pair.items()},
        tmp_path / "z.safetensors",
    )
    refused(tmp_path / "z.safetensors", "another architecture", "none of its 1", transformer=transformer)
    assert not caplog.records  # diffusers would warn of every key it does not know
    save_file({f"transformer_blocks.0.to_q.{h}.weight": t for h, t in pair.items()}, tmp_path / "p.safetensors")
    refused(tmp_path / "p.safetensors", "another architecture", transformer=transformer)
    save_file({f"lora_unet_down_blocks_0_{h}.weight": t for h, t in pair.items()}, tmp_path / "sd.safetensors")
    refused(tmp_path / "sd.safetensors", "not a LoRA")
    save_file({"conv.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a LoRA", "conv.weight")


def test_refuses_a_wider_base(transformer, adapter, tmp_path):
    wide = Adapter({n: (torch.cat([a, a], 1), torch.cat([b, b])) for n, (a, b) in adapter.tensors.items()})
    write_adapter(wide, tmp_path)
    refused(
        tmp_path,
        "another size of Flux2Transformer2DModel",
        f"{len(adapter)} of {len(adapter)} layers differ",
        transformer=transformer,
    )


def test_a_converter_that_drops_a_layer_is_seen(transformer, tmp_path):
    """diffusers only warns about kohya keys it does not know; here they are refused."""
    tensors = {}
    for name, (a, b) in original_names(transformer).items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    extra = {f"lora_unet_double_blocks_0_img_mod_lin.lora_{h}.weight": torch.ones(2, 2) for h in ("down", "up")}
    save_file(tensors | extra, tmp_path / "k.safetensors")
    refused(tmp_path / "k.safetensors", "1 layers of its 9", "img_mod_lin", transformer=transformer)


def test_foreign_names_need_to_know_the_model(transformer, tmp_path):
    pairs = original_names(transformer)
    save_file(
        {f"diffusion_model.{n}.lora_{h}.weight": t for n, p in pairs.items() for h, t in zip("AB", p)},
        tmp_path / "x.safetensors",
    )
    refused(tmp_path / "x.safetensors", "comfyui", "name its base or its family")
    refused(tmp_path / "x.safetensors", "name its base or its family", family="no-such-family")


def test_refuses_a_configuration_that_contradicts(transformer, adapter, tmp_path):
    def save(**config):
        save_file(flat(adapter), tmp_path / "c.safetensors", {"lora_adapter_metadata": json.dumps(config)})

    save(**{"transformer.r": 8, "transformer.lora_alpha": 8})
    refused(tmp_path / "c.safetensors", "configuration says rank 8 and its tensors say 4", transformer=transformer)
    save(**{"transformer.r": 4, "transformer.lora_alpha": -1})
    refused(tmp_path / "c.safetensors", "alpha is -1", transformer=transformer)
    save(**{"transformer.r": 4, "transformer.use_dora": True})
    refused(tmp_path / "c.safetensors", "DoRA", transformer=transformer)


def test_our_own_files_know_how_many_layers_they_hold(transformer, adapter, tmp_path):
    file = write_adapter(adapter, tmp_path)
    metadata = inspect_adapter(file).metadata
    tensors = load_file(file)
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{Q}.")}
    save_file(fewer, file, metadata)
    refused(file, f"written with {len(adapter)} layers and holds {len(adapter) - 1}", transformer=transformer)
    refused(file, f"written with {len(adapter)} layers")
    more = tensors | {
        f"transformer.proj_out.lora_{h}.weight": torch.ones(s) for h, s in (("A", (1, 32)), ("B", (32, 1)))
    }
    save_file(more, file, metadata)
    refused(file, f"holds {len(adapter) + 1}", transformer=transformer)
    tensors[f"{Q}.lora_A.weight"][0, 0] += 1
    save_file(tensors, file, metadata)
    refused(file, "no longer holds the numbers", transformer=transformer)
