"""q, k, v before attention, adaptive norms and SwiGLU, for `benchmarks/gpu.py`: eager, compiled, fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from rich.console import Console
from torch import Tensor, nn

from danceopd.kernels import backend as kernel_backend
from danceopd.kernels import using
from danceopd.kernels.functional import add_norm, joint_qkv, swiglu_concat
from danceopd.kernels.inputs import Stream, rope_table

Run = Callable[[int], Any]  # one call on the i-th set of buffers

# The segment between the projections and attention


@dataclass(frozen=True)
class Shape:
    """A model's attention inputs. `norm`: torch or diffusers RMSNorm; `rope`: real pairs, complex, or none."""

    model: str
    heads: int
    dim: int
    text: int
    norm: type[nn.Module]
    rope: str
    text_first: bool = True


SHAPES = (
    Shape("SD3.5-M", 24, 64, 333, RMSNorm, "", text_first=False),
    Shape("klein-4B", 24, 128, 512, nn.RMSNorm, "real"),
    Shape("Z-Image", 30, 128, 0, RMSNorm, "complex"),  # one stream, its text counted in the image tokens
    Shape("Qwen-Image", 24, 128, 256, RMSNorm, "complex"),
)


class Segment:
    """q, k, v projections of a shape, and the ways to bring them to attention."""

    def __init__(self, shape: Shape, image: int, device: str, sets: int, grad: bool) -> None:
        self.shape, self.image, width = shape, image, shape.heads * shape.dim
        text = shape.text
        kind = {"device": device, "dtype": torch.bfloat16}
        draw = lambda n: torch.randn(1, n, width, **kind).requires_grad_(grad)  # noqa: E731
        self.sets = [([draw(image) for _ in "qkv"], [draw(text) for _ in "qkv"] if text else []) for _ in range(sets)]
        self.norms = [shape.norm(shape.dim, eps=1e-6).to(**kind).requires_grad_(False) for _ in range(4)]
        angle = 6 * torch.rand(image + text, shape.dim // 2, device=device)
        self.real = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
        self.complex = torch.polar(torch.ones_like(angle), angle)
        self.grads = [torch.randn(1, image + text, shape.heads, shape.dim, **kind) for _ in range(3)]

    @property
    def bytes(self) -> int:
        """Read once and written once: q, k and v of every token; v of a single stream stays where it is."""
        tensors = 3 if self.shape.text else 2
        return 2 * tensors * (self.image + self.shape.text) * self.shape.heads * self.shape.dim * 2

    def bytes_with_backward(self) -> int:
        """Backward reads q, k and the gradients of what was written; it writes as many as forward did."""
        tensors = 3 if self.shape.text else 2
        return self.bytes * (4 * tensors + 2) // (2 * tensors)

    def leaves(self, i: int) -> list[Tensor]:
        image, text = self.sets[i]
        return [*image[: 3 if text else 2], *text]

    def stock(self, i: int) -> tuple[Tensor, ...]:
        """What diffusers' processors do, step by step."""
        return self.steps(*self.sets[i])

    def compiled(self) -> Callable[[int], tuple[Tensor, ...]]:
        """`stock` compiled, of tensors: with `i` among its arguments it would be compiled for each `i` anew."""
        steps = torch.compile(self.steps, dynamic=False)
        return lambda i: steps(*self.sets[i])

    def steps(self, image: list[Tensor], text: list[Tensor]) -> tuple[Tensor, ...]:
        shape: Shape = self.shape
        halves = []
        for (q, k, v), norms in ((image, self.norms[:2]), *(((text, self.norms[2:]),) if text else ())):
            q, k, v = (x.unflatten(-1, (-1, shape.dim)) for x in (q, k, v))
            halves.append([norms[0](q), norms[1](k), v])
        if shape.rope == "complex" and text:
            tables = self.complex[shape.text :], self.complex[: shape.text]
            halves = [[self.rotate(x, t) for x in half[:2]] + half[2:] for half, t in zip(halves, tables)]
        if len(halves) == 1:
            q, k, v = halves[0]
        else:
            order = halves[::-1] if shape.text_first else halves
            q, k, v = (torch.cat([half[j] for half in order], dim=1) for j in range(3))
        if shape.rope == "real":
            q, k = (apply_rotary_emb(x, self.real, sequence_dim=1) for x in (q, k))
        elif shape.rope == "complex" and not text:
            q, k = self.rotate(q, self.complex), self.rotate(k, self.complex)
        return q, k, v

    @staticmethod
    def rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs[:, None]).flatten(3).type_as(x)

    def fused(self, i: int) -> tuple[Tensor, ...]:
        shape, (image, text) = self.shape, self.sets[i]
        weights = [norm.weight for norm in self.norms]
        table = (rope_table(self.complex), None) if shape.rope else (None, None)
        cos, sin = self.real if shape.rope == "real" else table
        cut = lambda rows: tuple(None if t is None else t[rows] for t in (cos, sin))  # noqa: E731
        other = Stream(*text, *weights[2:], *cut(slice(0, shape.text))) if text else None
        return joint_qkv(
            Stream(*image, *weights[:2], *cut(slice(shape.text, None))),
            other,
            head_dim=shape.dim,
            eps=1e-6,
            round_first=shape.norm is RMSNorm,
            text_first=shape.text_first,
        )

    def both_ways(self, run: Callable[[int], tuple[Tensor, ...]]) -> Run:
        """`run` and its gradient to the projections."""

        def call(i: int) -> Any:
            out = run(i)[: 3 if self.shape.text else 2]
            return [o.detach() for o in out], torch.autograd.grad(out, self.leaves(i), self.grads[: len(out)])

        return call


def segments(bench: Any, sizes: Sequence[int], smoke: bool) -> None:
    """Forward, and forward with backward: eager, compiled, fused; microseconds, gain, bandwidth. Sources last."""
    plan = [(shape, size, sources) for sources in (0, 1) for size in sizes[::-1] for shape in SHAPES]
    for shape, size, sources in plan:
        if sources and (smoke or shape.model == "SD3.5-M"):
            continue
        image = (size // 16) ** 2 * (1 + sources) + (224 if shape.model == "Z-Image" else 0)
        label = f"{shape.model} {size} px" + (" + source" if sources else "")
        for grad in (False, True):
            if bench.late:
                return
            bench.attempt(label, partial(one_segment, bench, shape, image, label, grad, bool(sources), smoke))
            bench.release()


def one_segment(
    bench: Any, shape: Shape, image: int, label: str, grad: bool, sources: bool, smoke: bool
) -> list[str]:
    sets = 1 if smoke else max(2, -(-256_000_000 // (3 * image * shape.heads * shape.dim * 2)))
    segment = Segment(shape, image, bench.device, sets, grad)
    wrap = segment.both_ways if grad else (lambda run: run)
    with torch.set_grad_enabled(grad):
        times = ways(bench, label, segment, wrap, sets, smoke or sources)
        moved = segment.bytes_with_backward() if grad else segment.bytes
        bench.rows.append(row(label, "fwd + bwd" if grad else "fwd", times, moved))
        Console().print("  ".join(bench.rows[-1]), highlight=False)
        if grad and bench.device != "cpu":
            bench.rows.append([f"{label}, memory", "fwd for a bwd, MB", *peaks(segment)])
    return bench.rows[-1]


def peaks(segment: Segment) -> list[str]:
    """Most memory that the segment takes beyond its inputs: eager, fused, and the share that fused is of eager."""
    found = {}
    for name, run in (("torch", segment.stock), ("cuda", segment.fused)):
        with using("auto" if name == "cuda" else name):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = run(0)
            found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            del kept
    share = found["cuda"] / found["torch"]
    return [f"{found['torch']:.0f}", "", f"{found['cuda']:.0f}", "", f"{share:.2f} of it", "", ""]


def ways(
    bench: Any, label: str, segment: Segment, wrap: Callable[[Any], Run], sets: int, uncompiled: bool
) -> dict[str, float]:
    def timed(name: str, run: Callable[[], Callable[[int], tuple[Tensor, ...]]]) -> None:
        seconds = bench.attempt(f"{label}, {name}", lambda: bench.graph(wrap(run()), sets))
        if seconds is not None:
            found[name] = seconds

    found: dict[str, float] = {}
    timed("eager", lambda: segment.stock)
    if not uncompiled:
        torch._dynamo.reset()
        timed("compile", segment.compiled)
    for backend in ("cuda", "triton"):
        if not kernel_backend.unavailable(backend) and bench.device != "cpu":
            with using(backend):
                timed(backend, lambda: segment.fused)
    if bench.device == "cpu":
        with using("op"):
            timed("cuda", lambda: segment.fused)
    return found


def row(label: str, what: str, times: dict[str, float], moved: float) -> list[str]:
    us = [f"{1e6 * times[name]:.1f}" if name in times else "" for name in ("eager", "compile", "cuda", "triton")]
    best = times.get("cuda", times.get("triton", float("nan")))
    there = best == best
    gains = [f"{times[name] / best:.2f}x" if there and name in times else "" for name in ("eager", "compile")]
    return [label, what, *us, *gains, f"{moved / best / 1e12:.2f}" if there else ""]


# Rows of hidden states


def norms(bench: Any, sizes: Sequence[int], smoke: bool) -> None:
    """An adaptive norm with the gated add before it, and the SwiGLU of a parallel block; forward only."""
    for tokens, width, mlp in ((16, 64, 64),) if smoke else ((4608, 3072, 9216), (4320, 3840, 10240), (1357, 1536, 0)):
        if bench.late:
            return
        kind = {"device": bench.device, "dtype": torch.bfloat16}
        sets = 1 if smoke else max(2, -(-256_000_000 // (4 * tokens * width)))
        xs, ys = ([torch.randn(1, tokens, width, **kind) for _ in range(sets)] for _ in "xy")
        gate, scale, shift = (torch.randn(1, 1, width, **kind) for _ in range(3))

        def stock(x: Tensor, y: Tensor, gate=gate, scale=scale, shift=shift, width=width) -> Any:
            x = x + gate * y
            return x, nn.functional.layer_norm(x, (width,)) * (1 + scale) + shift

        def fused(x: Tensor, y: Tensor, gate=gate, scale=scale, shift=shift) -> Any:
            return add_norm(x, y, gate, scale=scale, shift=shift)

        label = f"add_norm {tokens} x {width}"
        given = bench, label, stock, fused, list(zip(xs, ys, strict=True)), 8 * tokens * width, smoke
        bench.attempt(label, partial(pointwise, *given))
        if not mlp:
            continue
        packed = [torch.randn(1, tokens, 2 * mlp, **kind) for _ in range(sets)]

        def stock_mlp(x: Tensor, passed: Tensor) -> Any:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([passed, nn.functional.silu(a) * b], dim=-1)

        def fused_mlp(x: Tensor, passed: Tensor) -> Any:
            return swiglu_concat(x, passed=passed)

        moved, label = 2 * tokens * (2 * width + 3 * mlp), f"SwiGLU behind {tokens} x {width} + {mlp}"
        given = bench, label, stock_mlp, fused_mlp, list(zip(packed, xs, strict=True)), moved, smoke
        bench.attempt(label, partial(pointwise, *given))
        del xs, ys, packed, given
        bench.release()


@torch.no_grad()
def pointwise(
    bench: Any,
    label: str,
    stock: Callable[..., Any],
    fused: Callable[..., Any],
    buffers: list[tuple[Tensor, Tensor]],
    moved: float,
    smoke: bool,
) -> list[str]:
    def seconds(function: Callable[..., Any]) -> float:
        return bench.graph(lambda i: function(*buffers[i]), len(buffers))

    times = {"eager": seconds(stock)}
    if not smoke:
        torch._dynamo.reset()
        times["compile"] = seconds(torch.compile(stock, dynamic=False))
    for backend in ("op",) if bench.device == "cpu" else ("cuda", "triton"):
        if bench.device == "cpu" or not kernel_backend.unavailable(backend):
            with using(backend):
                times["cuda" if backend == "op" else backend] = seconds(fused)
    bench.rows.append(row(label, "fwd", times, moved))
    Console().print("  ".join(bench.rows[-1]), highlight=False)
    return bench.rows[-1]
