"""What the fused kernels buy on a GPU: one command, under eight minutes, one table.

    python benchmarks/gpu.py kernels

Random data. Buffers rotate, so that together they exceed the L2 cache four times. Kernel times are medians of CUDA
graph replays, which hold no launch gaps; the whole forwards are medians of calls, launch gaps included, because that
is what a user waits for. Writes `benchmarks/results/gpu-<device>.md`. `--smoke` runs everything tiny on a CPU.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gpu_cores
import gpu_forwards
import torch
import typer
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from rich.console import Console
from torch import Tensor, nn

from danceopd.attention import choose, using
from danceopd.attention.front import add_norm, joint_qkv, swiglu_behind
from danceopd.attention.parts import Stream, table

RESULTS = Path(__file__).parent / "results"
Run = Callable[[int], Any]  # one call on the i-th set of buffers
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks that need a GPU."""


@dataclass
class Bench:
    """Where and how long to measure; collects rows."""

    device: str
    minutes: float
    rows: list[list[str]] = field(default_factory=list)
    walks: list[str] = field(default_factory=list)
    cores: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def release(self) -> None:
        """Give back what the last model or set of buffers took."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > 60 * self.minutes

    def graph(self, run: Run, sets: int, replays: int = 15) -> float:
        """Seconds of one call, from replays of a graph that makes one call on every set of buffers."""
        if self.device == "cpu":
            return self.calls(lambda: run(0), 2)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(3):
                run(i % sets)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(sets):
                run(i)
        for _ in range(3):
            graph.replay()
        return self.events(graph.replay, replays) / sets

    def calls(self, call: Callable[[], Any], repeats: int = 15) -> float:
        """Seconds of one call, launch gaps included."""
        for _ in range(2):
            call()
        if self.device != "cpu":
            return self.events(call, repeats)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    @staticmethod
    def events(call: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


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

    def leaves(self, i: int) -> list[Tensor]:
        image, text = self.sets[i]
        return [*image[: 3 if text else 2], *text]

    def stock(self, i: int) -> tuple[Tensor, ...]:
        """What diffusers' processors do, step by step."""
        shape, (image, text) = self.shape, self.sets[i]
        halves = []
        for (q, k, v), norms in ((image, self.norms[:2]), *(((text, self.norms[2:]),) if text else ())):
            q, k, v = (x.unflatten(-1, (-1, shape.dim)) for x in (q, k, v))
            halves.append([norms[0](q), norms[1](k), v])
        if shape.rope == "complex" and text:
            tables = self.complex[shape.text :], self.complex[: shape.text]
            halves = [[self.turn(x, t) for x in half[:2]] + half[2:] for half, t in zip(halves, tables)]
        if len(halves) == 1:
            q, k, v = halves[0]
        else:
            order = halves[::-1] if shape.text_first else halves
            q, k, v = (torch.cat([half[j] for half in order], dim=1) for j in range(3))
        if shape.rope == "real":
            q, k = (apply_rotary_emb(x, self.real, sequence_dim=1) for x in (q, k))
        elif shape.rope == "complex" and not text:
            q, k = self.turn(q, self.complex), self.turn(k, self.complex)
        return q, k, v

    @staticmethod
    def turn(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs[:, None]).flatten(3).type_as(x)

    def fused(self, i: int) -> tuple[Tensor, ...]:
        shape, (image, text) = self.shape, self.sets[i]
        weights = [norm.weight for norm in self.norms]
        cos, sin = self.real if shape.rope == "real" else (table(self.complex), None) if shape.rope else (None, None)
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
            return torch.autograd.grad(out, self.leaves(i), self.grads[: len(out)])

        return call


def segments(bench: Bench, sizes: Sequence[int], smoke: bool) -> None:
    """Forward, and forward with backward: eager, compiled, fused; microseconds, gain, bandwidth."""
    for shape in SHAPES:
        for size in sizes:
            for sources in (0,) if shape.model == "SD3.5-M" or smoke else (0, 1):
                if bench.late:
                    return
                image = (size // 16) ** 2 * (1 + sources) + (224 if shape.model == "Z-Image" else 0)
                for grad in (False, True):
                    sets = 1 if smoke else max(2, -(-256_000_000 // (3 * image * shape.heads * shape.dim * 2)))
                    segment = Segment(shape, image, bench.device, sets, grad)
                    wrap = segment.both_ways if grad else (lambda run: run)
                    with torch.set_grad_enabled(grad):
                        times = ways(bench, segment, wrap, sets, smoke)
                    moved = segment.bytes * (2.67 if grad else 1)  # backward reads five tensors and writes three
                    label = f"{shape.model} {size} px" + (" + source" if sources else "")
                    bench.rows.append(row(label, "fwd + bwd" if grad else "fwd", times, moved))
                    Console().print("  ".join(bench.rows[-1]), highlight=False)
                    del segment
                    bench.release()


def ways(bench: Bench, segment: Segment, wrap: Callable[[Any], Run], sets: int, smoke: bool) -> dict[str, float]:
    found = {"eager": bench.graph(wrap(segment.stock), sets)}
    if not smoke:
        torch._dynamo.reset()
        found["compile"] = bench.graph(wrap(torch.compile(segment.stock, dynamic=False)), min(sets, 8))
    for backend in ("cuda", "triton"):
        if not choose.missing(backend) and bench.device != "cpu":
            with using(backend):
                found[backend] = bench.graph(wrap(segment.fused), sets)
    if bench.device == "cpu":
        with using("op"):
            found["cuda"] = bench.graph(wrap(segment.fused), sets)
    return found


def row(label: str, what: str, times: dict[str, float], moved: float) -> list[str]:
    us = [f"{1e6 * times[name]:.1f}" if name in times else "" for name in ("eager", "compile", "cuda", "triton")]
    best = times.get("cuda", times.get("triton", float("nan")))
    gains = [f"{times[name] / best:.2f}x" if name in times else "" for name in ("eager", "compile")]
    return [label, what, *us, *gains, f"{moved / best / 1e12:.2f}"]


# Rows of hidden states


def sites(bench: Bench, smoke: bool) -> None:
    """A norm site with its gate, and the SwiGLU of a parallel block; forward only."""
    for tokens, width, mlp in ((16, 64, 64),) if smoke else ((4608, 3072, 9216), (4320, 3840, 10240), (1357, 1536, 0)):
        if bench.late:
            return
        kind = {"device": bench.device, "dtype": torch.bfloat16}
        sets = 1 if smoke else max(2, -(-256_000_000 // (4 * tokens * width)))
        xs, ys = ([torch.randn(1, tokens, width, **kind) for _ in range(sets)] for _ in "xy")
        gate, scale, shift = (torch.randn(1, 1, width, **kind) for _ in range(3))

        def stock(i: int, xs=xs, ys=ys, gate=gate, scale=scale, shift=shift, width=width) -> Any:
            x = xs[i] + gate * ys[i]
            return x, nn.functional.layer_norm(x, (width,)) * (1 + scale) + shift

        def fused(i: int, xs=xs, ys=ys, gate=gate, scale=scale, shift=shift) -> Any:
            return add_norm(xs[i], ys[i], gate, scale=scale, shift=shift)

        pointwise(bench, f"norm site {tokens} x {width}", stock, fused, sets, 8 * tokens * width, smoke)
        if not mlp:
            continue
        packed = [torch.randn(1, tokens, 2 * mlp, **kind) for _ in range(sets)]

        def stock_mlp(i: int, packed=packed, xs=xs) -> Any:
            a, b = packed[i].chunk(2, dim=-1)
            return torch.cat([xs[i], nn.functional.silu(a) * b], dim=-1)

        def fused_mlp(i: int, packed=packed, xs=xs) -> Any:
            return swiglu_behind(packed[i], passed=xs[i])

        moved = 2 * tokens * (2 * width + 3 * mlp)
        pointwise(bench, f"SwiGLU behind {tokens} x {width} + {mlp}", stock_mlp, fused_mlp, sets, moved, smoke)
        del xs, ys, packed
        bench.release()


def pointwise(bench: Bench, label: str, stock: Run, fused: Run, sets: int, moved: float, smoke: bool) -> None:
    with torch.no_grad():
        times = {"eager": bench.graph(stock, sets)}
        if not smoke:
            torch._dynamo.reset()
            times["compile"] = bench.graph(torch.compile(stock, dynamic=False), min(sets, 8))
        for backend in ("op",) if bench.device == "cpu" else ("cuda", "triton"):
            if bench.device == "cpu" or not choose.missing(backend):
                with using(backend):
                    times["cuda" if backend == "op" else backend] = bench.graph(fused, sets)
    bench.rows.append(row(label, "fwd", times, moved))
    Console().print("  ".join(bench.rows[-1]), highlight=False)


def copy_speed(bench: Bench) -> float:
    """TB/s of a device-to-device copy, bytes read and written: the ceiling here."""
    size = 1 << (16 if bench.device == "cpu" else 32)
    a, b = (torch.empty(size, dtype=torch.uint8, device=bench.device).random_() for _ in range(2))
    return 2 * size / bench.calls(lambda: b.copy_(a)) / 1e12


HEAD = "what | pass | eager | compiled | CUDA (forwards: fused) | Triton (forwards: fused, graph)"
HEAD += " | against eager | against compiled | TB/s"


def write(bench: Bench, output: Path, device: str, ceiling: float) -> None:
    lines = [
        f"# Fused kernels on {device}",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, bf16, batch 1, random data. "
        f"Device-to-device copy: {ceiling:.2f} TB/s. Microseconds unless a row says otherwise.",
        "",
        f"| {HEAD} |",
        "|" + " --- |" * len(HEAD.split(" | ")),
        *(f"| {' | '.join(row)} |" for row in bench.rows),
        "",
        "TB/s counts each input read once and each output written once, over the CUDA time.",
        *(["", f"| {gpu_forwards.HEAD} |", "|" + " --- |" * len(gpu_forwards.HEAD.split(" | ")), *bench.walks]),
        *(["", f"| {gpu_cores.HEAD} |", "|" + " --- |" * len(gpu_cores.HEAD.split(" | ")), *bench.cores]),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


@app.command()
def kernels(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: results/gpu-<device>.md.")] = None,
    minutes: Annotated[float, typer.Option(help="Start nothing new after so long.")] = 6.5,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, on a CPU: checks this program.")] = False,
) -> None:
    """The segment before attention, norm sites, SwiGLU, no-gradient forwards, steps of a walk, attention cores."""
    if not smoke and not torch.cuda.is_available():
        typer.echo("error: there is no CUDA device here; --smoke checks the benchmark itself", err=True)
        raise typer.Exit(2)
    device = "a CPU, tiny sizes: no figure here means anything" if smoke else torch.cuda.get_device_name()
    bench = Bench("cpu" if smoke else "cuda", minutes)
    torch.manual_seed(0)
    ceiling = copy_speed(bench)
    sizes = (64,) if smoke else (512, 1024)
    place = output or RESULTS / f"gpu-{device.lower().replace(' ', '-')}.md"
    for part in (segments, gpu_forwards.forwards):
        part(bench, sizes, smoke)
        write(bench, place, device, ceiling)  # what is measured stays, whatever happens later
    gpu_forwards.walks(bench, sizes, smoke)
    sites(bench, smoke)
    bench.cores = gpu_cores.measure(bench, sizes, smoke)
    write(bench, place, device, ceiling)
    typer.echo(place)


if __name__ == "__main__":
    app()
