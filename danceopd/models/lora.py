"""A LoRA in memory (`Adapter`: a pair of matrices for each adapted Linear), and the layer that computes with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn import Parameter

from danceopd.common.tensors import compute_dtype
from danceopd.models.storage import dequantised, kept_as


@dataclass
class Adapter:
    """A LoRA: module path in the transformer -> (A (r, in), B (out, r)), alpha folded into B.

    fp32; the layer computes `W x + B A x`. Ranks may differ between modules; modules are kept sorted.
    ValueError for shapes that do not multiply.
    """

    tensors: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        for name, (a, b) in self.tensors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"{name}: A {tuple(a.shape)}, B {tuple(b.shape)}: not (r, in) and (out, r)")
        self.tensors = {name: (a.float(), b.float()) for name, (a, b) in sorted(self.tensors.items())}

    def __len__(self) -> int:
        """Number of adapted modules."""
        return len(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {name: a.shape[0] for name, (a, _) in self.tensors.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 when there is none."""
        return max(self.ranks.values(), default=0)

    @property
    def parameters(self) -> int:
        """Number of parameters, A and B together."""
        return sum(a.numel() + b.numel() for a, b in self.tensors.values())

    def delta(self, module: str) -> Tensor:
        """What is added to a module's weight: (out, in), fp32. KeyError for a module that is not adapted."""
        a, b = self.tensors[module]
        return b @ a

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and fp32 values: equal for equal adapters, from whatever file."""
        digest = hashlib.sha256()
        for name, pair in self.tensors.items():
            for tensor in pair:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Adapter:
        """A detached copy on `device`, its values rounded to `dtype` when given (they stay fp32)."""

        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(device, copy=True)
            return tensor if dtype is None else tensor.to(dtype).float()

        return Adapter({name: (move(a), move(b)) for name, (a, b) in self.tensors.items()})


@dataclass(eq=False)
class LayerLora:
    """One LoRA of a layer: `a (r, in)` and `b (out, r)`, fp32; `low`: both in the layer's dtype, None where it is fp32.
    """

    a: Parameter
    b: Parameter
    scale: float
    low: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> None:
        """Bring `low` up to date, in place where it can stay (a CUDA graph may read it)."""
        if dtype == self.a.dtype:
            self.low = None
        elif self.low is None or self.low[0].device != self.a.device:
            self.low = self.a.detach().to(dtype), self.b.detach().to(dtype)
        else:
            torch._foreach_copy_(list(self.low), [self.a, self.b])


class RowsNotTold(Exception):
    """A layer's input does not say which row of the batch is whose."""


class LoraLinear(nn.Module):
    """A frozen Linear and the LoRAs on it: `W x + bias + scale · B A x` with the `active` one, `W x + bias` with none.

    `by_rows` are LoRAs (None: none) of slices of the batch's rows, in order, in place of one for all of them.

    x and the result are in the Linear's dtype, and so are the products: the fp32 LoRA is cast down once an update,
    where PEFT casts every input up to fp32 and keeps that copy for the backward. Gradients arrive in fp32.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.loras: dict[str, LayerLora] = {}
        self.active: LayerLora | None = None
        self.by_rows: list[tuple[slice, LayerLora | None]] = []
        self.plain, self.packed = True, False

    # what models ask of a Linear

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.base_layer)

    @property
    def quantised(self) -> bool:
        return kept_as(self.base_layer) is not None

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def add(
        self, name: str, a: Tensor, b: Tensor, scale: float, trainable: bool, device: torch.device | None = None
    ) -> None:
        """Add a LoRA under a name that is free; its tensors are copied to `device` (None: that of the layer)."""
        device = device or self.weight.device
        halves = [
            Parameter(half.detach().to(device, torch.float32, copy=True).contiguous(), requires_grad=trainable)
            for half in (a, b)
        ]
        for letter, half in zip("AB", halves):
            self.register_parameter(f"lora_{letter}_{name}", half)
        self.loras[name] = LayerLora(halves[0], halves[1], scale)

    def remove(self, name: str) -> None:
        """Take a LoRA out that is not active."""
        for letter in "AB":
            delattr(self, f"lora_{letter}_{name}")
        del self.loras[name]

    def activate(self, name: str | None) -> None:
        """Make one LoRA the active one; None, or one that this layer has not: none."""
        base = self.base_layer
        self.active = self.loras.get(name or "")
        # Another kind of Linear, or one with a hook: only it knows how to compute itself.
        self.packed = self.quantised
        self.plain = type(base) is nn.Linear and "forward" not in vars(base)
        self.plain &= not (base._forward_hooks or base._forward_pre_hooks)

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, in)` -> `(…, out)`."""
        base, lora = self.base_layer, self.active
        if self.by_rows:
            return self._by_rows(x)
        if lora is None:
            return base(x)
        a, b = lora.low or (lora.a, lora.b)
        if self.packed:
            return _LoraQuantised.apply(x, base, lora.a, lora.b, a.to(x.dtype), b.to(x.dtype), lora.scale)
        if not self.plain:
            return base(x) + lora.scale * F.linear(F.linear(x, lora.a.to(x.dtype)), lora.b.to(x.dtype))
        if not torch.is_grad_enabled():
            return _lora_linear(x, base.weight, base.bias, a, b, lora.scale)[0]
        return _LoraLinear.apply(x, base.weight, base.bias, lora.a, lora.b, a, b, lora.scale)

    def _by_rows(self, x: Tensor) -> Tensor:
        """The same with a LoRA for each row, without a gradient; a row's tokens lie side by side in `x`."""
        count, y = self.by_rows[-1][0].stop, self.base_layer(x).to(x.dtype)
        if len(x) % count:
            raise RowsNotTold
        given, made = x.reshape(count, -1, x.shape[-1]), y.view(count, -1, y.shape[-1])
        for rows, lora in self.by_rows:
            if lora is not None:
                a, b = (half.to(x.dtype) for half in lora.low or (lora.a, lora.b))
                made[rows].flatten(0, 1).addmm_(given[rows].flatten(0, 1) @ a.t(), b.t(), alpha=lora.scale)
        return y


def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(W x + bias + scale · B A x, A x)`; the second has one row a token."""
    rows = x.reshape(-1, x.shape[-1])
    down = rows @ a.t()
    y = F.linear(rows, weight, bias).addmm_(down, b.t(), alpha=scale)
    return _shaped(y, x), down


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """`(n, d)` as `(…, d)` like another tensor, and not marked as a view: models may write into the result."""
    return rows if like.ndim == 2 else torch.ops.aten._unsafe_view(rows, [*like.shape[:-1], rows.shape[-1]])


class _LoraLinear(torch.autograd.Function):
    """`_lora_linear` with a gradient to x, A and B (none to W). Keeps x itself, and A x, for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, master_a: Tensor, master_b: Tensor, a: Tensor,
        b: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        y, down = _lora_linear(x, weight, bias, a, b, scale)
        ctx.scale = scale
        # The transpose is a view: it stays on this memory when the backbone switches the parameter to other weights.
        ctx.save_for_backward(x, down, weight.t(), a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, weight_t, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, da, db = _gradients(grads[0], x, down, a, b, ctx.scale, weight_t.t() if needs[0] else None, needs[3:5])
        return dx, None, None, da, db, None, None, None


class _LoraQuantised(torch.autograd.Function):
    """The same on a quantised Linear, which computes itself; its weight is dequantised for the gradient to x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Any, master_a: Tensor, master_b: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ a.t()
        y = base(rows).to(x.dtype).addmm_(down, b.t(), alpha=scale)
        ctx.base, ctx.scale = base, scale
        ctx.save_for_backward(x, down, a, b)
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        weight = dequantised(ctx.base, x.dtype) if needs[0] else None
        dx, da, db = _gradients(grads[0], x, down, a, b, ctx.scale, weight, needs[2:4])
        return dx, None, da, db, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, down: Tensor, a: Tensor, b: Tensor, scale: float, weight: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients to x (where the `weight` is given), and to A and B where they are needed, in fp32."""
    grad = grad.reshape(-1, grad.shape[-1])
    up, dx, da, db = scale * (grad @ b), None, None, None
    if weight is not None:
        dx = _shaped((grad @ weight).addmm_(up, a), x)
    if needs[0]:
        da = (up.t() @ x.reshape(-1, x.shape[-1])).float()
    if needs[1]:
        db = scale * (grad.t() @ down).float()
    return dx, da, db
