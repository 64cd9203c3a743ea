"""What a forward and a backward really hold, counted on the meta device: real transformers of true size, no memory.

`Held` follows every storage from its birth to its death, so its peak is what an allocator would have to give. Attention
is counted as a fused kernel keeps it (queries, keys, values and the result), positions are stubs of the true shape.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danceopd.models.backbone import Backbone
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.families.wan import WHOLE
from danceopd.pipelines.registry import FAMILIES

META = torch.device("meta")


class Held(TorchDispatchMode):
    """Bytes of the storages that operators make and that are alive: `now`, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), known)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any, known: set[int]) -> None:
        key = storage._cdata
        if key in self.alive or key in known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self.alive.pop(key, None) is not None:
                self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """A context in which attention keeps what a fused kernel keeps."""
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *a, **k: _FlashAttention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


class _Positions(nn.Module):
    """Stands in for rotary tables, which are made from values that a meta tensor lacks."""

    def __init__(self, width: int, dtype: torch.dtype, count: int) -> None:
        super().__init__()
        self.width, self.dtype, self.count = width, dtype, count

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Any:
        tables = tuple(torch.empty(len(ids), self.width, device=META, dtype=self.dtype) for _ in range(self.count))
        return tables if self.count > 1 else tables[0]


class _Grid(nn.Module):
    """The same for a grid of latents."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.shape = 1, tokens, 1, width

    def forward(self, latents: Tensor) -> Any:
        return torch.empty(self.shape, device=META), torch.empty(self.shape, device=META)


def condition(family: str, transformer: Any, rows: int, side: int, source: bool, text: int) -> tuple[Any, Condition]:
    """(shape of a row's latents, condition) of pictures of `side` x `side` pixels, their rotary tables replaced."""
    dtype, config = next(transformer.parameters()).dtype, transformer.config
    n, m = (side // 16) ** 2, (side // 16) ** 2 if source else 0

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, device=META, dtype=kind)

    if family in ("flux2-klein", "flux2-dev"):
        transformer.pos_embed = _Positions(128, torch.float32, 2)
        kwargs = {
            "encoder_hidden_states": empty(rows, text, config.joint_attention_dim),
            "img_ids": empty(rows, n + m, 4),
            "txt_ids": empty(rows, text, 4),
            "guidance": None,
        }
        return (n, config.in_channels), Condition(
            family, (n, config.in_channels), kwargs, empty(rows, m, config.in_channels) if m else None
        )
    if family == "flux1":
        transformer.pos_embed = _Positions(128, torch.float32, 2)
        kwargs = {
            "encoder_hidden_states": empty(rows, text, 4096),
            "pooled_projections": empty(rows, 768),
            "guidance": empty(rows, kind=torch.float32),
        }
        shared = {"txt_ids": empty(text, 3), "img_ids": empty(n + m, 3)}
        return (n, 64), Condition(family, (n, 64), kwargs, empty(rows, m, 64) if m else None, shared)
    if family == "longcat-image":
        transformer.pos_embed = _Positions(128, torch.float32, 2)
        shared = {"txt_ids": empty(text, 3), "img_ids": empty(n + m, 3)}
        kwargs = {"encoder_hidden_states": empty(rows, text, 3584)}
        return (n, 64), Condition(family, (n, 64), kwargs, empty(rows, m, 64) if m else None, shared)
    if family == "bria-fibo":
        transformer.pos_embed = _Positions(128, torch.float32, 2)
        layers = len(transformer.caption_projection)
        kwargs = {
            "encoder_hidden_states": empty(rows, text, 4096),
            "text_encoder_layers": empty(rows, text, layers, 2048),
            "text_mask": None,
        }
        fixed, shared = {"trimmed": True, "layers": list(range(layers))}, {"img_ids": empty(n + m, 3)}
        return (n, 48), Condition(family, (n, 48), kwargs, empty(rows, m, 48) if m else None, shared, fixed)
    if family == "qwen-image":
        grid = [1, side // 16, side // 16]
        kwargs = {
            "encoder_hidden_states": empty(rows, text, 3584),
            "encoder_hidden_states_mask": None,
            "guidance": None,
        }
        fixed = {"img_shapes": [grid, grid] if m else [grid], "trimmed": True}
        context = empty(rows, m, 64) if m else None
        return (n, 64), Condition(family, (n, 64), kwargs, context, fixed=fixed)
    if family == "z-image":
        transformer.rope_embedder = _Positions(config.dim // config.n_heads // 2, torch.complex64, 1)
        kwargs = {"cap_feats": empty(rows, text, config.cap_feat_dim), "cap_lengths": empty(rows, 1)}
        return (16, side // 8, side // 8), Condition(
            family, (16, side // 8, side // 8), kwargs, fixed={"lengths": [[text]] * rows}
        )
    if family == "wan":
        transformer.rope = _Grid(config.attention_head_dim, n)
        shape = (config.in_channels, 1, side // 16 * 2, side // 16 * 2)
        return shape, Condition(family, shape, {"encoder_hidden_states": empty(rows, text, 4096)}, fixed={WHOLE: True})
    assert family == "sd3"
    kwargs = {"encoder_hidden_states": empty(rows, text, 4096), "pooled_projections": empty(rows, 2048)}
    return (16, side // 8, side // 8), Condition(family, (16, side // 8, side // 8), kwargs)


def counted(
    family: str, transformer: nn.Module, *, rows: int = 1, side: int = 1024, source: bool = False, text: int = 512,
    rank: int = 64, gradient: bool = True, checkpointed: bool = False,
) -> int:  # fmt: skip
    """Bytes at the peak of a forward (with `gradient`: and its backward), besides the weights and their gradients."""
    shape, given = condition(family, transformer, rows, side, source, text)
    backbone = Backbone(transformer, FAMILIES[family])
    backbone.new_student("student", rank)
    parameters = backbone.parameters("student")
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if checkpointed:
        backbone.checkpoint_gradients()
    x, sigma = torch.empty(rows, *shape, device=META), torch.empty(rows, device=META)
    with flash_attention(), backbone.acting_as("student"), Held() as held, torch.set_grad_enabled(gradient):
        velocity = backbone.velocity(x, sigma, given)
        if gradient:
            velocity.square().mean().backward()
    return held.peak
