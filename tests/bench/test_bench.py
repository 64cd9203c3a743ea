"""The bench: the stock pipeline's pictures, the same noise for everybody, numbers that can be checked by hand."""

from __future__ import annotations

import hashlib
import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_cases import CALL, Suite, pixels
from PIL import Image
from rich.console import Console

from danceopd.adapters.header import WEIGHTS
from danceopd.bench import run, statistics
from danceopd.bench.options import BlendOptions
from danceopd.bench.report.table import print_table
from danceopd.bench.run import bench
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheap suite, under the name `dots`."""
    found = run.load_suite
    monkeypatch.setattr(run, "load_suite", lambda name, **options: Suite() if name == "dots" else found(name))


@pytest.mark.parametrize("model", ["base", "student", "editing"])
def test_pictures_are_those_of_the_stock_pipeline(models: Path, result, model: str) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(models / "base")
    pipe.set_progress_bar_config(disable=True)
    if model != "base":
        pipe.load_lora_weights(models / {"student": "student", "editing": "edits"}[model], weight_name=WEIGHTS)
    for row in (r for r in result.rows if r["model"] == model and r["key"] in ("g1", "e2")):
        more = {"image": Image.open(result.folder / row["source"])} if row["capability"] == "editing" else {}
        generator = torch.Generator().manual_seed(row["seed"])
        stock = pipe(prompt=row["prompt"], generator=generator, guidance_scale=1.0, **CALL, **more).images[0]
        assert np.abs(pixels(result.folder / row["image"]) - np.asarray(stock).astype(int)).max() <= 2


def test_models_share_the_noise_and_differ_in_the_picture(result) -> None:
    for key in {row["key"] for row in result.rows}:
        rows = [row for row in result.rows if row["key"] == key]
        assert len(rows) == 5 and len({row["seed"] for row in rows}) == 1
        assert len({row["pixels_sha256"] for row in rows}) == 5


def test_an_item_has_the_same_picture_whatever_the_batch_and_the_limit(models: Path, result, tmp_path: Path) -> None:
    few = bench(models / "student", "dots", ["none"], tmp_path / "few", limit=2, batch=1)
    many = {r["key"]: r for r in result.rows if r["model"] == "student"}
    assert sorted(r["key"] for r in few.rows) == ["e0", "e1", "g0", "g1"]
    for row in few.rows:
        assert np.abs(pixels(few.folder / row["image"]) - pixels(result.folder / many[row["key"]]["image"])).max() <= 1
    assert (
        bench(models / "student", "dots", ["none"], tmp_path / "other", limit=1, seed=1).rows[0]["seed"]
        != few.rows[0]["seed"]
    )


def test_scores_name_what_was_scored(models: Path, result) -> None:
    scores = json.loads((result.folder / "scores.json").read_text())
    assert [m["name"] for m in scores["models"]] == ["base", "generation", "editing", "blend", "student"]
    assert [m["role"] for m in scores["models"]] == ["base", "teacher", "teacher", "blend", "student"]
    digest = hashlib.sha256((models / "student" / WEIGHTS).read_bytes()).hexdigest()
    assert scores["models"][-1]["sha256"] == digest
    assert scores["call"] == {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 48}
    assert {k: scores["suite"][k] for k in ("name", "version", "protocol")} == {
        "name": "dots",
        "version": "1",
        "protocol": "00" * 32,
    }
    mine = [r["score"] for r in result.rows if r["model"] == "student" and r["category"] == "cut" and not r["probe"]]
    assert scores["models"][-1]["editing"]["categories"]["cut"]["mean"] == pytest.approx(np.mean(mine), abs=1e-5)
    assert scores["probes"]["odd"]["models"]["student"]["n"] == 1
    edits = [r for r in result.rows if r["model"] == "student" and r["capability"] == "editing" and not r["probe"]]
    right = {c: np.mean([r["correct"] for r in edits if r["category"] == c]) for c in ("cut", "paint")}
    exact = scores["models"][-1]["editing"]["exact"]
    assert {c: figure["mean"] for c, figure in exact["categories"].items()} == pytest.approx(right, abs=1e-5)
    assert "exact" not in scores["models"][-1]["generation"] and scores["suite"]["exact"] == ["editing"]
    assert {"odd", "odd, all facts right"} == set(scores["probes"])
    compared = scores["comparison"]["editing"]["exact"]["deltas"]["base"]
    base = scores["models"][0]["editing"]["exact"]["overall"]["mean"]
    assert compared["mean"] == pytest.approx(exact["overall"]["mean"] - base, abs=1e-5)
    assert (result.folder / "images" / "source" / "cut" / "e0_SRCIMG.png").is_file()
    assert len((result.folder / "samples.jsonl").read_text().splitlines()) == len(result.rows) == 5 * 8


def test_an_interrupted_bench_continues_and_draws_nothing_twice(models: Path, tmp_path: Path) -> None:
    first = bench(models / "student", "dots", ["base"], tmp_path / "out")
    lines = (first.folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (first.folder / "samples.jsonl").write_text("".join(lines[:9]) + lines[9][:40])
    (first.folder / "scores.json").unlink()
    kept = {row["image"]: (first.folder / row["image"]).stat().st_mtime_ns for row in map(json.loads, lines[:9])}
    again = bench(models / "student", "dots", ["base"], tmp_path / "out")
    assert {k: (again.folder / k).stat().st_mtime_ns for k in kept} == kept
    assert [(r["model"], r["key"], r["score"]) for r in again.rows] == [
        (r["model"], r["key"], r["score"]) for r in first.rows
    ]
    assert again.scores["models"] == first.scores["models"]


def test_the_same_weights_are_drawn_once(models: Path, tmp_path: Path) -> None:
    recipe = Recipe(base=str(models / "base"), generation="base", editing=str(models / "edits"))
    found = bench(models / "student", "dots", output=tmp_path / "out", recipe=recipe)
    rows = {m: [r for r in found.rows if r["model"] == m] for m in ("base", "generation")}
    assert [r["image"] for r in rows["base"]] == [r["image"] for r in rows["generation"]]
    assert [r["score"] for r in rows["base"]] == [r["score"] for r in rows["generation"]]
    assert (
        found.scores["comparison"]["generation"]["gap_closed"]["share"] is None
        or found.scores["comparison"]["generation"]["gap_closed"]["teacher"] == "editing"
    )


def test_blends_by_method_and_by_the_teachers_names(models: Path) -> None:
    """Each method makes its own blend, with the weights that each teacher was given."""
    from danceopd.adapters.blend import blend
    from danceopd.bench.lineup import build_lineup

    shares = {"editing": 0.9, "generation": 0.7}
    found = build_lineup(models / "student", ["blend"], shares, blend_methods=["linear", "ties"])
    assert [m.label for m in found.models[:-1]] == ["blend 0.7/0.9", "ties 0.7/0.9"]
    parts = [m.adapter for m in build_lineup(models / "student", ["teachers"]).models[:-1]]
    held = [(part, w) for part, w in zip(parts, (0.7, 0.9)) if part is not None]
    for model, method in zip(found.models, ("linear", "ties")):
        assert model.sha256 == blend([p for p, _ in held], [w for _, w in held], method=method).sha256
    assert found.models[0].sha256 != found.models[1].sha256


def test_blends_are_tried_and_the_best_one_stands_in_the_table(models: Path, tmp_path: Path) -> None:
    found = bench(models / "student", "dots", ["teachers"], tmp_path / "out", limit=2, blends=BlendOptions((0.3, 1.0)))
    grid = found.scores["blend_grid"]
    assert [b["weights"] for b in grid] == [[0.3, 0.7], [1.0, 0.0]] and sum(b["best"] for b in grid) == 1
    assert [m["role"] for m in found.scores["models"]] == ["teacher", "teacher", "blend", "student"]
    whole = [r for r in found.rows if r["model"] == "blend-1-0"]
    teacher = {r["key"]: r for r in found.rows if r["model"] == "generation"}
    for row in whole:  # the blend of weight 1 is the teacher itself
        assert (
            np.abs(pixels(found.folder / row["image"]) - pixels(found.folder / teacher[row["key"]]["image"])).max() <= 1
        )


def test_a_fused_pipeline_draws_what_its_lora_draws(models: Path, result, tmp_path: Path) -> None:
    from danceopd.adapters.fuse import fuse

    fuse(models / "student", tmp_path / "fused", base=models / "base")
    found = bench(tmp_path / "fused", "dots", ["base"], tmp_path / "out", limit=2)
    mine = {r["key"]: r for r in result.rows if r["model"] == "student"}
    rows = [r for r in found.rows if r["model"] == "student"]
    assert len(rows) == 4
    for row in rows:
        assert (
            np.abs(pixels(found.folder / row["image"]) - pixels(result.folder / mine[row["key"]]["image"])).max() <= 2
        )


def test_the_real_suite_runs_end_to_end(models: Path, tmp_path: Path) -> None:
    found = bench(models / "student", "scenes", ["base"], tmp_path / "out", limit=6)
    student = found.scores["models"][-1]
    assert len(student["generation"]["categories"]) == len(student["editing"]["categories"]) == 6
    assert 0 <= student["editing"]["overall"]["mean"] <= 10
    assert found.scores["ceiling"]["generation"]["overall"] <= 1
    assert found.report.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suite": "scene"}, "did you mean 'scenes'"),
        ({"against": ["edting"]}, "did you mean 'editing'"),
        ({"against": ["./nowhere"]}, "neither a model nor an existing path"),
        ({"against": ["blend:a"]}, "blend:0.50/0.50"),
        ({"blends": BlendOptions(methods=["tie"])}, "no blend method 'tie'; did you mean 'ties'"),
        ({"blends": BlendOptions({"generation": 1.0})}, "--blend-weights lacks editing"),
        ({"blends": BlendOptions({"edting": 1.0})}, "'edting' is no teacher; did you mean 'editing'"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_input_is_one_sentence(models: Path, tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench(models / "student", **{"suite": "dots", "output": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_a_missing_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody"):
        bench(tmp_path / "nobody", "dots", output=tmp_path / "out")


def test_another_bench_or_foreign_files_are_left_alone(models: Path, result, tmp_path: Path) -> None:
    before = (result.folder / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match="another bench .*seed"):
        bench(models / "student", "dots", output=result.folder, seed=5)
    assert (result.folder / "samples.jsonl").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a bench"):
        bench(models / "student", "dots", output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def rows_of(**scores: list[float]) -> list[dict]:
    """Rows of one editing category a model, `model=[…]`; the items are the positions."""
    return [
        {"model": m, "capability": "editing", "category": "cut", "key": str(n), "score": s, "probe": None}
        for m, values in scores.items()
        for n, s in enumerate(values)
    ]


def test_means_and_intervals() -> None:
    share = statistics.mean([1, 1, 1, 0], share=True)
    assert share["mean"] == 0.75 and share["low"] == pytest.approx(0.3006, abs=1e-3)  # Wilson's, from his formula
    assert statistics.mean([1.0] * 8, share=True)["low"] < 0.7  # eight right ones are no proof of perfection
    assert statistics.macro([[1, 1, 1, 1], [0, 0]], share=True)["mean"] == 0.5  # of categories, not of items
    spread = statistics.mean([2.0, 4.0, 6.0, 8.0] * 10, share=False)
    assert spread["low"] == pytest.approx(5 - 1.96 * 2.236 / 40**0.5, abs=0.1)


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 8, 60)
    rows = rows_of(student=list(hard + 0.5 + rng.normal(0, 0.1, 60)), base=list(hard))
    found = statistics.delta(rows, "student", "base", "editing")
    assert found is not None and 0.4 < found["low"] < found["mean"] < found["high"] < 0.6
    assert (found["wins"], found["losses"]) == (60, 0)
    assert statistics.delta(rows, "base", "student", "editing")["mean"] == -found["mean"]


def test_gap_closed() -> None:
    rows = rows_of(base=[2.0] * 9, teacher=[8.0] * 9, student=[6.5] * 9)
    found = statistics.gap_closed(rows, "student", "base", "teacher", "editing")
    assert found == {"share": 0.75, "low": 0.75, "high": 0.75, "teacher": "teacher"}
    assert statistics.gap_closed(rows, "student", "teacher", "base", "editing")["share"] is None


def test_the_table_fits_and_is_plain_when_piped(result) -> None:
    piped = StringIO()
    print_table(result.scores, Console(file=piped, width=80))
    lines = piped.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in piped.getvalue()
    assert sum(line.startswith("student") for line in lines) == 3  # generation, editing, edits with all facts right
    assert "Editing (share with all facts right)" in lines
    assert any("gap closed" in line for line in lines)
    coloured = StringIO()
    print_table(result.scores, Console(file=coloured, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[1;35mstudent" in coloured.getvalue()


def test_progress_counts_to_the_end(models: Path, tmp_path: Path) -> None:
    seen = SimpleNamespace(calls=[])
    bench(
        models / "student", "dots", ["base"], tmp_path / "out", limit=2, progress=lambda *step: seen.calls.append(step)
    )
    for phase in ("generating", "scoring"):
        counts = [done for done, total, what in seen.calls if total == 8 and what.startswith(phase)]
        assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 8)


def test_a_figure_that_is_not_finite_is_a_dash(result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report reads scores.json back: NaN is null there, not text."""
    made = {"student": result.folder / "images" / "student"}
    monkeypatch.setattr(run, "image_sets", lambda rows, models, folder: {"student": {"constant": math.nan, "n": 7}})
    found = bench(suite="dots", images=made, output=tmp_path / "out")
    assert json.loads((found.folder / "scores.json").read_text())["pictures"]["student"] == {"constant": None, "n": 7}
    assert found.report.is_file()
