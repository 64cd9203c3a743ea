"""Scoring for the bench: pictures made elsewhere, judged suites, and what has no score."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from bench_cases import Suite
from rich.console import Console
from tiny import random_image
from typer.testing import CliRunner

from danceopd.bench import run, statistics
from danceopd.bench import scoring as score
from danceopd.bench.judges.protocol import Question, Reads
from danceopd.bench.options import JudgeOptions, SuiteOptions
from danceopd.bench.report.table import print_table
from danceopd.bench.results import load
from danceopd.bench.run import Bench, bench
from danceopd.bench.suites.protocol import JudgedSuite, Score
from danceopd.bench.suites.registry import SUITES
from danceopd.cli.app import app
from danceopd.cli.bench import about_run
from danceopd.common import system
from danceopd.errors import UserError

GOOD = f"""cmd:{sys.executable} -c 'import json, sys
for line in sys.stdin:
    said = json.dumps({{"score": 4, "reasoning": chr(0x2028).join("ab")}})
    print(json.dumps({{"key": json.loads(line)["key"], "text": said}}), flush=True)'
"""


@dataclass(frozen=True)
class Verdict(Score):
    """The score of the judged suite."""

    sc: float = 0.0


class Judged(JudgedSuite):
    """The edits of `dots`, two questions each: the score is the lower of two numbers."""

    name, version, protocol, rules = "judged", "1", "00" * 32, {"scorer": "a judge"}
    scale, share = {"editing": (1.0, 5.0)}, {"editing": False}
    subsets = {"cuts": ("cut",)}
    items = property(lambda self: Suite().editing_items())

    def image_path(self, item):
        return Suite().image_path(item)

    def questions(self, item, image):
        return [Question("", aspect, (f"{aspect} of {item.prompt}?", image), Reads(1, 1, 5)) for aspect in ("SC", "PQ")]

    def verdict(self, item, answers):
        if any(answer.status != "ok" for answer in answers.values()):
            return Verdict(None, False, "an answer is missing")
        low = min(answer.numbers[0] for answer in answers.values())
        return Verdict(low, low > 3, f"{low:g}", sc=answers["SC"].numbers[0])


@pytest.fixture(autouse=True)
def suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheap suites, exact and judged."""
    known = {"dots": Suite, "judged": Judged}
    found = run.load_suite
    monkeypatch.setattr(
        run, "load_suite", lambda name, **more: known[name]() if name in known else found(name, **more)
    )


def recorded(folder: Path, answers: dict[str, float | str]) -> str:
    """A file of answers by key (a number, or words that hold none), as a judge's name."""
    lines = [{"key": key} | ({"text": v} if isinstance(v, str) else {"numbers": [v]}) for key, v in answers.items()]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"replay:{folder / 'answers.jsonl'}"


def scored(rows: list[dict], model: str, name: str = "score") -> dict[str, object]:
    return {row["key"]: row[name] for row in rows if row["model"] == model}


def test_pictures_made_elsewhere_are_scored_as_ours(result, tmp_path: Path) -> None:
    """A copy of two models' folders, without any model: the same scores."""
    for name in ("student", "editing"):
        shutil.copytree(result.folder / "images" / name, tmp_path / "made" / name)
    images = {"theirs": tmp_path / "made" / "editing", "mine": tmp_path / "made" / "student"}
    found = bench(suite="dots", images={"mine": images["mine"], "theirs": images["theirs"]}, output=tmp_path / "out")
    assert scored(found.rows, "mine") == {k: v for k, v in scored(result.rows, "student").items() if k != "p0"}
    assert scored(found.rows, "theirs") == {k: v for k, v in scored(result.rows, "editing").items() if k != "p0"}
    assert [(m["name"], m["role"]) for m in found.scores["models"]] == [("theirs", "other"), ("mine", "student")]
    assert "theirs" in found.scores["comparison"]["editing"]["deltas"] and found.scores["base"] is None
    first, second = found.scores["models"]
    assert len(first["sha256"]) == 64 and first["sha256"] != second["sha256"]
    # a picture that changes there is scored again
    place = Suite().image_path(Suite().editing_items()[0])
    shutil.copyfile(images["theirs"] / place, images["mine"] / place)
    again = bench(suite="dots", images={"mine": images["mine"], "theirs": images["theirs"]}, output=tmp_path / "out")
    assert scored(again.rows, "mine")["e0"] == scored(again.rows, "theirs")["e0"] != scored(found.rows, "mine")["e0"]


def test_only_score_loads_no_model_and_draws_nothing(models: Path, result, tmp_path: Path, monkeypatch) -> None:
    out = shutil.copytree(result.folder, tmp_path / "out")
    (out / "samples.jsonl").unlink()
    lost = out / next(r["image"] for r in result.rows if r["model"] == "base" and r["key"] == "e1")
    lost.unlink()
    monkeypatch.setattr(import_module("danceopd.bench.host"), "load_base", lambda *_: pytest.fail("a model was loaded"))
    found = bench(models / "student", "dots", output=out, probes=True, only_score=True)
    row = next(r for r in found.rows if r["model"] == "base" and r["key"] == "e1")
    assert (row["status"], row["score"], row["image"]) == ("missing", None, None) and not lost.exists()
    mine = [r for r in found.rows if r is not row]
    assert mine == [r for r in result.rows if not (r["model"] == "base" and r["key"] == "e1")]


def pictures(folder: Path, *names: str, seed: int = 0) -> dict[str, Path]:
    """A folder of pictures of the judged suite for each name."""
    for number, name in enumerate(names, seed):
        for at, item in enumerate(Judged().items):
            file = folder / name / Suite().image_path(item)
            file.parent.mkdir(parents=True, exist_ok=True)
            random_image(10 * number + at).save(file)
    return {name: folder / name for name in names}


def judged(folder: Path, images: dict[str, Path], judge: str = GOOD, **more: object):
    return bench(suite="judged", images=images, output=folder, judge=JudgeOptions(judge), **more)


def asked(folder: Path) -> int:
    """Lines of answers that were asked for and not copied from an equal one."""
    lines = [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]
    return sum(line.get("attempts", 0) for line in lines)


def test_one_more_model_joins_a_folder_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Also in a new folder that holds the answers; and a folder of images may move, as it is known by its content."""
    images = pictures(tmp_path / "made", "a", "b", "c")
    two = {name: images[name] for name in "ab"}
    judged(tmp_path / "out", two)
    assert asked(tmp_path / "out") == 12
    found = judged(tmp_path / "out", images)
    assert asked(tmp_path / "out") == 18 and {row["status"] for row in found.rows} == {"ok"} and len(found.rows) == 9
    with pytest.raises(UserError, match=r"holds a bench with further models \(c\); name them too"):
        judged(tmp_path / "out", two)
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "out/judge.jsonl", tmp_path / "new")
    assert len(judged(tmp_path / "new", images).rows) == 9 and asked(tmp_path / "new") == 18
    other = pictures(tmp_path / "else", "a", seed=7) | {name: images[name] for name in "bc"}
    with pytest.raises(UserError, match="another bench .other models"):
        judged(tmp_path / "out", other)
    (tmp_path / "made").rename(tmp_path / "moved")
    judged(tmp_path / "out", {name: tmp_path / "moved" / name for name in "abc"})
    assert asked(tmp_path / "out") == 18


def test_what_is_scored_is_what_the_folder_holds_now(tmp_path: Path) -> None:
    """Images made again in another format, with the same size and time, or not any more."""
    images = pictures(tmp_path / "made", "a")
    first, second, third = (images["a"] / Suite().image_path(item) for item in Judged().items)
    before = judged(tmp_path / "out", images).rows
    first.unlink()
    random_image(77).save(first.with_suffix(".JPG"))
    facts, same = second.stat(), bytearray(second.read_bytes())
    random_image(78).save(second, compress_level=0)
    content = second.read_bytes()[: len(same)]
    second.write_bytes(content + bytes(len(same) - len(content)))
    os.utime(second, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    third.unlink()
    after = {row["key"]: row for row in judged(tmp_path / "out", images).rows}
    assert after["e0"]["image"].endswith("e0.jpg") and after["e0"]["status"] == "ok"
    assert after["e1"]["pixels_sha256"] != before[1]["pixels_sha256"]
    assert (after["e2"]["status"], after["e2"]["image"]) == ("missing", None)
    kept = {file.name for file in (tmp_path / "out/images/a").rglob("*") if file.is_file()}
    assert kept == {"e0.jpg", "e1.png"}


@pytest.mark.parametrize("how", ["cut off", "no image", "bomb"])
def test_a_damaged_image_is_named_and_has_failed(tmp_path: Path, how: str, caplog) -> None:
    images = pictures(tmp_path / "made", "a")
    file = images["a"] / Suite().image_path(Judged().items[0])
    whole = file.read_bytes()
    header = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    broken = {"cut off": whole[: len(whole) // 2], "no image": b"x", "bomb": whole[:8] + chunk + whole[33:]}
    file.write_bytes(broken[how])
    rows = judged(tmp_path / "out", images).rows
    assert [row["status"] for row in rows] == ["failed", "ok", "ok"] and str(file) in rows[0]["reason"]
    assert str(file) in caplog.text and rows[0]["image"] is None
    file.write_bytes(whole)
    assert judged(tmp_path / "out", images).rows[0]["status"] == "ok"


def test_a_dry_run_counts_what_the_run_asks(tmp_path: Path, models: Path) -> None:
    """Images of folders are read where they are; of those to come, no two are equal."""
    images = pictures(tmp_path / "made", "a", "b")
    shutil.copy(images["a"] / "cut/e0.png", images["b"] / "cut/e0.png")
    (images["b"] / "paint/e1.png").unlink()
    planned = Bench(suite="judged", images=images, output=tmp_path / "out", judge=JudgeOptions(GOOD))
    estimate = planned.estimate()["judge"]
    planned.run()
    assert (estimate["questions"], estimate["equal"], estimate["to_ask"]) == (10, 2, 8) and asked(tmp_path / "out") == 8
    drawn = Bench(models / "student", "judged", ["base"], tmp_path / "new", judge=JudgeOptions(GOOD)).estimate()
    assert (drawn["judge"]["questions"], drawn["judge"]["to_ask"]) == (12, 12)


def test_what_unicode_calls_a_line_break_is_none(tmp_path: Path) -> None:
    """A judge's reasoning has U+2028 in it: the bench is read again, line by line in whatever way."""
    images = pictures(tmp_path / "made", "a")
    rows = judged(tmp_path / "out", images).rows
    assert rows[0]["reason"] == "4" and rows[0]["judge"]["SC"]["reasoning"] == "a\u2028b"
    assert load(tmp_path / "out")[1] == rows
    text = (tmp_path / "out/samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows
    (tmp_path / "out/samples.jsonl").write_text(text.replace("\\u2028", "\u2028"), encoding="utf-8")  # as once written
    assert load(tmp_path / "out")[1] == rows and judged(tmp_path / "out", images).rows == rows


def test_a_key_in_the_judges_url_is_written_nowhere(tmp_path: Path, monkeypatch) -> None:
    judge = "openai:m@http://user:sk-in-url@127.0.0.1:9/v1?key=sk-in-url"
    monkeypatch.setattr("sys.argv", ["danceopd", "bench", "--judge", judge])
    images = pictures(tmp_path / "made", "a")
    judged(tmp_path / "out", images)
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert b"sk-in-url" not in written and b"openai:m@http://127.0.0.1:9/v1" in written
    folders = [f"--images={name}={folder}" for name, folder in images.items()]
    said = typed("--suite", "judged", *folders, "--judge", judge, "--dry-run", "-o", tmp_path / "new")
    assert said.exit_code == 0 and "sk-in-url" not in said.output and "openai:m@http://127.0.0.1:9" in said.stdout


def test_what_else_must_be_known_of_a_run_is_printed() -> None:
    scores = {
        "published": {"editing": 606},
        "suite": {"name": "gedit"},
        "models": [{"editing": {"overall": {"n": 6, "failed": 2}}}],
        "judging": {"usage": {"judges": {"m-2025-04-14": 3, "m-2025-06-01": 1}}, "stopped": "a reason"},
    }
    snapshots = "the answers are of 2 snapshots, whose scores do not compare: m-2025-04-14 (3), m-2025-06-01 (1)"
    assert about_run(scores) == ["items: 8 of 606 of gedit", f"judge: {snapshots}", "judge: a reason"]
    assert about_run(scores | {"published": {"editing": 8}, "judging": None}) == []


DAMAGE = {
    "bench.json": "[]",
    "samples.jsonl": "5\n[]\n{}\n\xff",
    "drawn.jsonl": '{"model": [], "key": {}, "image": 5, "pixels_sha256": null}\n',
    "judge.jsonl": '{"identity": 5, "sees": 5}\n[[[\n',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_used_or_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    images = pictures(tmp_path / "made", "a")
    rows = judged(tmp_path / "out", images).rows
    (tmp_path / "out" / name).write_text(DAMAGE[name], encoding="latin-1")
    if name == "bench.json":
        with pytest.raises(UserError, match="bench.json is damaged; choose another --output"):
            judged(tmp_path / "out", images)
    else:
        assert judged(tmp_path / "out", images).rows == rows


def test_what_is_missing_is_counted_and_bounded(result, tmp_path: Path) -> None:
    made = shutil.copytree(result.folder / "images" / "student", tmp_path / "made")
    (made / Suite().image_path(Suite().editing_items()[1])).unlink()
    found = bench(suite="dots", images={"student": made}, output=tmp_path / "out")
    rows = {r["key"]: r for r in found.rows}
    assert [rows[k]["status"] for k in ("e0", "e1", "e2")] == ["ok", "missing", "ok"]
    editing = found.scores["models"][0]["editing"]
    ends = {k: editing["categories"]["paint"][k] for k in ("mean", "n", "failed", "lower", "upper")}
    assert ends == {"mean": None, "n": 0, "failed": 1, "lower": 0.0, "upper": 10.0}
    cut = np.mean([rows["e0"]["score"], rows["e2"]["score"]])
    assert editing["overall"]["failed"] == 1
    assert editing["overall"]["lower"] == pytest.approx(cut / 2, abs=1e-5)
    assert editing["overall"]["upper"] == pytest.approx((cut + 10) / 2, abs=1e-5)
    printed = StringIO()
    print_table(found.scores, Console(file=printed, width=100))
    assert "1 of 3, so its score is between" in printed.getvalue()


def test_rows_of_edits_say_what_needs_no_judge(result) -> None:
    for row in result.rows:
        assert ("psnr_outside" in row["metrics"] or "edited" in row["metrics"]) == (row["capability"] == "editing")
    assert result.scores["metrics"]["editing"]["student"]["changed"]["n"] == 3
    assert result.scores["pictures"]["student"]["n"] == 8


def test_an_exact_score_is_asked_once(models: Path, result, tmp_path: Path, monkeypatch) -> None:
    """Rows of a bench that was stopped while it scored are found again by their pixels."""
    out = shutil.copytree(result.folder, tmp_path / "out")
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:30]) + lines[30][:50])
    asked: list[str] = []
    real = Suite._scores
    monkeypatch.setattr(
        Suite, "_scores", lambda self, items, images: asked.extend(i.key for i in items) or real(self, items, images)
    )
    again = bench(models / "student", "dots", output=out, probes=True)
    assert len(asked) == 10 and again.rows == result.rows
    assert (out / "samples.jsonl").read_text() == "".join(lines)


def test_categories(models: Path, tmp_path: Path) -> None:
    found = bench(models / "student", "dots", ["none"], tmp_path / "out", categories=["cut", "many"], limit=1)
    assert [r["key"] for r in found.rows] == ["g1", "e0"]  # the first of each, not what is left of the first
    assert found.scores["categories"] == ["cut", "many"]
    with pytest.raises(UserError, match=r"holds another bench \(other categories\); choose another --output"):
        bench(models / "student", "dots", ["none"], tmp_path / "out", categories=["cut"], limit=1)


def test_a_judged_suite(models: Path, tmp_path: Path) -> None:
    """Answers become scores; one that cannot be read, one that is not there and a missing picture are statuses."""
    asked = {"against": ["none"], "output": tmp_path / "out", "suite": "judged"}
    phases: list[str] = []
    seen = {"progress": lambda *step: phases.append(step[2])}
    drawn = bench(models / "student", judge=JudgeOptions("none"), **seen, **asked)
    assert "ceiling" not in phases and "report" in phases  # only suites that score exactly can have one
    assert {r["status"] for r in drawn.rows} == {"missing"} and drawn.scores["judge"] is None
    judge = recorded(
        tmp_path,
        {"student/e0/SC": 4.0, "student/e0/PQ": 3.0, "student/e1/SC": 5.0, "student/e1/PQ": "I cannot say."},
    )
    found = bench(models / "student", judge=JudgeOptions(judge), **asked)
    rows = {r["key"]: r for r in found.rows}
    assert {k: (r["status"], r["score"]) for k, r in rows.items()} == {
        "e0": ("ok", 3.0),
        "e1": ("unparsable", None),
        "e2": ("missing", None),
    }
    assert rows["e0"]["parts"] == {"sc": 4.0} and rows["e0"]["judge"]["SC"]["numbers"] == [4.0]
    assert rows["e1"]["judge"]["PQ"]["text"] == "I cannot say." and rows["e0"]["pixels_sha256"]
    overall = found.scores["models"][-1]["editing"]["overall"]
    assert (overall["n"], overall["failed"]) == (1, 2)
    assert (overall["lower"], overall["upper"]) == (1.5, 4.5)  # ((3 + 1) / 2 + 1) / 2 and ((3 + 5) / 2 + 5) / 2
    assert found.scores["suite"]["scale"] == {"editing": [1.0, 5.0]}
    assert found.scores["subsets"]["cuts"]["editing"]["student"]["failed"] == 1
    assert found.scores["judge"]["kind"] == "replay" and found.scores["judging"]["repeats"] == 1
    assert len((tmp_path / "out" / "judge.jsonl").read_text().splitlines()) >= 3
    estimate = Bench(models / "student", judge=JudgeOptions(judge), **asked).estimate()
    assert (estimate["images"], estimate["judge"]["questions"]) == (0, 6)


def test_repeats_are_averaged_and_a_failed_one_is_left_out() -> None:
    from danceopd.bench.judges.protocol import Answer

    def answers(*values: float | None):
        return [Answer("k", "ok" if v is not None else "refused", None if v is None else (v,)) for v in values]

    item = Judged().editing_items()[0]
    row = score._judged_row(Judged(), item, {"SC": answers(5, None, 2), "PQ": answers(4, 4, 4)})
    assert (row["status"], row["score"], row["parts"]["sc"], row["parts"]["repeats"]) == ("ok", 3.0, 3.5, 2)
    assert [r["status"] for r in row["judge"]["SC"]["repeats"]] == ["ok", "refused", "ok"]
    row = score._judged_row(Judged(), item, {"SC": answers(None), "PQ": answers(4)})
    assert (row["status"], row["score"], row["correct"]) == ("refused", None, None)


def typed(*words: object):
    """What the program answers to these words."""
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_a_dry_run_writes_nothing(models: Path, tmp_path: Path) -> None:
    judge = recorded(tmp_path, {"student/e0/SC": 4.0})
    found = Bench(models / "student", "judged", ["base"], tmp_path / "out", judge=JudgeOptions(judge)).estimate()
    assert found["images"] == 6 and found["judge"]["questions"] == 12 and not (tmp_path / "out").exists()
    said = typed(models / "student", "--limit", 2, "--against", "none", "--dry-run", "-o", tmp_path / "out")
    assert said.exit_code == 0 and "images to generate: 4" in said.stdout and "no judge" in said.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suite": "judged"}, "suite judged needs a judge; give --judge openai"),
        ({"suite": "dots", "judge": JudgeOptions("replay:x")}, "scores without a judge"),
        ({"suite": "dots", "categories": ["cuts"]}, "no category 'cuts'; did you mean 'cut'"),
        ({"suite": "dots", "only_score": True}, "no image to score .*without --only-score"),
        ({"suite": "dots", "images": {"base": "."}}, "'base', which is taken"),
        ({"suite": "dots", "images": {"a b": "."}}, "use letters, digits"),
        ({"suite": "dots", "images": {"x": "nowhere"}}, "there is no folder .*nowhere"),
        ({"suite": "scenes", "suite_options": SuiteOptions(data=".")}, "suite scenes takes no --data"),
        ({"suite": "judged", "judge": JudgeOptions("gpt-4")}, "--judge 'gpt-4' is no judge"),
    ],
)
def test_bad_input_is_one_sentence(models: Path, tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench(models / "student", output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="has none of the 7 images .*one/g0.png"):
        bench(suite="dots", images={"mine": tmp_path / "made"}, output=tmp_path / "out")
    with pytest.raises(UserError, match="nothing to score"):
        bench(suite="dots", output=tmp_path / "out")


def test_flags(tmp_path: Path) -> None:
    for words, said in (
        (("--images", "mine"), "--images has 'mine'; write a name"),
        (("--images", "a=x", "--images", "a=y"), "names 'a' twice"),
        ((), "nothing to score"),
        (("--suite", "scene", "--images", f"a={tmp_path}"), "did you mean 'scenes'"),
    ):
        found = typed(*words)
        assert found.exit_code == 2 and said in found.stderr and len(found.stderr.splitlines()) == 1


def test_the_program_lists_suites_and_writes_a_report_again(result, tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["suites"])
    assert listed.exit_code == 0 and all(name in listed.stdout for name in SUITES)
    assert "git clone https://github.com/djghosh13/geneval" in " ".join(listed.stdout.split())
    folder = shutil.copytree(result.folder, tmp_path / "out")
    (folder / "report.html").unlink()
    again = CliRunner().invoke(app, ["report", str(folder)])
    assert again.exit_code == 0 and (folder / "report.html").stat().st_size > 10_000, again.output
    refused = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert refused.exit_code == 2 and "holds no finished bench" in refused.stderr


def test_a_machine_is_named_by_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel : 17\nmodel name\t: Some  CPU 9000\n")
    monkeypatch.setattr(system, "CPUINFO", tmp_path / "cpuinfo")
    assert ", Some CPU 9000, " in system.describe_machine() and system.describe_machine().endswith("threads")
    monkeypatch.setattr(system, "CPUINFO", tmp_path / "nowhere")
    assert "9000" not in system.describe_machine()


def test_eleven_categories_fit_the_width() -> None:
    from danceopd.bench.suites.gedit import CATEGORIES

    rows = [
        {"model": m, "capability": "editing", "category": c, "key": f"{c}{n}", "score": 5.0 + n, "probe": None}
        for m in ("base", "student")
        for c in CATEGORIES
        for n in range(3)
    ]
    models_ = [
        {"name": m, "label": m, "role": m, "editing": statistics.summary(rows, m, "editing")}
        for m in ("base", "student")
    ]
    scores = {"models": models_, "student": "student", "comparison": {}, "suite": {"scale": {"editing": [0, 10]}}}
    printed = StringIO()
    print_table(scores, Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in printed.getvalue()
    heads = " ".join(line for line in lines if "remove" in line or "replace" in line or "human" in line)
    assert len(CATEGORIES) == 11 and all(word in heads for word in ("human", "motion", "tone", "mean"))
    assert sum(line.startswith("student") for line in lines) == 2
