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
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from danceopd.pipelines.two_transformers import PREFIX, SECOND

ONE = re.compile(r"(^|\.)(\w*modulation\w*|\w+_mod|norm\w*\.linear|norm_out|time_\w+|[pt]_embedder)(\.|$)")
TEXT = re.compile(
    r"(^|\.)(add_[qkv]_proj|to_add_out|ff_context|context_embedder|context_refiner|cap_embedder|txt_\w+"
    r"|caption_projection|to_\w+_t|ff_t|text_fusion|text_embedder)(\.|$)|^blocks\.\d+\.attn2\.to_[kv]$"
)
JOINT = re.compile(r"^(single_transformer_blocks|single_stream_blocks|layers)\.")
STREAM = re.compile(r"\.(attn\.to_gate|img_mlp\.(proj|gate_layer|out)|ff\.(gate|up|down))$")  # of blocks for all tokens
IMAGE = re.compile(r"(^|\.)(noise_refiner|attn2)(\.|$)|^blocks\.\d+\.attn1$")
CROSS = re.compile(r"^blocks\.\d+\.attn2$")  # Wan's, in which the image attends to the text


class Held(NamedTuple):
    """Bytes that a transformer's forward and backward hold at their peak in half precision, counted on the meta device
    (tests/helpers/meta_counts.py): for each number that the outputs of Linears, adapters and attentions have, in all
    blocks (`kept`) and in one that is recomputed (`block`); and for each number of the tokens, as wide as the
    attention, in the backward of the last block (`last`) and in a forward without a gradient (`forward`)."""

    kept: float
    last: float
    block: float
    forward: float


HELD = {
    "Flux2Transformer2DModel": Held(2.345, 25.5, 3.49, 43),
    "FluxTransformer2DModel": Held(2.243, 11.7, 2.88, 34.5),
    "QwenImageTransformer2DModel": Held(2.44, 0, 2.71, 29),
    "ZImageTransformer2DModel": Held(3.31, 0, 3.55, 32),
    "SD3Transformer2DModel": Held(2.52, 0, 2.82, 26),
    "LongCatImageTransformer2DModel": Held(2.456, 0, 2.88, 34.5),
    "BriaFiboTransformer2DModel": Held(2.5, 0, 2.8, 34),
    "WanTransformer3DModel": Held(2.555, 12.5, 3.17, 24.3),
}
LEAST_KNOWN = Held(3.31, 25.5, 3.55, 43)
"""Of a transformer that was not counted: the most of those that were."""


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
        if JOINT.match(path) or (STREAM.search(path) and not TEXT.search(path)):
            return self.all
        return self.text if TEXT.search(path) else self.image + self.source

    def attending(self, path: str) -> int:
        """How many tokens attend in the attention at a module path."""
        if IMAGE.search(path):
            return self.image + self.source
        return self.text if TEXT.search(path) else self.all

    def attended(self, path: str) -> int:
        """To how many tokens each of them attends."""
        return self.text if CROSS.search(path) else self.attending(path)


def forward_flops(transformer: nn.Module, tokens: TokenCounts) -> float:
    """FLOPs of a forward of one row; a multiply-add counts as two."""
    linears = sum(
        2 * m.weight.numel() * tokens.through(path) * _share(transformer, path) for path, m in _linears(transformer)
    )
    attention = sum(
        4 * tokens.attending(path) * tokens.attended(path) * width for path, width in _attentions(transformer)
    )
    return float(linears + attention)


@lru_cache(maxsize=8)
def activation_bytes(transformer: nn.Module, tokens: TokenCounts, size: int, checkpointed: bool = False) -> int:
    """Bytes that a forward and a backward of a row hold at their peak, at `size` bytes a number: within 5 %.

    `checkpointed`: with gradient checkpointing, the input of each block, and one block whole, in its backward. Weights,
    their gradients and adapters are not counted.
    """
    blocks = {b: 0 for b in block_paths(transformer) if not (TEXT.search(b) or b.startswith(PREFIX))}
    rest = 0
    widths = [
        (path, int(2 * tokens.through(path) * m.out_features * _share(transformer, path)))
        for path, m in _linears(transformer)
    ]
    widths += [(path, tokens.attending(path) * width) for path, width in _attentions(transformer)]
    for path, numbers in widths:
        block = ".".join(path.split(".")[:2])
        if block in blocks:
            blocks[block] += numbers
        else:
            rest += numbers
    held, width = _held(transformer, size), tokens.all * _width(transformer)
    if not checkpointed:
        return int(held.kept * (rest + sum(blocks.values())) + held.last * width)
    # Backwards through the blocks, each of which gives its input free.
    return int(max(size * i * width + held.block * (rest + block) for i, block in enumerate([0, *blocks.values()])))


@lru_cache(maxsize=8)
def forward_bytes(transformer: nn.Module, tokens: TokenCounts, size: int) -> int:
    """Bytes that a forward of one row without a gradient holds at its peak, besides the weights: an estimate."""
    return int(_held(transformer, size).forward * tokens.all * _width(transformer))


def _held(transformer: nn.Module, size: int) -> Held:
    """In fp32 nothing is cast, so each number is kept once."""
    half = HELD.get(type(transformer).__name__, LEAST_KNOWN)
    return half if size == 2 else Held(size, 0, size, 2 * half.forward)


def _width(transformer: nn.Module) -> int:
    return max((width for _, width in _attentions(transformer)), default=0)


def _of_one(transformer: nn.Module) -> Iterable[tuple[str, Any]]:
    """Modules by path; of two transformers those of the first, since a row goes through one."""
    return ((path, m) for path, m in transformer.named_modules() if not path.startswith(PREFIX))


def _linears(transformer: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return [(path, m) for path, m in _of_one(transformer) if isinstance(m, nn.Linear)]


def _share(transformer: nn.Module, path: str) -> float:
    """The share of its tokens that goes through a Linear: below 1 for one of several experts."""
    if ".experts." not in path:
        return 1.0
    config: Any = transformer.config
    return config.num_activated_experts / config.num_routed_experts


def _attentions(transformer: nn.Module) -> Iterable[tuple[str, int]]:
    """Path and width (heads times head dim) of each attention module."""
    found = []
    for path, module in _of_one(transformer):
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            found.append((path, module.to_q.out_features))
        elif hasattr(module, "to_qkv_mlp_proj"):
            found.append((path, int(module.inner_dim)))
    return found


def block_paths(transformer: nn.Module) -> Iterable[str]:
    """Paths of the blocks that gradient checkpointing recomputes: members of the transformer's module lists."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{i}" for i in range(len(child)))
        elif name == SECOND:
            yield from (f"{PREFIX}{path}" for path in block_paths(child))
