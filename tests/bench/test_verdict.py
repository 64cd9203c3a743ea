"""The verdict on known data: it is never a tick by chance, by absence, or by a handful of items."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from report_folders import judged
from rich.console import Console

from danceopd.bench import statistics
from danceopd.bench.report.export import markdown_of
from danceopd.bench.report.report import page
from danceopd.bench.report.table import print_table
from danceopd.bench.report.thumbnails import Thumbnails
from danceopd.bench.report.verdict import MARGIN, check_margin, verdict, verdict_of
from danceopd.bench.results import load, nothing_scored, unscored
from danceopd.errors import UserError

Models = dict[str, dict[str, Sequence[float | None]]]


def scores_of(share: bool = False, **models: dict[str, Sequence[float | None]]) -> dict:
    """`scores.json` of `model={category: [score, …]}`; the roles are their names, "mine" is the student."""
    rows = [
        {"model": m, "capability": "editing", "category": c, "key": f"{c}{n}", "prompt": "p", "score": s}
        for m, by_category in models.items()
        for c, values in by_category.items()
        for n, s in enumerate(values)
    ]
    kind: dict = {"share": share, "scale": (0.0, 1.0) if share else (0.0, 10.0)}
    others, teachers = [m for m in models if m != "mine"], [m for m in models if m.startswith("teacher")]
    base = "base" if "base" in models else None
    found = statistics.comparison(rows, "mine", base, teachers, others, "editing", **kind)
    role = {"mine": "student", "base": "base"} | dict.fromkeys(teachers, "teacher")
    about = [
        {"name": m, "label": m, "role": role.get(m, "other"), "path": m, "sha256": ""}
        | {"editing": statistics.summary(rows, m, "editing", **kind)}
        for m in models
    ]
    suite = {"name": "s", "version": "1", "protocol": ""} | {key: {"editing": value} for key, value in kind.items()}
    return {"suite": suite, "student": "mine", "models": about, "comparison": {"editing": found}}


def drawn(shift: float = 0.0, n: int = 60, categories: int = 2, spread: float = 0.4, seed: int = 0) -> Models:
    """A base, and a student that differs from it by `shift` and noise, in every category."""
    rng = np.random.default_rng(seed)
    base = {f"c{k}": rng.uniform(3, 8, n) for k in range(categories)}
    mine = {c: v + shift + rng.normal(0, spread, n) for c, v in base.items()}
    return {"base": {c: list(v) for c, v in base.items()}, "mine": {c: list(v) for c, v in mine.items()}}


def test_equal_models_on_enough_items_lost_nothing() -> None:
    told = verdict(scores_of(**drawn()))
    assert told["kind"] == "kept" and told["margin"] == MARGIN
    assert told["sentence"].startswith("Nothing lost within the margin: overall and in each of 2 categories, mine is")
    assert "at most 5 % of the scale below the base (95 % confidence). Worst category: c" in told["sentence"]
    assert told["against"] == {"editing": ["the base"]}
    assert all(entry["floor"] > -0.5 for entry in told["comparisons"])


def test_worse_as_a_whole_is_worse_even_if_no_category_is() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([-3, -2, -1, 0, 1, 2], 48).reshape(6, 8)
    base = {f"c{k}": [5.0] * 8 for k in range(6)}
    told = verdict(scores_of(base=base, mine={f"c{k}": list(5.0 + v) for k, v in enumerate(values)}))
    assert told["kind"] == "lost"
    assert told["sentence"].startswith("Something got worse: overall −0.65 [−1.08 to −0.21] against the base. ")


@pytest.mark.parametrize(("wrong", "kind"), [(0, "kept"), (30, "lost")])
def test_the_share_of_exact_items_is_decided_beside_the_score(wrong: int, kind: str) -> None:
    scores, models = scores_of(**drawn()), {"base": 0, "mine": wrong}
    rights = {m: {c: [float(i >= n) for i in range(60)] for c in ("c0", "c1")} for m, n in models.items()}
    exact = scores_of(share=True, **rights)
    for one, other in zip(scores["models"], exact["models"], strict=True):
        one["editing"]["exact"] = other["editing"]
    scores["comparison"]["editing"]["exact"] = exact["comparison"]["editing"]
    told = verdict(scores)
    assert told["kind"] == kind and told["worst"]["editing"]["category"] in ("c0", "c1")
    assert [e["category"] for e in told["comparisons"]] == ["overall", "c0", "c1", "all facts right"]
    starts = {
        "kept": "Nothing lost within the margin: overall, in the share with all facts right and in each of 2 categor",
        "lost": "Something got worse: all facts right −0.50 [−",
    }
    assert told["sentence"].startswith(starts[kind])


def test_one_worse_category_is_named_with_its_interval_and_against_whom() -> None:
    models = drawn(n=60, categories=5, shift=0.2)
    models["teacher1"] = {c: list(np.array(v) + (2.0 if c == "c3" else -1.0)) for c, v in models["base"].items()}
    told = verdict(scores_of(**models))
    assert told["kind"] == "lost" and told["worst"]["editing"]["category"] == "c3"
    assert told["sentence"].startswith("Something got worse: ")
    assert "c3 −1.78 [−1.89 to −1.68]" in told["sentence"] and "against teacher teacher1" in told["sentence"]
    assert told["against"]["editing"] == ["teacher teacher1", "the base"]


@pytest.mark.parametrize("who", ["mine", "base"])
def test_missing_pictures_are_at_their_worst_and_at_their_best(who: str) -> None:
    models = drawn(n=20, categories=1, shift=0.3)
    models[who]["c0"] = [*models[who]["c0"][:16], *[None] * 4]
    told = verdict(scores_of(**models))
    assert told["kind"] == "unknown" and "4 of 20 items have no score" in told["sentence"]
    entry = told["comparisons"][0]
    assert entry["low"] < -1.5 and entry["high"] > 1.5 and (entry["n"], entry["failed"]) == (16, 4)
    models[who]["c0"] = [*models[who]["c0"][:4], *[None] * 16]  # a clear loss is not clear either
    models["mine"]["c0"] = [v and 0.0 for v in models["mine"]["c0"]]
    assert verdict(scores_of(**models))["kind"] == "unknown"


def test_one_item_decides_nothing_and_is_no_loss() -> None:
    told = verdict(scores_of(base={"add": [8.0] * 8, "lone": [8.0]}, mine={"add": [8.0] * 8, "lone": [9.0]}))
    assert told["kind"] == "unknown" and "+1.00" not in told["sentence"]
    assert "fewer than 6 scored items: lone (1)" in told["sentence"]
    assert told["worst"]["editing"]["category"] == "add"
    lost = verdict(scores_of(base={"add": [8.0] * 8, "lone": [8.0]}, mine={"add": [8.0] * 8, "lone": [5.0]}))
    assert lost["kind"] == "unknown" and "Worst category: lone −3.00 [−10.00 to +10.00] against" in lost["sentence"]


@pytest.mark.parametrize(("n", "kind"), [(16, "unknown"), (300, "kept")])
def test_a_few_right_answers_are_no_proof(n: int, kind: str) -> None:
    """Sixteen of sixteen right on both sides: one loss in ten could have been missed."""
    assert verdict(scores_of(share=True, base={"a": [1.0] * n}, mine={"a": [1.0] * n}))["kind"] == kind


def test_equal_models_are_rarely_called_worse() -> None:
    """Of 12 categories against two models, one interval in forty lies below zero by chance."""
    kinds = [verdict(scores_of(**drawn(n=40, categories=12, spread=2.0, seed=s)))["kind"] for s in range(14)]
    assert "lost" not in kinds  # by the plain intervals 4 would be


def test_a_judge_that_says_one_number_tells_nothing() -> None:
    same = {"a": [6.0] * 80, "b": [6.0] * 80}
    told = verdict(scores_of(base=same, mine=same))
    assert told["kind"] == "unknown" and "every picture of every model got the same score, 6.00" in told["sentence"]


def test_without_a_base_and_teachers_it_cannot_be_told() -> None:
    models = drawn()
    told = verdict(scores_of(theirs=models["base"], mine=models["mine"]))
    assert told["kind"] == "unknown" and "there is no base and no teacher to compare with (overall " in told["sentence"]
    assert "against theirs" in told["sentence"]
    assert "no base and no teacher" in verdict(scores_of(mine=models["mine"]))["sentence"]


def test_the_margin_is_that_of_the_option() -> None:
    scores = scores_of(**drawn(shift=-0.3, n=200))
    assert [verdict(scores, margin)["kind"] for margin in (0.01, 0.2)] == ["lost", "kept"]
    for margin in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="--margin is .* between 0 and 1"):
            check_margin(margin)


def test_nothing_scored_says_why() -> None:
    rows = [
        {"model": m, "status": s, "reason": "SC: HTTP 400: \x1b[31mtoo long\nfor me" if s == "failed" else "x"}
        for m in ("base", "mine")
        for s in ("failed", "failed", "missing", "ok")
    ]
    why = unscored([*rows, {"model": "mine", "status": "missing", "reason": "no judge was asked"}])
    assert why[0] == {"reason": "SC: HTTP 400: [31mtoo long for me", "status": "failed", "count": 4}
    assert len(why) == 2 and why[1]["status"] == "missing"
    scores = scores_of(base={"a": [None] * 9}, mine={"a": [None] * 9}) | {"unscored": why}
    told = verdict(scores)
    assert told["kind"] == "unknown" and "nothing was scored (SC: HTTP 400: " in told["sentence"]
    assert nothing_scored(scores) and not nothing_scored(scores | {"unscored": []})
    assert not nothing_scored(scores_of(**drawn()) | {"unscored": why})


def test_everything_prints_the_same_words_and_the_same_worst_category(tmp_path: Path) -> None:
    folder = judged(tmp_path, items=44, size=(64, 48), files=2)
    scores, rows = load(folder)
    scores["verdict"] = told = verdict(scores, 0.1)
    assert verdict_of(scores) is told and "10 % of the scale" in told["sentence"]
    printed = io.StringIO()
    print_table(scores, Console(file=printed, width=600))
    worst = told["sentence"].partition("Worst category: ")[2].rstrip(".")
    assert told["sentence"] in printed.getvalue() and printed.getvalue().count(worst) == 2
    assert told["sentence"] in markdown_of(scores).replace("\\", "")
    assert told["sentence"] in page(scores, rows, Thumbnails(folder), 0)
