"""Evidence beside the scores: the worst by name, drift and diversity, a second judge, what the report says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bench_cases import Suite
from browser import Page
from PIL import Image
from report_folders import judged, scenes, write

from danceopd.bench import run as bench_run
from danceopd.bench.evidence import drift
from danceopd.bench.evidence.worst import worst
from danceopd.bench.options import JudgeOptions, SuiteOptions
from danceopd.bench.report.items import items_of
from danceopd.bench.report.report import page, report
from danceopd.bench.report.thumbnails import Thumbnails
from danceopd.bench.report.training import GRIDS, training_samples
from danceopd.bench.results import BenchResult, load
from danceopd.bench.run import Bench, bench
from danceopd.bench.suites.folder import Suite as Folder
from danceopd.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"), each=6)


def test_the_worst_items_and_words_stand_by_name(folder: Path) -> None:
    scores, rows = load(folder)
    stars = {row["key"] for row in rows if "star" in row["prompt"] and row["capability"] == "generation"}
    assert 6 <= len(stars) < 20
    for row in rows:
        if row["capability"] == "generation":
            row["score"] = float(row["model"] != "student" or row["key"] not in stars)
    found = worst(scores, items_of(scores, rows))["generation"]
    assert found["words"][0]["name"].split(", ")[0] in ("star", "stars") and found["words"][0]["mean"] == -1.0
    assert len(found["items"]) == 5 and all("star" in item["prompt"] for item in found["items"])
    assert found["against"] == "the best teacher of each category"
    html = page(scores, rows, Thumbnails(folder), 0)
    assert "Generation: worst items" in html and "Generation: words with the largest losses" in html
    for row in rows:
        row["score"] = 1.0
    nothing = worst(scores, items_of(scores, rows))["generation"]
    assert nothing["items"] == nothing["words"] == []


def test_sample_grids_of_the_run_are_copied_small(folder: Path, tmp_path: Path) -> None:
    assert training_samples(None, tmp_path) == [] == training_samples(tmp_path, tmp_path)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for step in range(0, 100, 10):
        Image.new("RGB", (2000, 900), (step, 0, 0)).save(tmp_path / "run" / "samples" / f"step-{step:06d}.png")
    (tmp_path / "run" / "samples" / "step-000095.png").write_bytes(b"no picture")
    found = training_samples(tmp_path / "run", tmp_path)
    steps = [grid["step"] for grid in found]
    assert steps[0] == 0 and len(found) == GRIDS - 1  # the last one is damaged
    with Image.open(tmp_path / found[1]["image"]) as copy:
        assert copy.size == (1280, 576)


def test_distances_are_zero_for_equal_images_and_grow() -> None:
    rng = np.random.default_rng(0)
    one = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    noisy = Image.fromarray((np.asarray(one) * 0.5 + rng.integers(0, 120, (64, 64, 3))).astype(np.uint8))
    other = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    for distance in (drift.structure, drift.colour):
        assert abs(distance(one, one)) < 1e-6 < distance(one, noisy) < 1
    assert drift.structure(one, noisy) < drift.structure(one, other)
    assert drift.colour(Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "white")) == pytest.approx(1)
    assert drift.structure(one, other.resize((32, 32))) > 0.5  # of another size


def test_prompts_of_drift(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\na cat\n")
    items = drift.drift_items(str(file), Suite())
    assert [item.prompt for item in items] == ["a cat"] * 4 + ["a dog"] * 4 and len({i.id for i in items}) == 8
    file.write_text("\n \n")
    for given, words in ((str(file), "has 0 prompts"), (str(tmp_path / "no.txt"), "does not exist")):
        with pytest.raises(UserError, match=words):
            drift.drift_items(given, Suite())
    with pytest.raises(UserError, match="suite dots has no prompts that no teacher is for"):
        drift.drift_items("auto", Suite())
    assert len(set(drift.PROMPTS)) == 16
    with pytest.raises(UserError, match="--drift needs models that generate here"):
        _ = Bench(images={"a": tmp_path}, suite="dots", drift="auto").drift_items


@pytest.fixture(scope="module")
def drifted(result: BenchResult, models: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """The bench of everything again, with two prompts that no teacher is for."""
    output = shutil.copytree(result.folder, tmp_path_factory.mktemp("drifted") / "out")
    prompts = output.parent / "prompts.txt"
    prompts.write_text("a red circle\na black star\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "load_suite", lambda name, **options: Suite())
        return bench(models / "student", "dots", output=output, probes=True, batch=3, drift=str(prompts))


def test_drift_is_measured_beside_the_scores_and_changes_none(drifted: BenchResult, result: BenchResult) -> None:
    found = drifted.scores["drift"]
    assert found["prompts"] == ["a red circle", "a black star"] and found["seeds"] == 4
    names = [m["name"] for m in drifted.scores["models"]]
    assert set(found["models"]) == set(names)
    assert set(found["models"]["base"]) == {"diversity"} and set(found["models"]["student"]) > {"structure", "colour"}
    assert found["models"]["student"]["structure"]["n"] == 2 and found["models"]["student"]["diversity"]["mean"] > 0
    assert [row["score"] for row in drifted.rows] == [row["score"] for row in result.rows]
    assert [row["pixels_sha256"] for row in drifted.rows] == [row["pixels_sha256"] for row in result.rows]
    drawn = list((drifted.folder / "images" / "student" / "drift").glob("*.png"))
    assert len(drawn) == 8 and len({f["prompt"] for f in found["farthest"]}) == 2
    html = drifted.report.read_text(encoding="utf-8")
    assert "On 2 prompts that no teacher is for, from 4 seeds each" in html and "Farthest from the base" in html
    assert "diversity at a fixed prompt ↑" in html


def test_a_second_judge_answers_the_same_questions(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    lines = []
    for n in range(8):
        Image.new("RGB", (64, 64), (n * 9, 0, 0)).save(tmp_path / f"{n}.png")
        Image.new("RGB", (64, 64), (0, n * 9, 0)).save(tmp_path / "mine" / f"k{n}.png")
        lines.append(json.dumps({"source": f"{n}.png", "instruction": f"make it {n}", "key": f"k{n}"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    suite = Folder(data=tmp_path / "data.jsonl")
    aspects = [q.aspect for q in suite.questions(suite.items[0], Image.new("RGB", (64, 64)))]

    def answers(file: str, low: int) -> str:
        rows = [
            {"key": f"mine/{item.id}/{aspect}", "aspect": aspect, "numbers": [low + n % 3, low + n % 3]}
            for n, item in enumerate(suite.items)
            for aspect in aspects
        ]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"replay:{tmp_path / file}"

    judge = JudgeOptions(answers("one.jsonl", 6), second=answers("two.jsonl", 3))
    images = {"mine": tmp_path / "mine"}
    data = SuiteOptions(tmp_path / "data.jsonl")
    made = bench(None, "folder", images=images, output=tmp_path / "out", suite_options=data, judge=judge)
    second = made.scores["second_judge"]
    assert made.overall("mine", "editing") == pytest.approx(6.875) and made.rows[0]["score"] == 6.0
    assert second["models"]["mine"]["editing"]["mean"] == pytest.approx(3.875)
    assert {of["difference"] for of in second["agreement"].values()} == {3.0}
    assert all(row["score"] >= 6 for row in load(tmp_path / "out")[1]) and (tmp_path / "out" / "judge2.jsonl").is_file()
    html = made.report.read_text(encoding="utf-8")
    assert "A second judge" in html and "Spearman&#39;s correlation with people is 0.4" in html
    for wrong, words in ((JudgeOptions("none", second="replay:x"), "needs a suite with a judge"),
                         (JudgeOptions(judge.judge, second=judge.judge), "is the same judge")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            bench(None, "folder", images=images, output=tmp_path / "new", suite_options=data, judge=wrong)
    assert not (tmp_path / "new").exists()


def test_a_report_with_all_evidence_fits_on_a_phone(tmp_path: Path, browser) -> None:
    made = judged(tmp_path / "judged", items=24, size=(160, 120), files=2)
    scores, rows = load(made)
    figure = {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 16}
    names = [m["name"] for m in scores["models"]]
    far = {"prompt": "a lighthouse", "distance": 0.4, "base": "images/base/0001.jpg"}
    far["student"] = "images/student/0001.jpg"
    agreement = {"SC": {"n": 9, "exact": 0.5, "difference": 1.0, "kappa": 0.4}}
    scores |= {"drift": {"prompts": ["a lighthouse"], "seeds": 4, "farthest": [far]}
               | {"models": {n: {"structure": figure, "diversity": figure} for n in names}}}  # fmt: skip
    scores |= {"second_judge": {"judge": {"name": "another-judge-2025-04-14"}, "same": False, "agreement": agreement}
               | {"verdict": {"kind": "lost", "sentence": "Something got worse."}}
               | {"models": {n: {"editing": figure} for n in names}}}  # fmt: skip
    (made / "training").mkdir()
    Image.new("RGB", (1280, 400), "gray").save(made / "training" / "step-000000.webp")
    scores |= {"samples": [{"step": 0, "image": "training/step-000000.webp"}], "recipe_yaml": "steps: 180\n"}
    write(made, scores, rows)
    report(made)
    for width in (390, 1280):
        opened = Page(browser, made / "report.html", viewport={"width": width, "height": 900})
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        text = opened.page.locator("#summary").inner_text()
        for words in ("What got worst, by name", "Drift and diversity", "Another verdict", "Samples over training"):
            assert words in text
        assert opened.page.locator(".grids img").evaluate("i => i.naturalWidth") == 1280
        opened.page.locator('nav a[href="#made"]').click()
        opened.page.locator("#made summary").click()
        assert "steps: 180" in opened.page.locator("#made pre").inner_text()
        opened.check()
        opened.page.close()
