"""The cost of one forward of a transformer, computed from its shapes: FLOPs, and activation memory for a backward.

`danceopd plan` calls this on a transformer on the meta device. Every Linear is counted at the tokens that flow through
it: those of the image and its source, those of the text, all of them, or one vector an image (modulation, time). Which
of these follows from the module names that diffusers' families share. Attention is counted at the tokens that attend.
Norms, rotary embeddings and activation functions are left out: a few per cent.
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
IMAGE = re.compile(r"(^|\.)(noise_refiner|attn2)(\.|$)")
HALF = 1.5
"""Activation bytes over the plain count in half precision: norms and LoRA layers keep their inputs in fp32."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one row: of the image, of its source image, and of the text."""

    image: int
    source: int
    text: int

    @property
    def all(self) -> int:
        """Tokens in all."""
        return self.image + self.source + self.text

    def through(self, path: str) -> int:
        """How many tokens flow through the Linear at a module path."""
        if ONE.search(path):
            return 1
        if JOINT.match(path):
            return self.all
        return self.text if TEXT.search(path) else self.image + self.source

    def attending(self, path: str) -> int:
        """How many tokens attend in the attention at a module path."""
        if IMAGE.search(path):
            return self.image + self.source
        return self.text if TEXT.search(path) else self.all


def forward_flops(transformer: nn.Module, tokens: TokenCounts) -> float:
    """FLOPs of a forward of one row; a multiply-add counts as two."""
    linears = sum(2 * m.weight.numel() * tokens.through(path) for path, m in _linears(transformer))
    attention = sum(4 * tokens.attending(path) ** 2 * width for path, width in _attentions(transformer))
    return float(linears + attention)


def activation_bytes(transformer: nn.Module, tokens: TokenCounts, size: int, checkpointed: bool = False) -> int:
    """Bytes that a forward of one row keeps for its backward, at `size` bytes a number: an estimate.

    The outputs of each Linear and of its adapter, and those of each attention (measured: within 5 %). `checkpointed`:
    with gradient checkpointing, the input of each block, and one block whole, in its backward.
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
    """Path and width (heads times head dim) of each attention module."""
    found = []
    for path, module in transformer.named_modules():
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            found.append((path, module.to_q.out_features))
        elif hasattr(module, "to_qkv_mlp_proj"):
            found.append((path, int(module.inner_dim)))
    return found


def _blocks(transformer: nn.Module) -> Iterable[str]:
    """Paths of the blocks that gradient checkpointing recomputes: members of the transformer's module lists."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{i}" for i in range(len(child)))
