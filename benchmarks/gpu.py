"""What a GPU shows of danceopd: three commands, each under nine minutes, in the order of what they tell.

    python benchmarks/gpu.py real_merge -o merge.md     whole merges at true size: time, memory against the plan, export
    python benchmarks/gpu.py rightness -o right.md      the GPU tests, and compute-sanitizer over the kernels' tests
    python benchmarks/gpu.py kernels -o kernels.md      whole forwards, rollout steps, attention, the kernels alone

Random data. Inputs and outputs rotate, so that together they exceed the L2 cache four times. Kernel times are medians
of CUDA graph replays, without launch gaps; whole forwards are medians of calls, launch gaps included, because that is
what a user waits for. Each part has its share of the time and leaves the rest to the next; a line that fails is listed
below the tables and does not stop the others. Files are written after every line, without `-o` to
`benchmarks/results/`. `--smoke` runs everything tiny on a CPU.
"""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gpu_attention
import gpu_forwards
import gpu_merge
import gpu_segments
import torch
import typer
from rich.console import Console

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
    merges: list[str] = field(default_factory=list)
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


# What runs, and the share of the time at which it begins nothing new: what a user waits for first.
PARTS: tuple[tuple[Callable[..., None], float], ...] = (
    (gpu_forwards.forwards, 0.4),
    (gpu_forwards.rollout_steps, 0.55),
    (gpu_attention.measure, 0.62),
    (gpu_segments.norms, 0.7),
    (gpu_segments.segments, 1.0),
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
        *_failed(bench),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bench(minutes: float, smoke: bool, output: Path | None, name: str) -> tuple[Bench, str, Path]:
    """The bench, the device in words, and where to write; ends with 2 without a GPU."""
    if not smoke and not torch.cuda.is_available():
        typer.echo("error: there is no CUDA device here; --smoke checks the benchmark itself", err=True)
        raise typer.Exit(2)
    device = "a CPU, tiny sizes: no figure here means anything" if smoke else torch.cuda.get_device_name()
    torch.manual_seed(0)
    place = output or RESULTS / f"{name}-{device.lower().replace(' ', '-')}.md"
    place.parent.mkdir(parents=True, exist_ok=True)
    return Bench("cpu" if smoke else "cuda", minutes), device, place


def _failed(bench: Bench) -> list[str]:
    return ["", "Not measured:", "", *(f"- {line}" for line in bench.failures)] if bench.failures else []


Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the table.")]
Minutes = Annotated[float, typer.Option(help="Start nothing new after so long.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny, on a CPU: checks this program.")]


@app.command("real_merge")
def real_merge(
    output: Output = None, minutes: Minutes = 6.5, smoke: Smoke = False,
    folder: Annotated[Path | None, typer.Option(help="A folder on a local disk with 20 GB.")] = None,
) -> None:  # fmt: skip
    """Merges of klein-4B at its true size with random weights: time, peak memory against the plan, the export."""
    bench, device, place = _bench(minutes, smoke, output, "merge")
    about = f"torch {torch.__version__}, batch {gpu_merge.BATCH}, {gpu_merge.UPDATES} updates, random weights."

    def save() -> None:
        table = _table(gpu_merge.HEAD, bench.merges)
        place.write_text("\n".join([f"# Merges on {device}", "", about, "", *table, *_failed(bench), ""]))

    bench.save = save
    gpu_merge.real_merge(bench, smoke, folder)
    save()
    typer.echo(place)
    if smoke and bench.failures:
        raise typer.Exit(1)


@app.command()
def rightness(output: Output = None, minutes: Minutes = 8.0, smoke: Smoke = False) -> None:
    """The tests in tests/gpu, and compute-sanitizer's memcheck and racecheck over those of the kernels."""
    bench, device, place = _bench(minutes, smoke, output, "rightness")
    tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")]
    runs = {"tests/gpu": tests}
    if (sanitizer := shutil.which("compute-sanitizer")) is not None:
        few = [*tests[:-1], str(ROOT / "tests" / "gpu" / "test_kernels_gpu.py"), "-k", "cuda and bf16"]
        for tool in ("memcheck", "racecheck"):
            runs[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *few]
    else:
        bench.failures.append("compute-sanitizer is not installed here")
    lines = [f"# Rightness on {device}", "", f"torch {torch.__version__}", ""]
    for name, command in runs.items():
        left = 60 * minutes - (time.monotonic() - bench.started)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1), cwd=ROOT)
            said, status = (done.stdout + done.stderr).strip().splitlines()[-12:], done.returncode
        except subprocess.TimeoutExpired:
            said, status = ["the time was over"], 1
        if status:
            bench.failures.append(f"{name} ended with status {status}")
        lines += [f"## {name}: status {status}", "", *(f"    {line}" for line in said), ""]
        place.write_text("\n".join([*lines, *_failed(bench), ""]))
    typer.echo(place)
    raise typer.Exit(int(any("status" in line for line in bench.failures)))


@app.command()
def kernels(
    output: Output = None,
    minutes: Minutes = 7.0,
    smoke: Smoke = False,
) -> None:
    """q, k, v before attention, adaptive norms, SwiGLU, no-gradient forwards, rollout steps, attention backends."""
    bench, device, place = _bench(minutes, smoke, output, "gpu")
    ceiling = copy_speed(bench)
    sizes = (64,) if smoke else (512, 1024)
    bench.save = lambda: write(bench, place, device, ceiling)  # what is measured stays, whatever happens later
    for part, bench.share in PARTS:
        bench.attempt(part.__name__, partial(part, bench, sizes, smoke))
        bench.release()
    typer.echo(place)
    if smoke and bench.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
