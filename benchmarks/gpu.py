"""How much faster the fused kernels are on a GPU: one command, under eight minutes, one table.

    python benchmarks/gpu.py kernels

Random data. Inputs and outputs rotate, so that together they exceed the L2 cache four times. Kernel times are medians
of CUDA graph replays, without launch gaps; whole forwards are medians of calls, launch gaps included, because that is
what a user waits for. Each part has its share of the time and leaves the rest to the next; a line that fails is listed
below the tables and does not stop the others. Writes `benchmarks/results/gpu-<device>.md` after every line. `--smoke`
runs everything tiny on a CPU.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gpu_attention
import gpu_forwards
import gpu_segments
import torch
import typer
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
Run = Callable[[int], Any]  # one call on the i-th set of buffers
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks that need a GPU."""


@dataclass
class Bench:
    """Where and how long to measure; collects rows. `save` writes what there is."""

    device: str
    minutes: float
    rows: list[list[str]] = field(default_factory=list)
    rollout_steps: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    share: float = 1.0
    save: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Give back what the last model or set of buffers took."""
        gc.collect()
        if self.device != "cpu":
            with suppress(RuntimeError):  # of a kernel that failed before; it is reported already
                torch.cuda.empty_cache()

    @property
    def late(self) -> bool:
        """Whether the time is over, up to the share that the present part may fill."""
        return time.monotonic() - self.started > 60 * self.minutes * self.share

    def attempt(self, label: str, measure: Callable[[], Any]) -> Any:
        """The result of `measure`; None if it fails, which is listed below the tables."""
        found = None
        try:
            found = measure()
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0][:200]
            self.failures.append(f"{label}: {type(error).__name__}: {line}")
            Console().print(self.failures[-1], highlight=False, markup=False)
        if found is None:
            self.release()
        self.save()
        return found

    def graph(self, run: Run, sets: int, replays: int = 15) -> float:
        """Seconds of one call, from replays of a graph that makes one call on every set of buffers."""
        if self.device == "cpu":
            return self.calls(lambda: run(0), 2)
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for i in range(3):
                run(i % sets)
            torch.cuda.set_sync_debug_mode("error")  # one that waits ends here; inside a capture it would harm the rest
            try:
                run(0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = [run(i) for i in range(sets)]  # all kept, or every call would write to the same memory
        finally:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own stream current
        for _ in range(3):
            graph.replay()
        seconds = self.events(graph.replay, replays) / sets
        del kept
        return seconds

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


def copy_speed(bench: Bench) -> float:
    """TB/s of a device-to-device copy, bytes read and written: the ceiling here."""
    size = 1 << (16 if bench.device == "cpu" else 32)
    a, b = (torch.empty(size, dtype=torch.uint8, device=bench.device).random_() for _ in range(2))
    return 2 * size / bench.calls(lambda: b.copy_(a)) / 1e12


# What runs, and the share of the time at which it begins nothing new; the cheap first: compilers eat what they get.
PARTS: tuple[tuple[Callable[..., None], float], ...] = (
    (gpu_attention.measure, 0.12),
    (gpu_segments.norms, 0.2),
    (gpu_segments.segments, 0.6),
    (gpu_forwards.forwards, 0.9),
    (gpu_forwards.rollout_steps, 1.0),
)
HEAD = "what | pass | eager | compiled | CUDA (forwards: fused) | Triton (forwards: fused, graph)"
HEAD += " | against eager | against compiled | TB/s"


def _table(head: str, rows: list[str]) -> list[str]:
    """A Markdown table as lines; `rows` are lines already."""
    return [f"| {head} |", "|" + " --- |" * len(head.split(" | ")), *rows]


def write(bench: Bench, output: Path, device: str, ceiling: float) -> None:
    lines = [
        f"# Fused kernels on {device}",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, bf16, batch 1, random data. "
        f"Device-to-device copy: {ceiling:.2f} TB/s. Microseconds unless a row says otherwise.",
        "",
        *_table(HEAD, [f"| {' | '.join(row)} |" for row in bench.rows]),
        "",
        "TB/s counts each input read once and each output written once, over the CUDA time.",
        "",
        *_table(gpu_forwards.HEAD, bench.rollout_steps),
        "",
        *_table(gpu_attention.HEAD, bench.attention),
        *(["", "Not measured:", "", *(f"- {line}" for line in bench.failures)] if bench.failures else []),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


@app.command()
def kernels(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: results/gpu-<device>.md.")] = None,
    minutes: Annotated[float, typer.Option(help="Start nothing new after so long.")] = 7.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, on a CPU: checks this program.")] = False,
) -> None:
    """q, k, v before attention, adaptive norms, SwiGLU, no-gradient forwards, rollout steps, attention backends."""
    if not smoke and not torch.cuda.is_available():
        typer.echo("error: there is no CUDA device here; --smoke checks the benchmark itself", err=True)
        raise typer.Exit(2)
    device = "a CPU, tiny sizes: no figure here means anything" if smoke else torch.cuda.get_device_name()
    bench = Bench("cpu" if smoke else "cuda", minutes)
    torch.manual_seed(0)
    ceiling = copy_speed(bench)
    sizes = (64,) if smoke else (512, 1024)
    place = output or RESULTS / f"gpu-{device.lower().replace(' ', '-')}.md"
    bench.save = lambda: write(bench, place, device, ceiling)  # what is measured stays, whatever happens later
    for part, bench.share in PARTS:
        bench.attempt(part.__name__, partial(part, bench, sizes, smoke))
        bench.release()
    typer.echo(place)
    if smoke and bench.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
