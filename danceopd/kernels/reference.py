"""The plain torch reference of every kernel: what the stock diffusers modules compute, value for value.

Half-precision tensors are computed in fp32 and rounded where the stock module stores a tensor; fp64 stays fp64 and is
never rounded, so the fused versions are measured against this. Functions that return tensors are differentiable by
autograd. Those that write into `out` are what an operator calls; each `*_backward` is the derivative written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from danceopd.kernels.inputs import SplitStream, stream_offsets

HALF = (torch.float16, torch.bfloat16)
Out = tuple[Tensor, Tensor, Tensor | None]


def wide(x: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rms(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), in the dtype of `x`.

    `round_first`: the diffusers convention, `x` is rounded to a half-precision weight's dtype before the weight
    multiplies it. Otherwise the torch convention, one rounding at the end.
    """
    n = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        if round_first and weight.dtype in HALF:
            n = wide(n.to(weight.dtype))
        n = n * wide(weight)
    return n.to(x.dtype)


def _factors(cos: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair of columns, `(…, S, 1, D/2)`: with a dimension for the heads."""
    c, s = cos[..., 0::2], (cos[..., 1::2] if sin is None else sin[..., 0::2])
    return c.unsqueeze(-2), s.unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool = False) -> Tensor:
    """Interleaved rotary embedding (arXiv 2104.09864) of pairs of neighbouring columns; `back`: its inverse."""
    if cos is None:
        return x
    c, s = _factors(cos, sin)
    s = -s if back else s
    a, b = wide(x)[..., 0::2], wide(x)[..., 1::2]
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2).to(x.dtype)


def joint(image: SplitStream, text: SplitStream | None, eps: float, round_first: bool, text_first: bool) -> Out:
    """q, k, v of both streams as attention takes them: `(B, S, H, D)` each, normalised, rotated, concatenated.

    `v` is None where the streams have none. Without text: the image stream alone.
    """
    halves = []
    for part in (image, text):
        if part is not None:
            q = part.q if part.weight_q is None else rms(part.q, part.weight_q, eps, round_first)
            k = part.k if part.weight_k is None else rms(part.k, part.weight_k, eps, round_first)
            halves.append((rotate(q, part.cos, part.sin), rotate(k, part.cos, part.sin), part.v))
    if len(halves) == 1:
        return halves[0]
    if text_first:
        halves.reverse()
    q, k = torch.cat([half[0] for half in halves], dim=1), torch.cat([half[1] for half in halves], dim=1)
    values = [v for _, _, v in halves if v is not None]
    return q, k, torch.cat(values, dim=1) if values else None


def qkv_prep(
    out: Out, image: SplitStream, text: SplitStream | None, eps: float, round_first: bool, text_first: bool
) -> None:
    """`joint`, written into `out`."""
    for target, value in zip(out, joint(image, text, eps, round_first, text_first)):
        if target is not None and value is not None:
            target.copy_(value)


def rms_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `rms` to `x` and to its weight, in fp32 or fp64; rounding counts as the identity."""
    x = wide(x)
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    n = x * r
    u = grad if weight is None else grad * wide(weight)
    return r * (u - n * (u * n).mean(-1, keepdim=True)), (grad * n).flatten(0, -2).sum(0)


def qkv_prep_backward(
    grads: Out,
    image: SplitStream,
    text: SplitStream | None,
    d_image: SplitStream,
    d_text: SplitStream | None,
    eps: float,
    text_first: bool,
    weights: bool,
) -> list[tuple[Tensor, Tensor]]:
    """The gradient of `joint`, written into `d_image` and `d_text`.

    With `weights`, returns the gradients of each stream's two norm weights (image first), in fp32 or fp64.
    """
    found = []
    parts = [(image, d_image)] if text is None or d_text is None else [(image, d_image), (text, d_text)]
    offsets = stream_offsets(image, text, text_first)
    for (part, d), first in zip(parts, offsets):
        rows, of_weights = slice(first, first + part.q.shape[1]), []
        for grad, x, weight, target in ((grads[0], part.q, part.weight_q, d.q), (grads[1], part.k, part.weight_k, d.k)):
            turned = rotate(wide(grad[:, rows]), part.cos, part.sin, back=True)
            dx, dw = (turned, turned.new_zeros(0)) if weight is None else rms_backward(turned, x, weight, eps)
            target.copy_(dx)
            of_weights.append(dw)
        if d.v is not None and grads[2] is not None:
            d.v.copy_(grads[2][:, rows])
        found.append((of_weights[0], of_weights[1]))
    return found if weights else []


# Gate, add, normalise, modulate


def normed(
    x: Tensor, kind: str, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """`norm(x)·(1 + scale) + shift`: layer norm without parameters, or RMSNorm (diffusers rounding) with a weight."""
    if kind == "layer":
        if weight is not None:
            raise ValueError("the layer norm of add_norm has no weight")
        n = F.layer_norm(wide(x), x.shape[-1:], eps=eps).to(x.dtype)
    else:
        n = rms(x, weight, eps, round_first=True)
    n = n if scale is None else n * (1 + scale)
    return n if shift is None else n + shift


def added(x: Tensor, y: Tensor, gate: Tensor | None, rms_y: bool, y_weight: Tensor | None, y_eps: float) -> Tensor:
    """`x + gate·y`, or `x + gate·RMSNorm(y)`."""
    y = rms(y, y_weight, y_eps, round_first=True) if rms_y else y
    return x + (y if gate is None else gate * y)


def add_norm(
    total: Tensor | None,
    out: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    y_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    rms_y: bool,
    eps: float,
    y_eps: float,
) -> None:
    """`added` written into `total` (when there is a `y`), `normed` of it into `out` (unless `kind` is "none")."""
    if y is not None and total is not None:
        x = total.copy_(added(x, y, gate, rms_y, y_weight, y_eps))
    if out is not None:
        out.copy_(normed(x, kind, weight, scale, shift, eps))


def add_norm_backward(
    dx: Tensor,
    dy: Tensor | None,
    grad_total: Tensor | None,
    grad_out: Tensor | None,
    total: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    y_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    kind: str,
    rms_y: bool,
    eps: float,
    y_eps: float,
) -> None:
    """Gradients to `x` and `y`, written into `dx` and `dy`. `total` is the sum; `y` is there only under `rms_y`."""
    d = torch.zeros_like(wide(total))
    if grad_out is not None:
        g = wide(grad_out) if scale is None else wide(grad_out) * (1 + wide(scale))
        centred = wide(total) - wide(total).mean(-1, keepdim=True) if kind == "layer" else total
        d = rms_backward(g, centred, weight, eps)[0]  # layer norm is RMSNorm between two centrings
        d = d - d.mean(-1, keepdim=True) if kind == "layer" else d
    if grad_total is not None:
        d = d + wide(grad_total)
    dx.copy_(d)
    if dy is not None:
        d = d if gate is None else d * wide(gate)
        dy.copy_(d if y is None else rms_backward(d, y, y_weight, y_eps)[0])


# SwiGLU


def gated(gate: Tensor, up: Tensor, passed: Tensor | None = None) -> Tensor:
    """`silu(gate)·up` (SwiGLU, arXiv 2002.05202), after the columns of `passed` if there are any."""
    out = F.silu(gate) * up
    return out if passed is None else torch.cat([passed, out], dim=-1)


def swiglu(out: Tensor, gate: Tensor, up: Tensor, passed: Tensor | None) -> None:
    """`gated`, written into `out`."""
    out.copy_(gated(gate, up, passed))


def swiglu_backward(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Gradients of `silu(gate)·up`, written into `d_gate` and `d_up`."""
    x, g = wide(gate), wide(grad)
    sigma = torch.sigmoid(x)
    d_gate.copy_(g * wide(up) * sigma * (1 + x * (1 - sigma)))
    d_up.copy_(g * x * sigma)

