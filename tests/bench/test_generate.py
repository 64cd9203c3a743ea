"""Generating for the bench: every source keeps its shape, and neither processes nor kills change a bit of an image."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from bench_cases import CALL, Suite, pixels
from PIL import Image
from tiny import random_image

from danceopd.bench import generate, run
from danceopd.bench.generate import GenerationLog
from danceopd.bench.run import BenchResult, bench
from danceopd.bench.suites.protocol import Item

SIZES = [(64, 64), (96, 64), (64, 64), (64, 96), (96, 64)]  # width, height


class Shapes(Suite):
    """Edits of sources of several sizes, some of them files; no prompts."""

    def __init__(self, folder: Path) -> None:
        self.sources = [random_image(n, *size) for n, size in enumerate(SIZES)]
        for n in (1, 2):
            self.sources[n].save(folder / f"{n}.png")
        self.sources[1:3] = [folder / "1.png", folder / "2.png"]

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return []

    def editing_items(self, limit: int | None = None) -> list[Item]:
        found = [
            Item(f"s{n}", "editing", "local", "cut", f"make it {colour}", None, source, None, None)
            for n, (source, colour) in enumerate(zip(self.sources, ("red", "blue", "green", "white", "black")))
        ]
        return found[:limit]

    def source_path(self, item: Item) -> str | None:
        return f"{item.category}/{item.key}_SRCIMG.png"


@pytest.mark.parametrize("batch", [1, 4])
def test_sources_of_every_shape_are_drawn_as_the_stock_pipeline_does(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(run, "load_suite", lambda name, **options: Shapes(tmp_path))
    found = bench(models / "student", "shapes", ["none"], tmp_path / "out", batch=batch)
    pipe = DiffusionPipeline.from_pretrained(models / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(models / "student")
    assert [r["key"] for r in found.rows] == [f"s{n}" for n in range(5)]
    for row, (width, height) in zip(found.rows, SIZES):
        source = Image.open(found.folder / row["source"])
        generator = torch.Generator().manual_seed(row["seed"])
        drawn = Image.open(found.folder / row["image"]).size  # the source's shape, with the area that is asked for
        assert drawn == {64: (64, 64) if width == 64 else (64, 48), 96: (48, 64)}[height]
        call = {**CALL, "width": drawn[0], "height": drawn[1], "guidance_scale": 1.0}
        stock = pipe(image=source, prompt=row["prompt"], generator=generator, **call).images[0]
        assert source.size == (width, height)
        assert np.abs(pixels(found.folder / row["image"]) - np.asarray(stock).astype(int)).max() <= 2
        beside = found.folder / "images" / "student" / "cut" / f"{row['key']}_SRCIMG.png"
        assert beside.read_bytes() == (found.folder / row["source"]).read_bytes()


def test_a_picture_that_is_lost_is_drawn_again_to_the_bit(models: Path, tmp_path: Path, monkeypatch) -> None:
    """In the company it had at first: two of a batch of three are still there, and stay."""
    monkeypatch.setattr(run, "load_suite", lambda name, **options: Suite())
    first = bench(models / "student", "dots", ["none"], tmp_path / "out", batch=3)
    lost, kept = (first.folder / first.rows[n]["image"] for n in (1, 0))
    before, time_ = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    again = bench(models / "student", "dots", ["none"], tmp_path / "out", batch=3)
    assert lost.read_bytes() == before and kept.stat().st_mtime_ns == time_
    assert again.rows == first.rows


def test_large_pictures_are_drawn_few_at_once() -> None:
    generator = generate.ImageGenerator.__new__(generate.ImageGenerator)
    generator.batch = None
    assert [generator._batch_size((side, side)) for side in (64, 256, 512, 1024, 4096)] == [64, 64, 16, 4, 1]
    generator.batch = 7
    assert generator._batch_size((4096, 4096)) == 7


def command(models: Path, output: Path) -> list[str]:
    """24 pictures of two models in batches of two, one process."""
    words = ["bench", str(models / "student"), "--against", "base", "--limit", "6"]
    return [*words, "--batch", "2", "-o", str(output)]


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """The bench of `command`, made by one process in one go."""
    return bench(models / "student", "scenes", ["base"], tmp_path_factory.mktemp("whole") / "out", limit=6, batch=2)


def same(folder: Path, whole: BenchResult) -> None:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and len({row["pixels_sha256"] for row in rows}) == 24
    assert rows == whole.rows
    found = json.loads((folder / "scores.json").read_text())
    assert found["models"] == whole.scores["models"]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(models: Path, whole: BenchResult, tmp_path: Path) -> None:
    """By torchrun itself."""
    two = ["--standalone", "--nproc-per-node", "2", "-m", "danceopd"]
    made = program.python("from torch.distributed import run\nrun.main()", *two, *command(models, tmp_path / "out"))
    assert made.wait() == 0, made.stderr[-4000:]
    assert made.stdout.count("report:") == 1, made.stdout  # by the first alone
    same(tmp_path / "out", whole)
    assert not list((tmp_path / "out").glob("drawn.*.jsonl"))
    assert len(GenerationLog(tmp_path / "out").read()) == 24


def test_processes_share_the_work_evenly(models: Path, tmp_path: Path, monkeypatch) -> None:
    """The batches of each of three processes: nothing twice, nothing left out."""
    seen = {}
    monkeypatch.setattr(run, "load_suite", lambda name, **options: Suite())
    monkeypatch.setattr(run.Bench, "_scored", lambda self, *rest: BenchResult(self.folder))
    for rank in range(3):
        batches: list = []
        collect = lambda self, found, *rest, batches=batches: batches.extend(found)  # noqa: E731
        monkeypatch.setattr(generate.ImageGenerator, "_generate", collect)
        monkeypatch.setattr(run, "Processes", lambda device, rank=rank: Three(rank))
        bench(models / "student", "dots", ["base"], tmp_path / str(rank), batch=1)
        seen[rank] = [(batch.model.name, batch.capability, batch.rows) for batch in batches]
    together = [batch for batches in seen.values() for batch in batches]
    assert len(together) == len(set(together)) == 2 * (4 + 3)
    assert sorted(len(batches) for batches in seen.values()) == [4, 5, 5]


class Three:
    """One of three processes, that the others never answer."""

    def __init__(self, rank: int) -> None:
        from danceopd.common.distributed import Processes

        alone = Processes("cpu")
        self.rank, self.world_size, self.is_main, self.device = rank, 3, True, alone.device
        self.main_first, self.broadcast, self.all_max = alone.main_first, alone.broadcast, alone.all_max
        self.watched = alone.watched


@pytest.mark.slow
def test_a_killed_bench_goes_on_and_draws_nothing_twice(models: Path, whole: BenchResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = program.start(*command(models, out))
    until = time.monotonic() + 120
    while len(GenerationLog(out).read()) < 5 and time.monotonic() < until:
        assert running.poll() is None, running.stderr
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    drawn = GenerationLog(out).read()
    assert 5 <= len(drawn) < 24 and not (out / "scores.json").exists()
    torn, theirs = out / "images/base/color_attr/.00.png.11704", out / "images/.theirs"
    for file in (torn, theirs):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    lines = (out / "drawn.0.jsonl").read_text().splitlines()
    times = {path: (out / path).stat().st_mtime_ns for path in (json.loads(line)["image"] for line in lines)}
    again = bench(models / "student", "scenes", ["base"], out, limit=6, batch=2)
    assert {path: (out / path).stat().st_mtime_ns for path in times} == times
    assert again.rows == whole.rows
    same(out, whole)
    assert {p for p in out.rglob(".*")} == {out / ".lock", theirs}
