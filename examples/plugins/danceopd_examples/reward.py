"""A reward of objective nft: the contrast of a sample's latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danceopd.labelfree.rewards import Group


def contrast(groups: Sequence[Group], power: float = 1.0) -> Tensor:
    """(questions, samples): the standard deviation of each sample's clean latents, to a power; higher is better."""
    return torch.stack([group.clean.flatten(1).std(1) ** power for group in groups])
