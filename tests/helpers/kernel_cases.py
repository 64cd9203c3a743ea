"""The same inputs through a kernel backend, through eager torch and in float64: forward and every gradient.

`python kernel_cases.py triton` prints, for each case, the relative errors against float64 of the kernels and of
eager torch, and the share of forward values that are equal bit for bit. With the CUDA sources on a CPU (`cuda_on_cpu`)
and in Triton's interpreter nothing here needs a GPU. What torch allocates is filled with NaN, so that a value which no
kernel writes shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danceopd.kernels import using
from danceopd.kernels.functional import add_norm, joint_qkv, parallel_qkv, swiglu_concat
from danceopd.kernels.inputs import Stream

Function = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(*shape: int) -> Tensor:
    return 3 * draw(99, *shape)


def wide(x: Tensor, like: Tensor) -> Tensor:
    """A rotary table: fp32 as models hold it, float64 (of the same values) for the reference."""
    return x.float().to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)


def twice(angle: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return wide(angle.cos().repeat_interleave(2, -1), like), wide(angle.sin().repeat_interleave(2, -1), like)


def pairs(angle: Tensor, like: Tensor) -> tuple[Tensor, None]:
    return wide(torch.stack([angle.cos(), angle.sin()], -1).flatten(-2), like), None


def separate(heads: int, dim: int, image: int, text: int, rope: str = "twice", **options: Any) -> tuple:
    """Two streams (or one, `text=0`) of separate projections, all four norm weights, rows ragged against the blocks."""
    text_first = options.get("text_first", True)
    width, rows = heads * dim, 2

    def function(q, k, v, wq, wk, *rest):
        shape = (rows, image + text, dim // 2) if rope == "batch" else (image + text, dim // 2)
        table = (None, None)
        if rope:
            table = (pairs if rope == "pairs" else twice)(angles(*shape), q)
        first = slice(text, None) if text_first else slice(0, image)
        second = slice(0, text) if text_first else slice(image, None)
        cut = lambda rows: tuple(None if t is None else t[..., rows, :] for t in table)  # noqa: E731
        other = Stream(*rest, *cut(second)) if text else None
        return joint_qkv(Stream(q, k, v, wq, wk, *cut(first)), other, head_dim=dim, eps=EPS, **options)

    inputs = [draw(i, rows, image, width) for i in range(3)] + [draw(3, dim), draw(4, dim)]
    if text:
        inputs += [draw(5 + i, rows, text, width) for i in range(3)] + [draw(8, dim), draw(9, dim)]
    return function, inputs


def packed(heads: int, dim: int, image: int, text: int, **options: Any) -> tuple:
    """Packed projections of both streams, cut out of wider rows: strided reads, and a packed gradient back."""
    width = 3 * heads * dim

    def function(x, y, wq, wk, text_wq, text_wk):
        table = twice(angles(image + text, dim // 2), x)
        ropes = tuple(t[text:] for t in table), tuple(t[:text] for t in table)
        image_stream = Stream(x[..., 16 : 16 + width], None, None, wq, wk, *ropes[0])
        text_stream = Stream(y[..., :width], None, None, text_wq, text_wk, *ropes[1])
        return joint_qkv(image_stream, text_stream, head_dim=dim, eps=EPS, **options)

    weights = [draw(2 + i, dim) for i in range(4)]
    return function, [draw(0, 2, image, width + 32), draw(1, 2, text, width + 16), *weights]


def unnormed() -> tuple:
    """No norm and no rotation: the streams only join (SD3 without qk-norm)."""

    def function(*streams):
        return joint_qkv(Stream(*streams[:3]), Stream(*streams[3:]), head_dim=64, eps=EPS, text_first=False)

    return function, [draw(i, 2, 4 if i < 3 else 3, 3 * 64) for i in range(6)]


def parallel(dim: int, mlp: int) -> tuple:
    def function(x, wq, wk):
        q, k, v, act, gated = parallel_qkv(
            x, wq, wk, *twice(angles(5, dim // 2), x), head_dim=dim, width=3 * dim, eps=EPS
        )
        return q, k, v, act if gated else swiglu_concat(act)

    return function, [draw(0, 2, 5, 9 * dim + 2 * mlp), draw(1, dim), draw(2, dim)]


def norm_case(columns: int, tokens: int = 1, **options: Any) -> tuple:
    """`add_norm` with everything its form has; modulation of a row for each sample, or for each token."""
    kind, rms_y = options.get("kind", "layer"), options.get("rms_y", False)

    def function(x, y, gate, scale, shift, weight, y_weight):
        given = {"scale": scale, "weight": weight} if kind == "rms" else {"scale": scale, "shift": shift}
        given = {} if kind == "none" else given
        branch = {"y_weight": y_weight} if rms_y else {}
        out = add_norm(x, y, gate, **given, **branch, **options)
        return out[:1] if kind == "none" else out

    modulation = [0.3 * draw(2 + i, 2, tokens, columns) for i in range(3)]
    weights = [draw(5, columns), draw(6, columns)]
    return function, [draw(0, 2, 3, columns) + 0.5, draw(1, 2, 3, columns), *modulation, *weights]


def adaptive(columns: int) -> tuple:
    """A norm without a branch, modulated by strided views of one tensor, as a block's modulation comes."""
    rows = 2

    def function(x, modulation):
        shift, scale, _ = modulation.chunk(3, dim=-1)
        return add_norm(x, scale=scale, shift=shift)[1]

    return function, [draw(0, rows, 3, columns), 0.3 * draw(1, rows, 1, 3 * columns)]


def gated(columns: int, passed: int) -> tuple:
    if not passed:
        return lambda x, up: swiglu_concat(x, up), [draw(0, 2, 3, columns), draw(1, 2, 3, columns)]
    return lambda x, y: swiglu_concat(x, passed=y), [draw(0, 2, 3, 2 * columns), draw(1, 2, 3, passed)]


CASES: dict[str, tuple[torch.dtype, tuple]] = {
    "flux-128-bf16": (BF16, separate(3, 128, 5, 3)),
    "flux-128-fp16": (FP16, separate(3, 128, 5, 3)),
    "sd3-64-fp16": (FP16, separate(5, 64, 4, 3, rope="", text_first=False, round_first=True)),
    "qwen-96-fp16": (FP16, separate(5, 96, 4, 2, rope="pairs", round_first=True)),
    "batch-96-fp32": (FP32, separate(3, 96, 3, 2, rope="batch", text_first=False)),
    "z-image-128-fp32": (FP32, separate(9, 128, 3, 0, rope="batch", round_first=True)),
    "packed-128-fp16": (FP16, packed(6, 128, 4, 2)),
    "packed-64-bf16": (BF16, packed(3, 64, 3, 5, round_first=True, text_first=True)),
    "unnormed-64-fp16": (FP16, unnormed()),
    "parallel-64-fp16": (FP16, parallel(64, 40)),
    "parallel-128-fp32": (FP32, parallel(128, 72)),
    "layer-3072-bf16": (BF16, norm_case(3072)),
    "layer-1536-fp16": (FP16, norm_case(1536, tokens=3)),
    "gate-40-fp16": (FP16, norm_case(40, kind="none")),
    "rms-3840-fp16": (FP16, norm_case(3840, kind="rms", rms_y=True)),
    "rms-40-fp32": (FP32, norm_case(40, kind="rms", rms_y=True)),
    "rms-gate-1536-fp16": (FP16, norm_case(1536, kind="none", rms_y=True)),
    "adaptive-1536-fp16": (FP16, adaptive(1536)),
    "swiglu-behind-fp16": (FP16, gated(1536, 64)),
    "swiglu-apart-fp32": (FP32, gated(40, 0)),
}


def outputs(
    function: Function, inputs: list[Tensor], dtype: torch.dtype, backend: str, device: str = "cpu"
) -> tuple[list, int]:
    """What `function` returns, then the gradient of each input; and how many are outputs."""
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    with using(backend):
        out = function(*leaves)
        out = [o for o in (out if isinstance(out, tuple) else (out,))]
        # gradients as attention may hand them back: heads before tokens in memory
        grads = [draw(50 + i, *o.shape).to(device, dtype) for i, o in enumerate(out)]
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) if g.ndim == 4 else g for g in grads]
        found = torch.autograd.grad(out, leaves, grads, allow_unused=True)
    return [None if x is None else x.detach().cpu() for x in (*out, *found)], len(out)


def relative(x: Tensor, exact: Tensor) -> float:
    size = exact.norm().item()
    return (x.double() - exact).norm().item() / size if size else 0.0


def compare(name: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """Errors against float64 of the backend and of eager torch, output by output, and the share of equal values."""
    dtype, (function, inputs) = CASES[name]
    inputs = [x.to(dtype).double() for x in inputs]
    got, count = outputs(function, inputs, dtype, backend, device)
    eager, _ = outputs(function, inputs, dtype, "torch", device)
    exact, _ = outputs(function, inputs, torch.float64, "torch")
    rows = [(g, e, x) for g, e, x in zip(got, eager, exact) if x is not None]
    return {
        "case": name,
        "errors": [relative(g, x) for g, _, x in rows],
        "eager": [relative(e, x) for _, e, x in rows],
        "same": [(g == e).double().mean().item() for g, e, _ in rows[:count]],
    }


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    for case in CASES:
        print(json.dumps(compare(case, sys.argv[1])), flush=True)
