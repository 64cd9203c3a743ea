"""`train_decoder`: train the small autoencoder's decoder to invert the encoder's code.

Pictures are put together from the table of all cells, so neither encoder nor renderer runs; the latents get noise
of up to a tenth of their standard deviation, because sampled latents are never clean. Mean squared error plus a little
absolute error, faint things weighing as much as bright ones, AdamW with warm-up and cosine; the exponential average of
the weights is kept. Training resumes from its last save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from danceopd.common.signals import Interrupts
from danceopd.worlds.scenes.grammar import CELL, GRID
from danceopd.worlds.toy.autoencoder import LOOKS, all_cells
from danceopd.worlds.toy.codes import CellTable
from danceopd.worlds.toy.state import load_state, save_state

RATE = 3e-3
WARMUP = 100
AVERAGE = 0.995
SAVE_EVERY = 100
NOISE = 0.1
"""Largest standard deviation of the noise on normalised latents."""
FAINT = (1.0, 12.0)
"""Bounds of a cell's weight: white on sky has a hundredth of the contrast of black, and must be learnt as well."""


class CellPictures:
    """Random pictures, their normalised tokens and weights: ``pictures(step)`` is a function of (seed, step)."""

    def __init__(self, vae: AutoencoderKLFlux2, size: int, seed: int) -> None:
        images = all_cells()
        blocks = images.unfold(4, CELL, CELL).unfold(5, CELL, CELL)
        self.blocks = blocks.permute(0, 1, 2, 4, 5, 3, 6, 7).reshape(*images.shape[:3], GRID * GRID, 3, CELL, CELL)
        contrast = (self.blocks - self.blocks[:, :, :1]).square().mean((4, 5, 6))
        self.weights = (contrast[:, :, 1:].mean() / contrast.clamp_min(1e-6)).clamp(*FAINT)
        self.weights[:, :, 0] = 1
        self.table = CellTable(vae).table
        self.size, self.seed = size, seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (n, 16, C) with noise, pictures (n, 3, 64, 64) in [-1, 1], and weights of their pixels."""
        g = torch.Generator().manual_seed(7_919 * self.seed + step)
        n, cells = self.size, GRID * GRID
        style = torch.randint(self.table.shape[0], (n, 1), generator=g)
        ground = torch.randint(self.table.shape[1], (n, 1), generator=g)
        look = torch.randint(1, len(LOOKS), (n, cells), generator=g)
        share = torch.rand(n, 1, generator=g) * 0.6
        look = torch.where(torch.rand(n, cells, generator=g) < share, look, 0)
        where = torch.arange(cells)
        tokens = self.table[style, ground, look, where]
        spread = NOISE * torch.rand(n, 1, 1, generator=g)
        tokens = tokens + spread * torch.randn(tokens.shape, generator=g)
        tiles = self.blocks[style, ground, look, where].reshape(n, GRID, GRID, 3, CELL, CELL)
        weights = self.weights[style, ground, look, where].reshape(n, 1, GRID, GRID)
        weights = weights.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        return tokens, tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, GRID * CELL, GRID * CELL), weights


def unpack(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """Raw latents (n, c, 8, 8) of normalised tokens (n, 16, 4 c), as the stock pipeline unpacks them."""
    scale = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    raw = tokens * scale + vae.bn.running_mean
    n, _, width = raw.shape
    raw = raw.reshape(n, GRID, GRID, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return raw.reshape(n, width // 4, 2 * GRID, 2 * GRID)


def train_decoder(
    vae: AutoencoderKLFlux2,
    folder: Path,
    steps: int,
    seed: int = 0,
    batch: int = 24,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train ``vae.decoder`` for ``steps`` updates and leave the averaged weights in it; a signal ends it saved."""
    vae.encoder.requires_grad_(False)
    parameters = dict(vae.decoder.named_parameters())
    average = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    pictures = CellPictures(vae, batch, seed)
    meta = {"stage": "autoencoder", "steps": steps, "seed": seed}
    start = load_state(folder, parameters, average, [optimizer], meta)
    with Interrupts() as interrupts:
        for step in range(start, steps):
            rate = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            tokens, target, weight = pictures(step)
            error = vae.decode(unpack(vae, tokens)).sample - target
            loss = (weight * (error.square() + 0.1 * error.abs())).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(AVERAGE, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
            report(step + 1, error.detach().square().mean().item())
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps or interrupts.caught:
                save_state(folder, step + 1, parameters, average, [optimizer], meta)
            interrupts.end()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
