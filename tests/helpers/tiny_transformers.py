"""Tiny transformers of the real diffusers classes with random inputs, for tests that need no pipeline.

Heads have 64 columns, which the CUDA kernels take; everything else is as small as it goes. `FAMILIES[name]()` is
`(transformer, call)`: fp32, in eval mode, and the keyword arguments of one forward, two rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

HEADS, DIM = 2, 64
WIDTH = HEADS * DIM
TEXT, IMAGE, ROWS = 5, 16, 2
Model = tuple[torch.nn.Module, dict[str, Any]]


def _loud(transformer: torch.nn.Module) -> torch.nn.Module:
    """Random norm weights and larger matrices, so that every part is heard."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif weight.ndim > 1:
                weight.mul_(1.5)
    return transformer.eval()


def _ids(count: int, axes: int, side: int = 4) -> torch.Tensor:
    ids = torch.zeros(count, axes)
    ids[:, 1], ids[:, 2] = torch.arange(count) // side, torch.arange(count) % side
    return ids


def flux2() -> Model:
    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    call = {
        "hidden_states": torch.randn(ROWS, IMAGE, 8),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 24),
        "timestep": torch.tensor([0.7, 0.2]),
        "img_ids": _ids(IMAGE, 4),
        "txt_ids": _ids(TEXT, 4),
    }
    return _loud(model), call


def flux1() -> Model:
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    call = {
        "hidden_states": torch.randn(ROWS, IMAGE, 8),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 24),
        "pooled_projections": torch.randn(ROWS, 16),
        "timestep": torch.tensor([0.7, 0.2]),
        "img_ids": _ids(IMAGE, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return _loud(model), call


def sd3(qk_norm: str | None = "rms_norm") -> Model:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm=qk_norm,
    )
    call = {
        "hidden_states": torch.randn(ROWS, 4, 8, 8),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 24),
        "pooled_projections": torch.randn(ROWS, 16),
        "timestep": torch.tensor([700.0, 200.0]),
    }
    return _loud(model), call


def qwen(masked: bool = True) -> Model:
    model = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        axes_dims_rope=(16, 24, 24),
    )
    mask = torch.ones(ROWS, TEXT, dtype=torch.bool)
    mask[1, 3:] = not masked
    call = {
        "hidden_states": torch.randn(ROWS, IMAGE, 8),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.7, 0.2]),
        "img_shapes": [[(1, 4, 4)]] * ROWS,
    }
    return _loud(model), call


def zimage() -> Model:
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=24,
        axes_dims=[16, 24, 24],
        axes_lens=[128, 32, 32],
    )
    call = {
        "x": [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 16)],  # rows of different lengths: a mask and pads
        "t": torch.tensor([0.3, 0.8]),
        "cap_feats": [torch.randn(5, 24), torch.randn(40, 24)],
    }
    return _loud(model), call


FAMILIES: dict[str, Callable[[], Model]] = {
    "flux2": flux2,
    "flux1": flux1,
    "sd3": sd3,
    "sd3-plain": lambda: sd3(None),
    "qwen": qwen,
    "qwen-full": lambda: qwen(False),
    "z-image": zimage,
}


def build(name: str, seed: int = 0) -> Model:
    """One family's transformer and call, from a seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[name]()


def forward(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """The first output, a list stacked flat."""
    out = model(**call, return_dict=False)[0]
    return torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out
