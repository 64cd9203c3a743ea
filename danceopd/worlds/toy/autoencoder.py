"""`fit_encoder`: the small model's ``AutoencoderKLFlux2``: its encoder is computed here, its decoder trained elsewhere.

The encoder is a linear code of each 8x8 block (the leading principal components of all cells of the scenes, to
unit variance), written into the stock weights: taps outside a block are zero, residual branches are zero, and
two large constant channels a group turn group normalisation into a fixed scale. So the latents of a scene depend on
each cell alone: they can be looked up cell by cell (``codes.py``), and training needs no encoder. The decoder is an
ordinary one, trained to invert the code from noisy latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

from danceopd.worlds.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    IMAGE,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    cell_centres,
)
from danceopd.worlds.scenes.render import render
from danceopd.worlds.toy.small import LATENT_CHANNELS

BLOCK = 8
"""Side in pixels of what one latent position sees."""
LARGE = 512.0
"""The constant that fixes the group normalisation's scale."""
OFFSET = 12.0
"""Lifts the code into the part of SiLU that is the identity."""


def make_autoencoder(seed: int = 0) -> AutoencoderKLFlux2:
    """The stock class, small: 16 latent channels at an eighth of the side, 2x2 patches of them a token."""
    torch.manual_seed(seed)
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 48, 64),
        decoder_block_out_channels=(8, 24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def uniform_scene(background: str, style: str, look: tuple[str, str] | None) -> Scene:
    """A scene with the same thing (or nothing) in all 16 cells."""
    things = () if look is None else tuple(Thing(*look, x, y, SIZES["cells"][0]) for x, y in cell_centres())
    return Scene(things, background, style)


LOOKS: tuple[tuple[str, str] | None, ...] = (None, *((s, c) for s in SHAPES for c in COLOURS))


def all_cells() -> Tensor:
    """Every look on every ground in every style: (styles, backgrounds, looks, 3, 64, 64) in [-1, 1]."""
    images = np.stack(
        [render(uniform_scene(b, s, look)) for s in STYLES for b in BACKGROUNDS for look in LOOKS]
    )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.reshape(len(STYLES), len(BACKGROUNDS), len(LOOKS), 3, IMAGE, IMAGE)


def _pixel_unshuffle(images: Tensor, side: int) -> Tensor:
    """(n, c, h, w) to (n, h/side * w/side, c * side * side), pixels of a block in channel-row-column order."""
    return nn.functional.unfold(images, side, stride=side).transpose(1, 2)


def _principal(rows: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean (d,), leading components (count, d), and their standard deviations (count,)."""
    weights = weights / weights.sum()
    mean = (rows * weights[:, None]).sum(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh((centred * weights[:, None]).T @ centred)
    order = values.argsort(descending=True)[:count]
    return mean, vectors[:, order].T, values[order].clamp_min(1e-12).sqrt()


def _weighted_rows(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Blocks of all cells (float64), and weights with which empty ground counts as much as all things together."""
    flat = images.reshape(-1, *images.shape[-3:])
    blocks = _pixel_unshuffle(flat, side).double()
    empty = torch.zeros(images.shape[:3], dtype=torch.float64)
    empty[:, :, 0] = 1
    weight = 1 + (len(LOOKS) - 2) * empty.reshape(-1)
    return blocks.reshape(-1, blocks.shape[-1]), weight.repeat_interleave(blocks.shape[1])


@torch.no_grad()
def fit_encoder(vae: AutoencoderKLFlux2) -> None:
    """Write the linear code into the encoder of ``vae`` and the statistics of the latents into ``vae.bn``."""
    images = all_cells()
    encoder = vae.encoder
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    _, half, _ = _principal(*_weighted_rows(images, BLOCK // 2), 32)
    mean, code, spread = _principal(*_weighted_rows(images, BLOCK), LATENT_CHANNELS)
    code = code / spread[:, None]

    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    # A stride-2 convolution here pads below and to the right, so its taps 0 and 1 cover exactly one 2x2 block.
    first = encoder.down_blocks[0].downsamplers[0].conv.weight
    for channel in range(3):
        for i in range(2):
            for j in range(2):
                first[channel * 4 + i * 2 + j, channel, i, j] = 1
    _pass_through(encoder.down_blocks[1].resnets[0], 12)
    second = encoder.down_blocks[1].downsamplers[0].conv.weight
    for out in range(32):
        for channel, y, x in np.ndindex(3, 4, 4):
            packed = channel * 4 + (y % 2) * 2 + x % 2
            second[out, packed, y // 2, x // 2] = half[out, channel * 16 + y * 4 + x]
    _pass_through(encoder.down_blocks[2].resnets[0], 32)
    third: Any = encoder.down_blocks[2].downsamplers[0].conv
    blocks = code.reshape(LATENT_CHANNELS, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5)
    third.weight[:LATENT_CHANNELS, :32, :2, :2] = (
        (blocks.reshape(LATENT_CHANNELS, 2, 2, 48) @ half.T).permute(0, 3, 1, 2).float()
    )
    third.bias[:LATENT_CHANNELS] = -(code @ mean).float()
    _spread_out(encoder.down_blocks[3].resnets[0].conv_shortcut)
    groups = vae.config.norm_num_groups
    width = encoder.conv_norm_out.num_channels // groups
    # Of eight channels a group four hold the constant: the variance is LARGE^2 / 2, up to the code's square.
    encoder.conv_norm_out.weight.fill_(LARGE / 2**0.5)
    encoder.conv_norm_out.bias.fill_(OFFSET)
    for latent in range(LATENT_CHANNELS):
        group, slot = divmod(latent, LATENT_CHANNELS // groups)
        encoder.conv_out.weight[latent, group * width + 2 * slot, 1, 1] = 1
    last: Any = encoder.conv_out
    last.bias[:LATENT_CHANNELS] = -OFFSET
    last.bias[LATENT_CHANNELS:] = -30.0
    _set_statistics(vae, images)


def _pass_through(resnet: nn.Module, channels: int) -> None:
    """Let the shortcut of a residual block carry its first channels; the branch itself is zero."""
    shortcut = getattr(resnet, "conv_shortcut", None)
    if shortcut is not None:
        shortcut.weight[:channels, :channels, 0, 0] = torch.eye(channels)


def _spread_out(shortcut: nn.Conv2d) -> None:
    """Give each group two latents, their negatives, and the constants: mean zero, fixed variance."""
    for latent in range(LATENT_CHANNELS):
        group, slot = divmod(latent, 2)
        shortcut.weight[group * 8 + 2 * slot, latent, 0, 0] = 1
        shortcut.weight[group * 8 + 2 * slot + 1, latent, 0, 0] = -1
    assert shortcut.bias is not None
    for group in range(8):
        shortcut.bias[group * 8 + 4 : group * 8 + 8] = torch.tensor([LARGE, -LARGE, LARGE, -LARGE])


def _set_statistics(vae: AutoencoderKLFlux2, images: Tensor) -> None:
    """Mean and variance of the packed latents into ``vae.bn``: empty ground weighs 13 cells in 16."""
    codes = cell_codes(vae, images).reshape(len(STYLES) * len(BACKGROUNDS), len(LOOKS), -1, 4 * LATENT_CHANNELS)
    weight = torch.full((len(LOOKS),), 3 / 16 / (len(LOOKS) - 1))
    weight[0] = 13 / 16
    # Things are rare; the square root keeps them from being scaled far beyond the ground.
    mean = (codes.mean((0, 2)) * weight[:, None]).sum(0)
    variance = ((codes - mean).square().mean((0, 2)) * weight[:, None]).sum(0)
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)


@torch.no_grad()
def cell_codes(vae: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """Raw packed latents of pictures: (..., 3, 64, 64) to (..., 16 cells, 4 * latent channels)."""
    flat = images.reshape(-1, *images.shape[-3:])
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in flat.split(64)])
    n, c, h, w = latents.shape
    packed = latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
    return packed.reshape(*images.shape[:-3], *packed.shape[1:])
