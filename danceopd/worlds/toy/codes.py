"""`CellTable`: scenes to latent tokens and back by a table, since the small autoencoder's code depends on cells alone.

``encode`` looks up a scene's sixteen tokens; ``read`` finds the scene whose tokens are closest, which scores
samples during training without decoding them. Both use the normalised latents that the transformer gets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from danceopd.worlds.scenes.grammar import BACKGROUNDS, SIZES, STYLES, Scene, Thing, cell_centres
from danceopd.worlds.toy.autoencoder import LOOKS, all_cells, cell_codes

_STYLE = {name: i for i, name in enumerate(STYLES)}
_GROUND = {name: i for i, name in enumerate(BACKGROUNDS)}
_LOOK = {look: i for i, look in enumerate(LOOKS)}
_CELL = {centre: i for i, centre in enumerate(cell_centres())}


class CellTable:
    """The normalised token of every (style, background, look, cell): ``table`` of shape (S, B, L, 16, C)."""

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        scale = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        self.table = ((cell_codes(vae, all_cells()) - vae.bn.running_mean) / scale).contiguous()

    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Tokens (n, 16, C) of scenes of the ``cells`` tier."""
        style = torch.tensor([_STYLE[s.style] for s in scenes])
        ground = torch.tensor([_GROUND[s.background] for s in scenes])
        look = torch.zeros(len(scenes), 16, dtype=torch.long)
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                look[row, _CELL[thing.x, thing.y]] = _LOOK[thing.shape, thing.colour]
        return self.table[style[:, None], ground[:, None], look, torch.arange(16)]

    def read(self, tokens: Tensor) -> list[Scene]:
        """The nearest scene for each row of tokens (n, 16, C)."""
        styles, grounds, looks, cells, width = self.table.shape
        flat = self.table.permute(3, 0, 1, 2, 4).reshape(cells, -1, width)
        distance = torch.cdist(tokens.transpose(0, 1), flat)
        # A broken cell must not change style and background: its distance counts up to a bound.
        distance = distance.clamp_max(12.0).reshape(cells, len(tokens), styles * grounds, looks)
        nearest, which = distance.square().min(-1)
        setting = nearest.sum(0).argmin(-1)
        scenes = []
        for row, chosen in enumerate(setting.tolist()):
            picks = which[:, row, chosen].tolist()
            things = [
                Thing(look[0], look[1], x, y, SIZES["cells"][0])
                for (x, y), pick in zip(cell_centres(), picks, strict=True)
                if (look := LOOKS[pick]) is not None
            ]
            scenes.append(Scene(tuple(things), BACKGROUNDS[chosen % grounds], STYLES[chosen // grounds]))
        return scenes
