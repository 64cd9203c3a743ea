"""Results in the official layouts, scored from end to end: pictures made elsewhere, recorded and real answers.

The numbers are held against the official scripts' formulas, written here once more from what they compute.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict

import pytest
from suites_data import (
    COCO,
    files,
    gedit_results,
    gedit_rows,
    gedit_tree,
    geneval_records,
    imgedit_tree,
    noise,
    picture,
    write_lines,
)

from danceopd.bench.options import JudgeOptions, SuiteOptions
from danceopd.bench.run import Bench
from danceopd.bench.suites import gedit, imgedit
from danceopd.bench.suites.registry import load_suite
from danceopd.data.images import picture as opened

pytestmark = pytest.mark.usefixtures("cache")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def scored(tmp_path, suite, data, results, judge, **options):
    """The bench's result of one set of pictures, which it must not touch."""
    before = {name: files(folder) for name, folder in results.items()}
    more = {"suite_options": SuiteOptions(data=data), "judge": JudgeOptions(judge)}
    found = Bench(images=results, suite=suite, output=tmp_path / "out", **more, **options).run()
    assert before == {name: files(folder) for name, folder in results.items()}
    return found


def figures(found, model="mine", capability="editing"):
    (held,) = (m for m in found.scores["models"] if m["name"] == model)
    return held[capability]


def official_csv(folder, rows, model="mine"):
    """What the official scorer writes: one CSV a category, the lower number of each question alone."""
    got = {}
    for at, row in enumerate(rows):
        place = f"/results/{model}/fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}"
        kind = row["task_type"]
        got[kind, row["key"]] = (kind, 1 + at % 9, 1 + at * at % 10, row["Intersection_exist"], row, place)
    folder.mkdir(parents=True)
    for category in gedit.CATEGORIES:
        with open(folder / f"{model}_{category}_gpt_score.csv", "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(
                ["source_image", "edited_image", "instruction", "sementics_score", "quality_score"]
                + ["intersection_exist", "instruction_language"]
            )
            for kind, sc, pq, marked, row, place in got.values():
                if kind == category:
                    out.writerow([f"{place}_SRCIMG.png", f"{place}.png", row["instruction"], sc, pq, marked, "en"])
    return got


def test_an_official_gedit_tree_with_its_official_scores(tmp_path):
    rows = gedit_rows(3, ["en"])
    tree = gedit_results(tmp_path / "mine", rows)
    got = official_csv(tmp_path / "eval_results_new", rows)
    data = gedit_tree(tmp_path / "data", gedit_rows(3))
    judge = f"replay:{tmp_path / 'eval_results_new'}"
    found = scored(tmp_path, "gedit", data, {"mine": tree}, judge)

    def overall(kept, categories=gedit.CATEGORIES):
        by = defaultdict(list)
        for kind, sc, pq, *rest in got.values():
            if kept(rest):
                by[kind].append(math.sqrt(sc * pq))
        return mean(mean(by[c]) for c in categories), {c: mean(by[c]) for c in categories}

    average, categories = overall(lambda rest: True)
    editing = figures(found)
    assert editing["overall"]["mean"] == pytest.approx(average, abs=1e-5)
    assert editing["overall"] | {"n": 33, "failed": 0} == editing["overall"]
    assert {c: f["mean"] for c, f in editing["categories"].items()} == pytest.approx(categories, abs=1e-5)
    subsets = {name: held["editing"]["mine"]["mean"] for name, held in found.scores["subsets"].items()}
    assert subsets == pytest.approx(
        {
            "fullset": average,
            "paper": overall(lambda rest: True, gedit.PAPER)[0],
            "intersection": overall(lambda rest: rest[0])[0],
            "paper, intersection": overall(lambda rest: rest[0], gedit.PAPER)[0],
        },
        abs=1e-5,
    )
    rules = found.scores["suite"]["rules"]
    assert rules["resize"].startswith("the edit to the size of the source") and rules["data"]["items"] == 33
    assert found.scores["suite"]["protocol"] == load_suite("gedit", data=data).protocol


def test_what_is_drawn_here_is_scored_elsewhere(tmp_path):
    """A real model's pictures have the official layout, the source beside each, and are taken back as they are.

    The two edits have one key; each has its own picture and its own score.
    """
    kinds = ["subject-remove", "subject-replace"]
    rows = [row for row in gedit_rows(1, ["en"]) if row["task_type"] in kinds]
    assert rows[0]["key"] == rows[1]["key"]
    data = gedit_tree(tmp_path / "data", rows)
    answers = [
        {"key": f"{model}/{row['task_type']}/{row['key']}/{aspect}", "numbers": [at, 9]}
        for at, row in enumerate(rows, 4)
        for aspect in ("SC", "PQ")
        for model in ("student", "again")
    ]
    judge = f"replay:{write_lines(tmp_path / 'a.jsonl', answers)}"
    more = {"suite_options": SuiteOptions(data=data), "judge": JudgeOptions(judge), "limit": 2}
    here = Bench("editing", "gedit", ["none"], tmp_path / "here", **more).run()
    assert Bench("editing", "gedit", ["none"], tmp_path / "here", **more).estimate()["images"] == 0
    drawn = tmp_path / "here/images/student"
    places = [f"fullset/{row['task_type']}/en/{row['key']}" for row in rows[:2]]
    assert set(files(drawn)) == {f"{place}{mark}.png" for place in places for mark in ("", "_SRCIMG")}
    for row, place in zip(rows, places):
        assert opened(drawn / f"{place}_SRCIMG.png").tobytes() == opened(data / f"{row['key']}_SRCIMG.png").tobytes()
    there = scored(tmp_path, "gedit", data, {"again": drawn}, judge, limit=2)
    assert [row["score"] for row in there.rows] == [row["score"] for row in here.rows] == [4, 5]
    assert [row["pixels_sha256"] for row in there.rows] == [row["pixels_sha256"] for row in here.rows]


def test_failures_and_missing_pictures_are_counted(tmp_path):
    """One picture gone, one answer of one number, one refusal; the rest gets 6 of 10."""
    rows = gedit_rows(2, ["en"])
    tree = gedit_results(tmp_path / "mine", rows)
    (tree / "fullset/color_alter/en/en010000.png").unlink()
    said = {("en020000", "SC"): '{"score": [7]}', ("en030000", "PQ"): "I'm sorry, but I can't assist with that."}
    usual = '{"score": [6, 8], "reasoning": "r"}'
    data = gedit_tree(tmp_path / "data", rows)
    lines = [
        {"key": f"mine/{item.id}/{aspect}", "text": said.get((item.key, aspect), usual)}
        for item in load_suite("gedit", data=data).items
        for aspect in ("SC", "PQ")
    ]
    found = scored(tmp_path, "gedit", data, {"mine": tree}, f"replay:{write_lines(tmp_path / 'a.jsonl', lines)}")
    status = {row["key"]: (row["status"], row["score"]) for row in found.rows}
    assert status["en010000"] == ("missing", None)
    assert status["en020000"] == ("unparsable", None)
    assert status["en030000"] == ("refused", None)
    assert {s for k, s in status.items() if k not in ("en010000", "en020000", "en030000")} == {("ok", 6.0)}
    overall = figures(found)["overall"]
    assert (overall["mean"], overall["n"], overall["failed"]) == (6.0, 19, 3)
    assert overall["lower"] == pytest.approx(6 - 3 * 3 / 11, abs=1e-5)  # 0 for one of two in three categories
    assert overall["upper"] == pytest.approx(6 + 3 * 2 / 11, abs=1e-5)


def test_an_official_imgedit_folder_with_its_official_answers(tmp_path):
    data = imgedit_tree(tmp_path / "data", 3)
    items = load_suite("imgedit", data=data).editing_items()
    numbers = {item.key: (1 + n % 5, 1 + n * n % 5, 1 + n // 3 % 5) for n, item in enumerate(items)}
    said = {
        key: f"Brief reasoning: fine.\nPrompt Compliance: {a}\nVisual Naturalness: {b}\nPhysical Detail: {c}"
        for key, (a, b, c) in numbers.items()
    }
    for seed, item in enumerate(items):
        picture(tmp_path / "mine" / f"{item.key}.png", seed, (64, 80))
    (tmp_path / "mine/result.json").write_text(json.dumps(said))
    judge = f"replay:{tmp_path / 'mine' / 'result.json'}"
    found = scored(tmp_path, "imgedit", data, {"mine": tmp_path / "mine"}, judge)
    by = defaultdict(list)
    for item in items:
        by[item.category].append(round(mean(numbers[item.key]), 2))
    editing = figures(found)
    assert {c: f["mean"] for c, f in editing["categories"].items()} == pytest.approx(
        {c: mean(by[c]) for c in imgedit.CATEGORIES}, abs=1e-5
    )
    assert editing["overall"]["mean"] == pytest.approx(mean(map(mean, by.values())), abs=1e-5)
    assert editing["overall"]["failed"] == 0


def geneval_tree(folder, records, samples):
    """The official result tree: the record and the samples of every prompt."""
    for number, record in enumerate(records):
        for sample in range(samples):
            picture(folder / f"{number:05}/samples/{sample:04}.png", 10 * number + sample, (64, 64))
        write_lines(folder / f"{number:05}/metadata.jsonl", [record])
    return folder


def test_an_official_geneval_tree_with_the_official_evaluator_s_results(tmp_path):
    """The tree is its own data; 4 samples a prompt."""
    records = geneval_records(3)
    tree = geneval_tree(tmp_path / "mine", records, 4)
    lines, by = [], defaultdict(list)
    for number, record in enumerate(records):
        for sample in range(4):
            right = (number * 7 + sample * 3) % 5 < 3
            by[record["tag"]].append(right)
            name = f"/images/mine/{number:05}/samples/{sample:04}.png"
            lines.append({"filename": name, "tag": record["tag"], "correct": right, "reason": "r"})
    judge = f"replay:{write_lines(tmp_path / 'results.jsonl', lines)}"
    found = scored(tmp_path, "geneval", tree, {"mine": tree}, judge)
    generation = figures(found, capability="generation")
    assert {c: f["mean"] for c, f in generation["categories"].items()} == pytest.approx(
        {tag: mean(right) for tag, right in by.items()}, abs=1e-5
    )
    assert generation["overall"]["mean"] == pytest.approx(mean(map(mean, by.values())), abs=1e-5)
    assert generation["overall"]["n"] == 72 and found.scores["suite"]["rules"]["samples"] == 4


CHECKER = f"""
import json, sys
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    (shown,) = [part["picture"] for part in asked["parts"] if "picture" in part]
    record = asked["facts"]["metadata"]
    named = {COCO!r}.index(record["include"][0]["class"])
    right = Image.open(shown).getpixel((0, 0))[0] % 6 == named
    print(json.dumps({{"key": asked["key"], "correct": right, "reason": str(record["include"])}}), flush=True)
"""


def test_geneval_asks_a_program_of_its_own(tmp_path):
    """A detector in its own process sees the picture and the official record."""
    records = geneval_records(2)
    (tmp_path / "checker.py").write_text(CHECKER)
    tree, right = geneval_tree(tmp_path / "mine", records, 4), 0
    for number, record in enumerate(records):
        for sample in range(4):
            shown = noise(10 * number + sample, (64, 64)).getpixel((0, 0))[0]
            right += shown % 6 == COCO.index(record["include"][0]["class"])
    judge = f"cmd:{sys.executable} {tmp_path / 'checker.py'}"
    found = scored(tmp_path, "geneval", tree, {"mine": tree}, judge)
    assert sum(row["score"] for row in found.rows) == right > 0
    assert {row["status"] for row in found.rows} == {"ok"}
    assert found.scores["judge"]["kind"] == "cmd"


def test_a_folder_of_one_s_own(tmp_path):
    for name in ("x", "y"):
        picture(tmp_path / f"data/colour/{name}.png", 1)
        (tmp_path / f"data/colour/{name}.txt").write_text("make it blue")
        picture(tmp_path / f"mine/colour/{name}.png", 2)
        picture(tmp_path / f"theirs/colour/{name}.png", 3)
    lines = [
        {"key": f"{model}/colour-{name}/{aspect}", "numbers": [score, 10]}
        for model, score in (("mine", 9), ("theirs", 4))
        for name in ("x", "y")
        for aspect in ("SC", "PQ")
    ]
    results = {name: tmp_path / name for name in ("mine", "theirs")}
    judge = f"replay:{write_lines(tmp_path / 'a.jsonl', lines)}"
    found = scored(tmp_path, "folder", tmp_path / "data", results, judge)
    assert [figures(found, name)["overall"]["mean"] for name in results] == [9.0, 4.0]
