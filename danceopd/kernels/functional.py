"""The functions that fused processors and blocks call: each runs as one kernel if possible, else as plain torch.

`joint_qkv`, `parallel_qkv`, `swiglu_concat` and `add_norm` take a block's tensors and return new, differentiable ones.
`backend.use_kernel` decides before the operator is called: on a CPU, for shapes that the kernels do not support and
under `DANCEOPD_KERNELS=torch` these functions run `reference.py`, and autograd and `torch.compile` see ordinary torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.kernels import backend, reference
from danceopd.kernels.inputs import Stream, split_heads
from danceopd.kernels.ops import attention_ops, row_ops
from danceopd.kernels.ops.dispatch import direct

qkv_prep, parallel_prep = direct(attention_ops.qkv_prep), direct(attention_ops.parallel_prep)
row_norm, row_swiglu = direct(row_ops.add_norm), direct(row_ops.swiglu)


def joint_qkv(
    image: Stream,
    text: Stream | None = None,
    *,
    head_dim: int,
    eps: float,
    round_first: bool = False,
    text_first: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of both streams as attention takes them, `(B, S, H, D)`: normalised per head, rotated, concatenated.

    `round_first`: RMSNorm rounded as diffusers does (see `reference.rms`), not as torch does. `text_first`: the order
    of the joint tokens. The values of a single stream are not copied.
    """
    if text is None and image.weight_q is None and image.cos is None:  # only the heads to split
        part = split_heads(image, head_dim)
        assert part.v is not None
        return part.q, part.k, part.v
    chosen = backend.active(image.q.device.type)
    streams = [stream for stream in (image, text) if stream is not None]
    tensors = [x for stream in streams for x in stream[:3]]
    extras = [x for stream in streams for x in stream[3:]]
    if not backend.use_kernel("qkv_prep", chosen, tensors, extras, heads_unsupported(chosen, head_dim, streams)):
        parts = split_heads(image, head_dim), None if text is None else split_heads(text, head_dim)
        q, k, v = reference.joint(*parts, eps, round_first, text_first)
        assert v is not None
        return q, k, v
    value = None
    if text is None and image.k is None and not (torch.is_grad_enabled() and image.q.requires_grad):
        image = image._replace(**dict(zip("qkv", image.q.chunk(3, dim=-1))))
    if text is None and image.v is not None:
        value, image = image.v.unflatten(-1, (-1, head_dim)), image._replace(v=None)
    rest = (None,) * 7 if text is None else text
    q, k, v = qkv_prep(*image, *rest, head_dim, eps, round_first, text_first)
    return q, k, v if value is None else value


def heads_unsupported(chosen: str, head_dim: int, streams: list[Stream]) -> str:
    """Why the kernels of a backend cannot take these streams, "" if they can."""
    if chosen == "cuda" and head_dim not in backend.HEAD_DIMS:
        return f"head dim {head_dim} (the kernels take {', '.join(map(str, backend.HEAD_DIMS))})"
    if any((stream.weight_q is None) != (stream.weight_k is None) for stream in streams):
        return "only one of q and k is normalised"
    for stream in streams:
        for rope in (stream.cos, stream.sin):
            if rope is not None and rope.dtype != torch.float32:
                return "a rotary table is not fp32"
            if rope is not None and rope.shape[-2] != stream.q.shape[1]:
                return "a rotary table and its tokens differ in length"
    return ""


def parallel_qkv(
    packed: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    width: int,
    eps: float,
    round_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """q, k, v `(B, S, H, D)` of FLUX.2's parallel block, its feed-forward, and whether SwiGLU was applied to that.

    `packed (B, S, 3·width + 2·M)` holds q, k, v, gate, up. With a gradient, SwiGLU is applied, `(B, S, M)`, and the
    backward writes the whole gradient of `packed` at once. Without one the feed-forward is a `(B, S, 2·M)` view, for
    `swiglu_concat` to write next to the attention output.
    """
    chosen = backend.active(packed.device.type)
    stream = Stream(packed, None, None, weight_q, weight_k, cos, sin)
    problem = heads_unsupported(chosen, head_dim, [stream])
    if chosen == "cuda" and (packed.shape[-1] - 3 * width) * packed.element_size() % 32:
        problem = "rows do not start at multiples of 16 bytes"  # those of up, behind gate
    fused = backend.use_kernel("parallel_prep", chosen, [packed], list(stream[3:]), problem)
    if fused and torch.is_grad_enabled() and packed.requires_grad:
        fixed = head_dim, width, eps, round_first
        return *parallel_prep(packed, weight_q, weight_k, cos, sin, *fixed), True
    q, k, v, rest = packed.split([width, width, width, packed.shape[-1] - 3 * width], dim=-1)
    apart = Stream(q, k, v, weight_q, weight_k, cos, sin)
    return *joint_qkv(apart, head_dim=head_dim, eps=eps, round_first=round_first), rest, False


def swiglu_concat(x: Tensor, up: Tensor | None = None, passed: Tensor | None = None) -> Tensor:
    """`cat([passed, silu(gate)·up])`: `x (B, S, 2·M)` holds gate and up, or `x` is the gate and `up` is given."""
    chosen = backend.active(x.device.type)
    problem = "" if x.ndim == 3 else f"{x.ndim} dimensions"
    if chosen == "cuda" and up is None and x.shape[-1] * x.element_size() % 32:
        problem = "rows do not start at multiples of 16 bytes"
    if backend.use_kernel("swiglu", chosen, [x, up, passed], [], problem):
        return row_swiglu(x, up, passed)
    gate, other = x.chunk(2, dim=-1) if up is None else (x, up)
    return reference.gated(gate, other, passed)


def add_norm(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    rms_y: bool = False,
    y_weight: Tensor | None = None,
    y_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`x + gate·y`, and `norm(x + gate·y)·(1 + scale) + shift`: `(B, S, C)` each.

    The adaptive norm of a transformer block (AdaLN-Zero, arXiv 2212.09748): gate and add the branch `y`, then normalise
    and modulate for the next layer. Without `y` the first result is `x`; with `kind` "none" the second is the first.
    `kind`: "layer", a layer norm without parameters, or "rms", diffusers' RMSNorm with `weight`. `rms_y` normalises
    `y` first, by `y_weight`. `gate`, `scale`, `shift`: `(B, C)`, `(B, 1, C)` or `(B, S, C)`, or one row for all.
    """
    if kind == "none":
        weight = scale = shift = None
    gate, scale, shift = (t.unsqueeze(1) if t is not None and t.ndim == 2 else t for t in (gate, scale, shift))
    chosen = backend.active(x.device.type)
    problem = "" if x.ndim == 3 and (y is None or y.shape == x.shape) else f"shape {tuple(x.shape)}"
    if chosen == "cuda" and x.shape[-1] * x.element_size() > backend.MAX_ROW_BYTES:
        problem = f"rows of {x.shape[-1]} columns"
    if backend.use_kernel("add_norm", chosen, [x, y, gate, scale, shift], [weight, y_weight], problem):
        total, out = row_norm(x, y, gate, y_weight, weight, scale, shift, kind, rms_y, eps, y_eps)
        total = x if y is None else total
        return total, total if kind == "none" else out
    total = x if y is None else reference.added(x, y, gate, rms_y, y_weight, y_eps)
    return total, total if kind == "none" else reference.normed(total, kind, weight, scale, shift, eps)
