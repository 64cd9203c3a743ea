"""Comparisons against answers that are known: by hand, by simulation, and by the numbers of earlier benches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danceopd.bench import compare as versus
from danceopd.bench import statistics
from danceopd.bench.interference import interference
from danceopd.bench.judges.protocol import Answer
from danceopd.bench.options import JudgeOptions
from danceopd.bench.pairwise import Pair, questions, tally, vote
from danceopd.cli.compare import markdown, run, show
from danceopd.errors import UserError


def rows_of(capability: str = "editing", **scores: dict[str, list]) -> list[dict]:
    """Rows of `model={category: [score, …]}`; the items are the positions."""
    return [
        {"model": m, "capability": capability, "category": c, "key": f"{c}{n}", "prompt": f"{c} {n}", "score": s}
        for m, by_category in scores.items()
        for c, values in by_category.items()
        for n, s in enumerate(values)
    ]


def drawn() -> list[dict]:
    """Three models of known skill on 12 items in each of two categories."""
    rng, rows = np.random.default_rng(7), []
    for model, skill in (("base", 0.3), ("teacher", 0.8), ("student", 0.7)):
        for category in ("cut", "paint"):
            for n in range(12):
                key = {"model": model, "category": category, "key": f"{category}{n}", "probe": None}
                value = float(np.clip(10 * skill + rng.normal(0, 2), 0, 10))
                rows.append(key | {"capability": "editing", "group": "local", "score": value})
                rows.append(key | {"capability": "generation", "score": float(rng.random() < skill)})
    return rows


# --- means ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_earlier_benches_stand() -> None:
    """What version 1 of the bench said of the same rows."""
    rows = drawn()
    edit = statistics.summary(rows, "student", "editing")["overall"]
    assert [edit[k] for k in ("mean", "n", "low", "high")] == [6.679024, 24, 5.909559, 7.41237]
    draw = statistics.summary(rows, "student", "generation")
    assert [draw["overall"][k] for k in ("mean", "low", "high")] == [0.75, 0.590871, 0.909129]
    assert [draw["categories"]["cut"][k] for k in ("mean", "low", "high")] == [0.666667, 0.390622, 0.86188]
    found = statistics.comparison(rows, "student", "base", ["teacher"], ["base", "teacher"], "editing")
    assert found["gap_closed"] == {"share": 0.787172, "low": 0.634134, "high": 0.959697, "teacher": "teacher"}
    delta = found["deltas"]["teacher"]
    assert [delta[k] for k in ("mean", "low", "high")] == [-1.246009, -2.24276, -0.214606]
    assert [delta[k] for k in ("wins", "losses", "ties")] == [8, 16, 0]
    cut = found["against_best"]["cut"]
    assert [cut[k] for k in ("n", "mean", "low", "high")] == [12, -1.30728, -2.532278, -0.160388]


def test_failures_are_counted_bounded_and_in_no_mean() -> None:
    found = statistics.mean([4.0, None, 8.0, None], share=False)
    assert [found[k] for k in ("mean", "n", "failed", "lower", "upper")] == [6.0, 2, 2, 3.0, 8.0]
    five = statistics.mean([3.0, None], False, (1, 5))
    assert (five["lower"], five["upper"]) == (2.0, 4.0)
    nothing = statistics.mean([None, None], share=True)
    assert nothing == {"mean": None, "n": 0, "low": None, "high": None, "failed": 2, "lower": 0.0, "upper": 1.0}
    whole = statistics.macro([[1, 1], [None, None]], share=True)
    assert (whole["mean"], whole["failed"], whole["lower"], whole["upper"]) == (1.0, 2, 0.5, 1.0)
    rows = rows_of(student={"cut": [2.0, None, float("nan"), 4.0]}, base={"cut": [1.0, 1.0, 1.0, None]})
    assert statistics.summary(rows, "student", "editing")["overall"]["failed"] == 2
    paired = statistics.delta(rows, "student", "base", "editing")
    assert (paired["mean"], paired["n"], paired["failed"], paired["wins"]) == (1.0, 1, 3, 1)
    assert paired["lower"] == pytest.approx((1 - 30) / 4) and paired["upper"] == pytest.approx((1 + 30) / 4)
    json.dumps(paired, allow_nan=False)


def test_the_macro_mean_weighs_categories_alike() -> None:
    few, many = [1.0, 2.0, 3.0], [7.0, 9.0]
    mean = statistics.macro([few, many], share=False)["mean"]
    assert mean == 5.0
    assert statistics.macro([many, few], share=False)["mean"] == mean  # order of the categories
    assert statistics.macro([few * 30, many], share=False)["mean"] == mean  # how many items one has
    shifted = statistics.macro([[v + 1 for v in few], [v + 1 for v in many]], share=False)
    plain = statistics.macro([few, many], share=False)
    assert [shifted[k] - plain[k] for k in ("mean", "low", "high")] == pytest.approx([1, 1, 1], abs=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_intervals_cover_the_truth_95_times_in_100(share: bool) -> None:
    """Six categories of 40 items with different means and spreads: the size of GEdit's."""
    rng, hits, runs = np.random.default_rng(0), 0, 300
    levels = np.array([0.3, 0.5, 0.6, 0.7, 0.8, 0.45])
    for _ in range(runs):
        if share:
            groups, truth = [(rng.random(40) < p).astype(float) for p in levels], levels.mean()
        else:
            groups, truth = [10 * rng.beta(2 * p, 2 * (1 - p), 40) for p in levels], 10 * levels.mean()
        found = statistics.macro([list(g) for g in groups], share)
        hits += found["low"] <= truth <= found["high"]
    assert 0.91 <= hits / runs <= 0.985  # 95 %, give or take three standard errors of the simulation


def test_paired_intervals_cover_and_are_narrower_than_unpaired() -> None:
    rng, hits, runs, wide = np.random.default_rng(1), 0, 200, []
    for _ in range(runs):
        hard = [rng.uniform(0, 8, 40) for _ in range(4)]
        student = {f"c{i}": list(h + 0.5 + rng.normal(0, 1, 40)) for i, h in enumerate(hard)}
        found = statistics.difference(
            {c: dict(enumerate(v)) for c, v in student.items()},
            {f"c{i}": dict(enumerate(h)) for i, h in enumerate(hard)},
            (0.0, 10.0),
        )
        hits += found["low"] <= 0.5 <= found["high"]
        wide.append(found["high"] - found["low"])
    assert 0.90 <= hits / runs <= 0.99
    alone = statistics.macro([list(v) for v in student.values()], share=False)
    assert np.mean(wide) < 0.6 * (alone["high"] - alone["low"])


def test_the_sign_test_is_exact() -> None:
    assert statistics.sign_test(0, 0) == 1.0 and statistics.sign_test(4, 4) == 1.0
    assert statistics.sign_test(5, 0) == statistics.sign_test(0, 5) == pytest.approx(2 / 2**5)
    assert statistics.sign_test(10, 1) == pytest.approx(2 * (1 + 11) / 2**11)
    assert statistics.sign_test(700, 600) == pytest.approx(0.0060, abs=3e-4)  # large counts do not overflow


# --- what a merge needs to know ---------------------------------------------------------------------------------


def test_gaps_and_the_best_teacher_of_each_category() -> None:
    rows = rows_of(
        base={"cut": [2.0] * 9, "paint": [2.0] * 9},
        cutter={"cut": [8.0] * 9, "paint": [3.0] * 9},
        painter={"cut": [2.0] * 9, "paint": [10.0] * 9},
        student={"cut": [7.0] * 9, "paint": [4.0] * 9},
    )
    others = ["base", "cutter", "painter"]
    found = statistics.comparison(rows, "student", "base", ["cutter", "painter"], others, "editing")
    assert {t: g["share"] for t, g in found["gaps"].items()} == pytest.approx({"cutter": 1.0, "painter": 0.875})
    assert found["best_teacher"] == "painter" and found["gap_closed"] == found["gaps"]["painter"]
    best = found["against_best"]
    assert [(best[c]["teacher"], best[c]["mean"]) for c in ("cut", "paint")] == [("cutter", -1.0), ("painter", -6.0)]
    assert found["heldout"] is None


def test_held_out_items_stand_apart() -> None:
    rows = rows_of(student={"cut": [8.0] * 10, "paint": [6.0] * 10}, base={"cut": [4.0] * 10, "paint": [4.0] * 10})
    plain = statistics.summary(rows, "student", "editing")
    cut = [row for row in rows if row["category"] == "cut"]
    odd = [row | {"key": row["key"] + "h", "heldout": True, "score": row["score"] - 3} for row in cut]
    odd[0]["probe"] = "held-out operation"
    assert statistics.summary(rows + odd, "student", "editing") == plain
    found = statistics.comparison(rows + odd, "student", "base", [], ["base"], "editing")["heldout"]
    mine = found["models"]["student"]
    assert found["categories"] == ["cut"] and mine["heldout"]["mean"] == 5.0 and mine["heldout"]["n"] == 10
    assert mine["seen"]["mean"] == 8.0  # in the categories that are held out, not of all
    assert mine["drop"] == {"mean": -3.0, "low": -3.0, "high": -3.0}
    assert found["deltas"]["base"]["mean"] == 4.0


def test_subsets_are_categories_and_tags() -> None:
    rows = rows_of(student={"cut": [8.0, 2.0], "paint": [6.0, 4.0]})
    for row in rows[::2]:
        row["tags"] = ("en", "intersection")
    named = {"paper": ("cut",), "en": ("tag:en",), "both": ("cut", "tag:en"), "all": ("cut", "paint")}
    named["cn"] = ("tag:cn",)
    found = statistics.subsets(rows, ["student"], "editing", named)
    assert {k: v["student"]["mean"] for k, v in found.items()} == {"paper": 5.0, "en": 7.0, "both": 8.0, "all": 5.0}


def interfering(n: int = 40) -> list[dict]:
    rng = np.random.default_rng(3)
    hard = {c: rng.uniform(2, 5, n) for c in ("cut", "paint", "style")}
    gains = {
        "base": (0, 0, 0),
        "cutter": (4, 0, 0),
        "painter": (-2, 3, 0),
        "student": (2, 3, 0),
        "blend": (-1, 0, 0.0),
    }
    return rows_of(
        **{
            model: {c: list(hard[c] + gain + rng.normal(0, 0.3, n)) for c, gain in zip(hard, gain_of)}
            for model, gain_of in gains.items()
        }
    )


def test_interference_names_what_was_kept_and_lost() -> None:
    found = interference(interfering(), "student", "base", ["cutter", "painter"], ["blend"])
    assert found["models"] == ["student", "blend", "cutter", "painter"]
    rows = {(r["teacher"], r["category"]): r for r in found["categories"]}
    assert list(rows) == [("cutter", "cut"), ("painter", "paint")] and all(r["first"] for r in rows.values())
    assert [u["category"] for u in found["unowned"]] == ["style"]
    cut = rows["cutter", "cut"]
    assert cut["gain"]["mean"] == pytest.approx(4, abs=0.2)
    assert {m: cell["verdict"] for m, cell in cut["cells"].items()} == {
        "student": "part",
        "blend": "harmed",
        "painter": "harmed",
    }
    assert cut["cells"]["student"]["teacher"]["mean"] == pytest.approx(-2, abs=0.2)
    assert cut["cells"]["student"]["base"]["low"] > 1.8
    assert rows["painter", "paint"]["cells"]["student"]["verdict"] == "kept"
    assert rows["painter", "paint"]["cells"]["blend"]["verdict"] == "lost"
    assert [(t["teacher"], t["categories"]) for t in found["teachers"]] == [("cutter", ["cut"]), ("painter", ["paint"])]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_interference_needs_more_than_noise() -> None:
    few = interference(interfering(5), "student", "base", ["cutter"])
    assert few["categories"] == [] and few["teachers"] == []
    rng = np.random.default_rng(0)
    same = rows_of(**{m: {"cut": list(rng.normal(5, 2, 40))} for m in ("base", "cutter", "student")})
    assert interference(same, "student", "base", ["cutter"])["categories"] == []
    assert interference(same, "student", None, ["cutter"]) is None and interference(same, "student", "base", []) is None


# --- two benches ------------------------------------------------------------------------------------------------


def finished(folder: Path, edits: list, draws: list, seed: int = 0, pictures: bool = False, **scores) -> Path:
    """A finished bench with one student and a base; `scores` replace parts of scores.json."""
    rows = rows_of(student={"cut": edits[: len(edits) // 2], "paint": edits[len(edits) // 2 :]})
    rows += rows_of("generation", student={"count": draws})
    for n, row in enumerate(rows):
        row |= {"seed": seed, "probe": None, "status": "ok", "metrics": {"sharpness": float(n)}, "image": None}
        if pictures:
            row["image"] = f"images/student/{row['key']}.png"
            (folder / "images/student").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (n, seed, len(folder.name))).save(folder / row["image"])
    rows += [row | {"model": "base", "score": 0.0} for row in rows]
    folder.mkdir(exist_ok=True)
    suite = {"name": "dots", "version": "1", "protocol": "00" * 32, "share": {"editing": False, "generation": True}}
    suite["scale"] = {"editing": [0, 10], "generation": [0, 1]}
    about = [{"name": n, "label": n, "role": n, "path": n, "sha256": f"{folder.name} {n}"} for n in ("base", "student")]
    made = {"suite": suite, "seed": seed, "judge": None, "student": "student", "models": about, "call": {"steps": 4}}
    (folder / "scores.json").write_text(json.dumps(made | scores))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture()
def two(tmp_path: Path) -> tuple[Path, Path]:
    a = finished(tmp_path / "a", [8.0, 7.0, 5.0, 5.0, 9.0, 9.0], [1, 1, 1, 0])
    b = finished(tmp_path / "b", [6.0, 6.0, 6.0, 5.0, 9.0, 6.0], [1, 0, 1, 1], call={"steps": 8})
    return a, b


def test_two_benches_are_compared_item_by_item(two, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(*two, tmp_path / "out")
    edits = found["capabilities"]["editing"]["difference"]
    # cut: +2, +1, -1; paint: 0, 0, +3
    assert (edits["wins"], edits["losses"], edits["ties"]) == (3, 1, 2)
    assert edits["mean"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6) and edits["p"] == 0.625
    assert edits["categories"]["cut"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    draws = found["capabilities"]["generation"]
    assert (draws["difference"]["wins"], draws["difference"]["losses"]) == (1, 1)
    assert draws["a"]["overall"]["mean"] == draws["b"]["overall"]["mean"] == 0.75
    assert found["capabilities"]["editing"]["metrics"]["sharpness"]["mean"] == 0
    assert found["notes"] == ["call num_inference_steps: 4 and 8"] and found["warnings"] == []
    assert found["items"][0]["difference"] == -1.0 and len(found["items"]) == 10
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept == json.loads(json.dumps(found, allow_nan=False))
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| all | 6 | 7.17 | 6.33 | +0.83 |" in text and text == markdown(found)
    show(found)
    printed = capsys.readouterr().out
    assert "3/1/2" in printed and "call num_inference_steps: 4 and 8" in printed and "\x1b" not in printed
    assert run(*two, tmp_path / "out")["items"] == found["items"]  # again, into the same folder
    base = run(two[0], two[0], tmp_path / "base", ["student", "base"])
    assert base["capabilities"]["editing"]["difference"]["wins"] == 6


def test_snapshots_of_a_judge_that_differ_are_said(two, tmp_path: Path) -> None:
    for folder, name in zip(two, ("m-2025-04-14", "m-2025-06-01")):
        scores = json.loads((folder / "scores.json").read_text()) | {"judging": {"usage": {"judges": {name: 8}}}}
        (folder / "scores.json").write_text(json.dumps(scores))
    assert run(*two, tmp_path / "out")["notes"][0] == "judge snapshots: m-2025-04-14 and m-2025-06-01"


def test_one_key_in_two_categories_is_two_pairs(two) -> None:
    for folder in two:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"key": f"{row['capability']}{n % 3}"}) for n, row in enumerate(rows[:6])]
        (folder / "samples.jsonl").write_text("\n".join(lines))
    found = versus.pairs(*(versus.load_side(folder) for folder in two))
    assert len({pair.key for pair in found}) == len(found) == 6


def test_the_other_way_round_is_the_negative(two, tmp_path: Path) -> None:
    one, other = (run(*sides, tmp_path / str(n)) for n, sides in enumerate((two, two[::-1])))
    for capability in ("editing", "generation"):
        a, b = (f["capabilities"][capability]["difference"] for f in (one, other))
        assert a["mean"] == -b["mean"] and (a["wins"], a["losses"]) == (b["losses"], b["wins"]) and a["p"] == b["p"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": {"name": "spots", "version": "1", "protocol": "00" * 32}}, r"suite \(dots and spots\)"),
        ({"suite": {"name": "dots", "version": "2", "protocol": "00" * 32}}, "suite version"),
        ({"suite": {"name": "dots", "version": "1", "protocol": "ff" * 32}}, "protocol"),
        ({"seed": 3}, r"seed \(0 and 3\)"),
        ({"judge": {"kind": "openai", "model": "x"}}, "only one bench has one"),
    ],
)
def test_benches_that_were_not_asked_alike_are_refused(two, tmp_path: Path, changes: dict, words: str) -> None:
    scores = json.loads((two[1] / "scores.json").read_text()) | changes
    (two[1] / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=f"not run alike.*{words}.*--anyway"):
        run(*two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = run(*two, tmp_path / "out", anyway=True)
    assert len(found["warnings"]) == 1 and "Not run alike" in markdown(found)


def test_whose_answers_were_recorded_counts_not_the_file(two) -> None:
    def judged(folder: Path, identity: dict) -> versus.Side:
        scores = json.loads((folder / "scores.json").read_text()) | {"judge": identity}
        (folder / "scores.json").write_text(json.dumps(scores))
        return versus.load_side(folder)

    asked = {"kind": "openai", "model": "m-1", "temperature": 0}
    replayed = {"kind": "replay", "files": {"judge.jsonl": "ab"}, "recorded": [asked]}
    assert versus.setup_differences(judged(two[0], asked), judged(two[1], replayed)) == []
    other = replayed | {"recorded": [asked | {"model": "m-2"}]}
    assert versus.setup_differences(judged(two[0], asked), judged(two[1], other)) == ["judge (model m-1 and m-2)"]


def test_bad_input_is_one_sentence(two, tmp_path: Path) -> None:
    a, b = two
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    run(a, b, tmp_path / "done")
    stranger = finished(tmp_path / "c", [1.0] * 6, [1] * 4)
    lines = (stranger / "samples.jsonl").read_text().replace('"key": "', '"key": "x')
    (stranger / "samples.jsonl").write_text(lines)
    asked = finished(tmp_path / "d", [1.0] * 6, [1] * 4)  # the same keys, for something else
    lines = (asked / "samples.jsonl").read_text().replace('"prompt": "', '"prompt": "not ')
    (asked / "samples.jsonl").write_text(lines)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "scores.json").write_text('{"models": 3}')
    (tmp_path / "odd" / "samples.jsonl").write_text("")
    cases = [
        ((a, tmp_path / "empty"), {}, "holds no finished bench"),
        ((a, tmp_path / "odd"), {}, "damaged bench \\(scores.json, "),
        ((a, stranger), {}, "no item in common"),
        ((a, asked), {}, "no item in common"),
        ((a, a), {}, "both sides are 'student'"),
        ((a, b), {"models": ["studnt"]}, "no model 'studnt'; did you mean 'student'"),
        ((a, b), {"models": ["a", "b", "c"]}, "--models names 3"),
        ((a, b), {"dry_run": True}, "add --judge"),
        ((a, b), {"judge": JudgeOptions("oracle:x")}, "--judge 'oracle:x' is no judge"),
        ((a, b), {"limit": 0, "judge": JudgeOptions("replay:x")}, "--limit is 0"),
        ((b, a), {"output": tmp_path / "done"}, "holds another comparison"),
        ((a, b), {"output": tmp_path / "full"}, "holds other files"),
    ]
    for sides, more, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            run(*sides, **{"output": tmp_path / "out", **more})
        assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_the_command_line(two, danceopd) -> None:
    found = danceopd("compare", *two, "-o", "out")
    assert found.returncode == 0 and "3/1/2" in found.stdout and "comparison: out" in found.stdout
    refused = danceopd("compare", two[0], two[0].parent)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


# --- a judge's votes --------------------------------------------------------------------------------------------

PAIR = Pair("k", "editing", "cut", "cut it", Path("a.png"), Path("b.png"), Path("s.png"))


def answered(first: str | None, second: str | None, pair: Pair = PAIR) -> dict[str, list[Answer]]:
    """What a judge chose when A was first, and when B was."""
    return {
        f"pair/{pair.capability}/{pair.key}/{order}": [Answer("", "refused" if c is None else "ok", choice=c)]
        for order, c in (("ab", first), ("ba", second))
    }


def test_each_pair_is_asked_in_both_orders() -> None:
    one, other = questions([PAIR])
    assert [p for p in one.parts if isinstance(p, Path)] == [Path("s.png"), Path("a.png"), Path("b.png")]
    assert [p for p in other.parts if isinstance(p, Path)] == [Path("s.png"), Path("b.png"), Path("a.png")]
    assert one.text == other.text and "cut it" in one.text and one.reads.choices == ("A", "B", "tie")
    assert len({q.key for q in (one, other)}) == 2
    assert list(questions([Pair("k", "editing", "cut", "cut it", None, Path("b.png"))])) == []


@pytest.mark.parametrize(
    ("choices", "result", "status"),
    [
        (("A", "B"), 1, "ok"),
        (("B", "A"), -1, "ok"),
        (("A", "A"), 0, "ok"),  # always the first picture: it says nothing about the models
        (("A", "tie"), 0, "ok"),
        (("tie", "tie"), 0, "ok"),
        (("A", None), None, "refused"),
        ((None, None), None, "refused"),
    ],
)
def test_a_vote_counts_when_both_orders_give_it(choices: tuple, result: int | None, status: str) -> None:
    found = vote(PAIR, answered(*choices))
    assert (found["vote"], found["status"]) == (result, status)


def test_repeats_vote_by_majority() -> None:
    answers = answered("A", "B")
    answers["pair/editing/k/ab"] += [Answer("", "ok", choice="B"), Answer("", "ok", choice="A")]
    assert vote(PAIR, answers)["vote"] == 1
    answers["pair/editing/k/ab"] += [Answer("", "ok", choice="B")]
    assert vote(PAIR, answers)["vote"] == 0  # two to two
    assert vote(PAIR, {})["status"] == "missing"


def test_votes_are_tallied_by_category() -> None:
    choices = [("A", "B")] * 8 + [("B", "A")] * 2 + [("A", "A")] * 4 + [("tie", "tie")] * 2 + [(None, "A")]
    pairs = [Pair(str(n), "editing", ("cut", "paint")[n % 2], "p", Path("a"), Path("b")) for n in range(len(choices))]
    votes = [vote(p, answered(*c, p)) for p, c in zip(pairs, choices)]
    found = tally(votes, "editing")
    assert [found[k] for k in ("wins", "losses", "ties", "failed")] == [8, 2, 6, 1]
    assert found["p"] == pytest.approx(0.109375) and found["position"] == 4 / 16
    cut = found["categories"]["cut"]
    assert cut["mean"] == pytest.approx((4 - 1) / 8) and cut["failed"] == 1
    assert cut["upper"] == pytest.approx(4 / 9, abs=1e-6) and tally(votes, "generation") is None


def recorded(file: Path, choices: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps({"key": key, "choice": choice}) + "\n" for key, choice in choices.items()))
    return file


def test_a_judges_votes_are_recorded_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = (finished(tmp_path / n, [5.0] * 6, [1] * 4, pictures=True) for n in ("a", "bb"))

    def keys() -> Iterator[tuple[str, str]]:
        for pair in versus.pairs(versus.load_side(a), versus.load_side(b)):
            wins = pair.category == "cut"
            yield f"pair/{pair.capability}/{pair.key}/ab", "A"
            yield f"pair/{pair.capability}/{pair.key}/ba", "B" if wins else "A"

    judge = JudgeOptions(f"replay:{recorded(tmp_path / 'answers.jsonl', dict(keys()))}")
    planned = run(a, b, tmp_path / "out", judge=judge, dry_run=True)
    assert planned["estimate"]["questions"] == 20 and not (tmp_path / "out").exists()
    found = run(a, b, tmp_path / "out", judge=judge)
    edits = found["votes"]["capabilities"]["editing"]
    assert (edits["wins"], edits["losses"], edits["ties"], edits["position"]) == (3, 0, 3, 0.5)
    assert found["votes"]["judge"]["kind"] == "replay" and len(found["votes"]["items"]) == 10
    show(found)
    assert "Votes of the judge, editing" in capsys.readouterr().out
    few = run(a, b, tmp_path / "few", judge=judge, limit=1)
    assert len(few["votes"]["items"]) == 3  # one of each category


def test_votes_that_nobody_could_read_have_no_p(two, tmp_path: Path, danceopd) -> None:
    unread = tally([vote(PAIR, answered(None, None))], "editing")
    assert (unread["n"], unread["p"], unread["mean"]) == (0, None, None)
    a, b = (finished(tmp_path / n, [5.0] * 6, [1] * 4, pictures=True) for n in ("c", "dd"))
    answers = recorded(tmp_path / "answers.jsonl", {"pair/editing/nobody/ab": "A"})
    done = danceopd("compare", a, b, "-o", "out", "--judge", f"replay:{answers}")
    assert done.returncode == 2 and done.stderr.startswith("error: there is not one vote (")
    assert "run the same command again" in done.stderr
    votes = done.stdout.partition("Votes of the judge")[2]
    assert "1.000" not in votes and "editing votes: none of 6 could be read" in votes


def test_the_verdict_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = (finished(tmp_path / n, [s] * 12, [1] * 6) for n, s in (("a", 3.0), ("b", 6.0)))
    found = run(a, b, tmp_path / "out", margin=0.1)
    told = found["verdict"]
    assert told["kind"] == "lost" and told["margin"] == 0.1
    worse = "Something got worse: overall (editing) −3.00 [−3.00 to −3.00] against B (student)"
    assert told["sentence"].startswith(worse)
    show(found)
    assert told["sentence"][:60] in " ".join(capsys.readouterr().out.split())
    assert told["sentence"] in (tmp_path / "out" / "compare.md").read_text()
    assert run(b, a, tmp_path / "other")["verdict"]["kind"] == "unknown"  # six draws, all right: too few to be sure
    with pytest.raises(UserError, match="--margin is 2"):
        run(a, b, tmp_path / "out", margin=2.0)


def test_fewer_exact_edits_are_a_loss_though_the_mean_score_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = []
    for name, wrong in (("a", 40), ("b", 0)):  # of 80 edits, all at 9 of 10
        folders.append(finished(tmp_path / name, [9.0] * 80, [1] * 60))
        scores = json.loads((folders[-1] / "scores.json").read_text())
        scores["suite"]["exact"] = ["editing"]
        (folders[-1] / "scores.json").write_text(json.dumps(scores))
        rows = [json.loads(line) for line in (folders[-1] / "samples.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | {"correct": n % 80 >= wrong}) + "\n" for n, row in enumerate(rows))
        (folders[-1] / "samples.jsonl").write_text(text)
    found = run(*folders, tmp_path / "out")
    editing = found["capabilities"]["editing"]
    assert editing["difference"]["mean"] == 0 and editing["exact"]["difference"]["mean"] == -0.5
    assert "exact" not in found["capabilities"]["generation"]
    worse = "Something got worse: all facts right (editing) −0.50 [−0.50 to −0.50] against B (student)"
    assert found["verdict"]["kind"] == "lost" and found["verdict"]["sentence"].startswith(worse)
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "## Editing, share with all facts right" in text and "| all | 80 | 0.50 | 1.00 | -0.50 |" in text
    show(found)
    assert "Editing, share with all facts right" in capsys.readouterr().out


def test_a_judge_is_shown_no_picture_from_outside_a_bench(tmp_path: Path) -> None:
    a, b = (finished(tmp_path / n, [5.0] * 6, [1] * 4, pictures=True) for n in ("a", "b"))
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (a / "link.png").symlink_to(tmp_path / "secret.png")
    side = versus.load_side(a)
    assert side.path(side.rows[0]["image"]) is not None
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a\0b", "x" * 5000):
        assert side.path(path) is None
    assert versus.load_side(b).path("../b/" + side.rows[0]["image"]) is not None


GOOD_ROW = {"model": "student", "capability": "editing", "category": "a", "key": "k", "prompt": "p", "score": 1.0}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("scores.json", "[]", "scores.json, as a whole"),
        ("scores.json", "{}", "scores.json, suite: field required"),
        ("scores.json", "null", "scores.json"),
        ("scores.json", '{"a', "scores.json"),
        ("scores.json", "[" * 100_000, "scores.json"),
        ("scores.json", b"\xff\xfe\x00", "scores.json"),
        ("samples.jsonl", "5\n6\n", "samples.jsonl"),
        ("samples.jsonl", bytes(range(256)), "samples.jsonl"),
        ("samples.jsonl", '{"model": "student"}\n', "samples.jsonl, capability: field required"),
        ("samples.jsonl", json.dumps(GOOD_ROW | {"score": "high"}), "samples.jsonl, score"),
        ("samples.jsonl", json.dumps(GOOD_ROW | {"image": 5}), "samples.jsonl, image"),
    ],
)
def test_a_damaged_bench_is_one_sentence(two, file: str, content: str | bytes, words: str) -> None:
    (two[0] / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="holds a damaged bench") as caught:
        versus.load_side(two[0])
    assert words in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"models": []}, {"models": "abc"}, {"models": [{"name": "x"}]}])
def test_a_figure_that_is_no_number_and_models_that_are_none_are_refused(two, change: dict) -> None:
    file = two[0] / "scores.json"
    scores = json.loads(file.read_text())
    for damaged in (scores | change, scores | {"comparison": {"editing": {"deltas": {"base": {"mean": "x"}}}}}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="holds a damaged bench"):
            versus.load_side(two[0])


def test_line_separators_in_words_cut_no_row(two) -> None:
    lines = (two[0] / "samples.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"reason": "one\u2028two\x85three"}
    (two[0] / "samples.jsonl").write_text("\n".join([json.dumps(row, ensure_ascii=False), *lines[1:]]) + "\n")
    assert len(versus.load_side(two[0]).rows) == 10


def test_one_item_of_a_category_is_certain_of_nothing() -> None:
    lone = statistics.difference({"a": {"x": 1.0}}, {"a": {"x": 3.0}}, (0.0, 10.0))
    assert lone is not None and (lone["mean"], lone["low"], lone["high"]) == (-2.0, -10.0, 10.0)
    both = {"a": {"x": 1.0}, "b": {k: 2.0 for k in "pq"}}, {"a": {"x": 3.0}, "b": {k: 3.0 for k in "pq"}}
    found = statistics.difference(*both, (0.0, 10.0))
    assert found is not None and (found["mean"], found["low"], found["high"]) == (-1.5, -5.5, 4.5)
    assert (found["categories"]["b"]["low"], found["categories"]["b"]["high"]) == (-1.0, -1.0)
