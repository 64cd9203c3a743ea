"""Models of true size in no space: configurations and safetensors headers are real, the weights are holes in the files.

`header_only(family, folder)` makes the pipeline folder of a model of `MODELS`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

from danceopd.pipelines.registry import FAMILIES
from danceopd.pipelines.two_transformers import SECOND

VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


class Model(NamedTuple):
    """A released model: diffusers classes, what their configurations have besides defaults, text encoders' sizes."""

    family: str
    pipeline: str
    transformer: tuple[str, dict[str, Any]]
    vae: tuple[str, dict[str, Any]]
    encoders: dict[str, tuple[str, int]]
    scheduler: dict[str, Any] = SCHEDULER
    index: dict[str, Any] = {}  # more entries of its model_index.json


MODELS = {
    "klein-4b": Model(
        "flux2-klein", "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", {
            "in_channels": 128, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000,
            "guidance_embeds": False, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
            "joint_attention_dim": 7680}),
        ("AutoencoderKLFlux2", {}), {"text_encoder": ("Qwen3ForCausalLM", 4_022_468_096)},
    ),
    "flux1-dev": Model(
        "flux1", "FluxPipeline", ("FluxTransformer2DModel", {"guidance_embeds": True}), ("AutoencoderKL", VAE),
        {"text_encoder": ("CLIPTextModel", 123_060_480), "text_encoder_2": ("T5EncoderModel", 4_762_310_656)},
    ),
    "qwen-image": Model(
        "qwen-image", "QwenImagePipeline", ("QwenImageTransformer2DModel", {}), ("AutoencoderKLQwenImage", {}),
        {"text_encoder": ("Qwen2_5_VLForConditionalGeneration", 8_292_166_656)},
    ),
    "qwen-image-2.1": Model(
        "qwen-image-2.1", "QwenImage21Pipeline", ("QwenImage21Transformer2DModel", {}),
        ("AutoencoderKLQwenImage21", {}),
        {"text_encoder": ("Qwen3VLForConditionalGeneration", 8_767_123_696)},
    ),
    "krea2": Model(
        "krea2", "Krea2Pipeline", ("Krea2Transformer2DModel", {}), ("AutoencoderKLQwenImage", {}),
        {"text_encoder": ("Qwen3VLModel", 4_437_815_808)},
    ),
    "z-image": Model(
        "z-image", "ZImagePipeline", ("ZImageTransformer2DModel", {}), ("AutoencoderKL", VAE),
        {"text_encoder": ("Qwen3Model", 4_022_468_096)},
    ),
    "longcat-image": Model(
        "longcat-image", "LongCatImagePipeline",
        ("LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20}), ("AutoencoderKL", VAE),
        {"text_encoder": ("Qwen2_5_VLForConditionalGeneration", 8_292_166_656)},
    ),
    "bria-fibo": Model(
        "bria-fibo", "BriaFiboPipeline",
        ("BriaFiboTransformer2DModel", {"in_channels": 48, "num_layers": 8, "num_single_layers": 38}),
        ("AutoencoderKLWan", {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
            "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": (0.0,) * 48,
            "latents_std": (1.0,) * 48}),
        {"text_encoder": ("SmolLM3ForCausalLM", 3_075_098_624)},
    ),
    "hidream-i1": Model(
        "hidream", "HiDreamImagePipeline",
        ("HiDreamImageTransformer2DModel", {
            "patch_size": 2, "in_channels": 16, "caption_channels": (4096, 4096), "axes_dims_rope": (64, 32, 32),
            "llama_layers": (*range(32), *[31] * 16)}),
        ("AutoencoderKL", VAE),
        {"text_encoder": ("CLIPTextModelWithProjection", 123_650_304),
         "text_encoder_2": ("CLIPTextModelWithProjection", 694_659_840),
         "text_encoder_3": ("T5EncoderModel", 4_762_310_656), "text_encoder_4": ("LlamaForCausalLM", 8_030_261_248)},
    ),
    "wan2.2-ti2v-5b": Model(
        "wan", "WanPipeline",
        ("WanTransformer3DModel", {
            "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30}),
        ("AutoencoderKLWan", {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
            "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": (0.0,) * 48,
            "latents_std": (1.0,) * 48}),
        {"text_encoder": ("UMT5EncoderModel", 5_680_910_336)},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
         "flow_shift": 5.0},
        {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": True},
    ),
    "wan2.2-t2v-a14b": Model(
        "wan", "WanPipeline", ("WanTransformer3DModel", {}), ("AutoencoderKLWan", {}),
        {"text_encoder": ("UMT5EncoderModel", 5_680_910_336)},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
         "flow_shift": 3.0},
        {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
    ),
    "sd3.5-medium": Model(
        "sd3", "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "out_channels": 16, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm"}),
        ("AutoencoderKL", VAE),
        {"text_encoder": ("CLIPTextModelWithProjection", 123_650_304),
         "text_encoder_2": ("CLIPTextModelWithProjection", 694_659_840),
         "text_encoder_3": ("T5EncoderModel", 4_762_310_656)},
    ),
}  # fmt: skip


FEW_BLOCKS = {
    "klein-4b": {"num_layers": 1, "num_single_layers": 4}, "flux1-dev": {"num_layers": 1, "num_single_layers": 2},
    "qwen-image-2.1": {"num_layers": 2}, "krea2": {"num_layers": 2},
    "qwen-image": {"num_layers": 2}, "z-image": {"n_layers": 8, "n_refiner_layers": 1},
    "longcat-image": {"num_layers": 1, "num_single_layers": 2}, "bria-fibo": {"num_layers": 1, "num_single_layers": 5},
    "wan2.2-ti2v-5b": {"num_layers": 2}, "sd3.5-medium": {"num_layers": 4, "dual_attention_layers": (0, 1)},
}  # fmt: skip
"""Configurations with few blocks, in about the proportion of the whole model."""


def small_transformer(name: str) -> nn.Module:
    """The model's transformer of true width with few blocks, on the meta device, in bf16."""
    kind, config = MODELS[name].transformer
    with torch.device("meta"):
        return getattr(diffusers, kind)(**{**config, **FEW_BLOCKS[name]}).to(torch.bfloat16)


@cache
def transformer(name: str) -> nn.Module:
    """The model's transformer on the meta device, in bf16."""
    kind, config = MODELS[name].transformer
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config).to(torch.bfloat16)


def header_only(name: str, folder: Path, dtype: str = "BF16", **index: Any) -> Path:
    """The pipeline folder of a model of `MODELS` below `folder`; `index` are more entries of its model_index.json."""
    model, place = MODELS[name], folder / name
    parts = {
        "scheduler": ["diffusers", model.scheduler["_class_name"]],
        "transformer": ["diffusers", model.transformer[0]], "vae": ["diffusers", model.vae[0]],
        **{part: ["transformers", kind] for part, (kind, _) in model.encoders.items()},
    }  # fmt: skip
    named = {"_class_name": model.pipeline, "_diffusers_version": "0.36.0"}
    _json(place / "model_index.json", {**named, **parts, **model.index, **index})
    _json(place / "scheduler" / "scheduler_config.json", model.scheduler)
    with torch.device("meta"):
        vae = getattr(diffusers, model.vae[0])(**model.vae[1])
    both = {SECOND: transformer(name)} if model.index.get("boundary_ratio") else {}
    for part, module in {"transformer": transformer(name), **both, "vae": vae}.items():
        kept = {key: value for key, value in module.config.items() if not key.startswith("_")}
        _json(place / part / "config.json", {"_class_name": type(module).__name__, **kept})
        shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        sparse(place / part / "diffusion_pytorch_model.safetensors", shapes, dtype)
    for part, (_, numbers) in model.encoders.items():
        sparse(place / part / "model.safetensors", {"weight": (numbers // 1024, 1024)}, dtype)
    return place


def header_only_lora(name: str, file: Path, rank: int = 32) -> Path:
    """A LoRA of this rank on every target of the model's family."""
    shapes = {}
    for path, module in transformer(name).named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(FAMILIES[MODELS[name].family].lora_targets, path):
            for stem in ("transformer", *([SECOND] if MODELS[name].index.get("boundary_ratio") else [])):
                shapes[f"{stem}.{path}.lora_A.weight"] = (rank, module.in_features)
                shapes[f"{stem}.{path}.lora_B.weight"] = (module.out_features, rank)
    return sparse(file, shapes)


def sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A safetensors file of these tensors whose numbers take no space on the disk."""
    width, header, end = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}[dtype], {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


def _json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
