"""`read_adapter`: every dialect compared with the stock loader."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from lora_files import flat, klein_adapter, klein_transformer, merged, original_names, probe, saved_base, stock
from safetensors.torch import save_file

from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter

base = pytest.fixture(scope="module")(saved_base)
transformer = pytest.fixture(scope="module")(klein_transformer)
adapter = pytest.fixture(scope="module")(klein_adapter)

# Dialects


@pytest.mark.parametrize(
    "form, halves",
    [
        ("transformer.{}", ("lora_A", "lora_B")),
        ("base_model.model.{}", ("lora_A", "lora_B")),
        ("base_model.model.{}", ("lora_A.default", "lora_B.default")),
        ("diffusion_model.{}", ("lora_A", "lora_B")),
        ("{}", ("lora_A", "lora_B")),
        ("flat", ("lora_down", "lora_up")),
    ],
)
def test_module_paths_under_any_prefix(transformer, adapter, tmp_path, form, halves):
    tensors = flat(adapter, "transformer.{}" if form == "flat" else form, halves)
    if form == "flat":
        tensors = {
            re.sub(
                r"^transformer\.(.*)\.(lora_\w+\.weight)$",
                lambda m: f"lora_unet_{m[1].replace('.', '_')}.{m[2]}",
                key,
            ): tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_adapter(tmp_path, transformer).sha256 == adapter.sha256


@pytest.mark.parametrize("dialect, alpha", [("comfyui", None), ("kohya", None), ("kohya", 2.0)])
def test_original_names_equal_the_stock_loader(base, transformer, tmp_path, dialect, alpha):
    tensors = {}
    for name, (a, b) in original_names(transformer).items():
        stem = f"diffusion_model.{name}" if dialect == "comfyui" else "lora_unet_" + name.replace(".", "_")
        down, up = ("lora_A", "lora_B") if dialect == "comfyui" else ("lora_down", "lora_up")
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "other.safetensors")
    ours = read_adapter(tmp_path / "other.safetensors", transformer)
    assert inspect_adapter(tmp_path).dialect == dialect
    assert len(ours) == 12  # two fused qkv become six
    torch.testing.assert_close(stock(base, tmp_path), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert (merged(transformer, ours) - probe(transformer)).abs().max() > 1e-2
    assert read_adapter(tmp_path, family="flux2-klein").sha256 == ours.sha256


def test_comfyui_alpha_is_folded(transformer, tmp_path):
    """Stock diffusers refuses such a file."""
    pairs = original_names(transformer)
    plain = {f"diffusion_model.{n}.lora_{h}.weight": t for n, p in pairs.items() for h, t in zip("AB", p)}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(
        plain | {f"diffusion_model.{n}.alpha": torch.tensor(8.0) for n in pairs},
        tmp_path / "alpha.safetensors",
    )
    one, two = (read_adapter(tmp_path / f"{n}.safetensors", transformer) for n in ("plain", "alpha"))
    for name in one.tensors:
        torch.testing.assert_close(two.delta(name), 2 * one.delta(name))


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_metadata_scales_as_the_stock_loader_does(base, transformer, tmp_path, rslora):
    """A file as diffusers' save_lora_weights leaves it: alpha in its metadata, with a pattern."""
    from diffusers import Flux2KleinPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    copy = deepcopy(transformer)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        alpha_pattern={"to_k": 3},
        use_rslora=rslora,
        rank_pattern={"to_k": 2},
        init_lora_weights=False,
    )
    copy.add_adapter(config, "default")
    metadata = {k: list(v) if isinstance(v, set) else v for k, v in copy.peft_config["default"].to_dict().items()}
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(copy, adapter_name="default"),
        transformer_lora_adapter_metadata=metadata,
    )
    ours = read_adapter(tmp_path, transformer)
    assert set(ours.ranks.values()) == {2, 4}
    torch.testing.assert_close(probe(copy), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock(base, tmp_path), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path, copy).sha256 == ours.sha256  # through a transformer that wears adapters


def test_a_peft_folder_brings_its_alpha(transformer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        deepcopy(transformer),
        LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    ours = read_adapter(tmp_path, transformer)
    torch.testing.assert_close(probe(model.base_model.model), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert inspect_adapter(tmp_path).dialect == "peft"


def test_a_transformer_on_the_meta_device_will_do(transformer, adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    with torch.device("meta"):
        empty = type(transformer).from_config(transformer.config)
    assert read_adapter(tmp_path, empty).sha256 == adapter.sha256
