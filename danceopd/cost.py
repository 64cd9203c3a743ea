"""What one forward of a transformer costs, from its shapes alone: FLOPs, and activations kept for a backward.

Every Linear is counted at the tokens that flow through it: those of the picture and its source, those of the text,
all of them, or one vector a picture (modulation, time). Which, is read from the names that diffusers' families share.
Attention is counted at the tokens that attend. Norms, rotations and activations are left out: a few per cent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

ONE = re.compile(r"(^|\.)(\w*modulation\w*|\w+_mod|norm\w*\.linear|norm_out|time_\w+|t_embedder)(\.|$)")
TEXT = re.compile(
    r"(^|\.)(add_[qkv]_proj|to_add_out|ff_context|context_embedder|context_refiner|cap_embedder|txt_\w+)(\.|$)"
)
JOINT = re.compile(r"^(single_transformer_blocks|layers)\.")
PICTURE = re.compile(r"(^|\.)(noise_refiner|attn2)(\.|$)")
HALF = 1.5
"""Kept bytes over the plain count in half precision: norms keep fp32, and adapters read their inputs in it."""


@dataclass(frozen=True)
class Tokens:
    """Of one row: the picture, its source image, and the text."""

    picture: int
    source: int
    text: int

    @property
    def all(self) -> int:
        return self.picture + self.source + self.text

    def through(self, path: str) -> int:
        """How many flow through the Linear at a module path."""
        if ONE.search(path):
            return 1
        if JOINT.match(path):
            return self.all
        return self.text if TEXT.search(path) else self.picture + self.source

    def attending(self, path: str) -> int:
        """How many attend in the attention at a module path."""
        if PICTURE.search(path):
            return self.picture + self.source
        return self.text if TEXT.search(path) else self.all


def forward_flops(transformer: nn.Module, tokens: Tokens) -> float:
    """Of one row, a multiply-add counted as two."""
    linears = sum(2 * m.weight.numel() * tokens.through(path) for path, m in _linears(transformer))
    attention = sum(4 * tokens.attending(path) ** 2 * width for path, width in _attentions(transformer))
    return float(linears + attention)


def activation_bytes(transformer: nn.Module, tokens: Tokens, size: int, checkpointed: bool = False) -> int:
    """Of one row, what a forward with a gradient keeps, numbers of `size` bytes: an estimate.

    What each Linear gives, and its adapter beside it, and what each attention gives (measured: within 5 %).
    `checkpointed`: the input of each block, and one block whole, in its backward.
    """
    blocks = list(_blocks(transformer))
    kept = {block: 0 for block in blocks}
    rest = 0
    widths = [(path, 2 * tokens.through(path) * m.out_features) for path, m in _linears(transformer)]
    widths += [(path, tokens.attending(path) * width) for path, width in _attentions(transformer)]
    for path, numbers in widths:
        block = next((b for b in blocks if path.startswith(b + ".")), None)
        if block is None:
            rest += numbers
        else:
            kept[block] += numbers
    total = rest + sum(kept.values())
    if checkpointed:
        width = max((w for _, w in _attentions(transformer)), default=0)
        total = rest + len(blocks) * tokens.all * width + max(kept.values(), default=0)
    return int(total * size * (HALF if size == 2 else 1))


def _linears(transformer: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return [(path, m) for path, m in transformer.named_modules() if isinstance(m, nn.Linear)]


def _attentions(transformer: nn.Module) -> Iterable[tuple[str, int]]:
    """Path and width (heads times their size) of each attention."""
    found = []
    for path, module in transformer.named_modules():
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            found.append((path, module.to_q.out_features))
        elif hasattr(module, "to_qkv_mlp_proj"):
            found.append((path, int(module.inner_dim)))
    return found


def _blocks(transformer: nn.Module) -> Iterable[str]:
    """Paths of the blocks that gradient checkpointing recomputes: members of the transformer's lists of layers."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{i}" for i in range(len(child)))
