"""The tables beside the report: every number in them is the one in `scores.json`."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from report_folders import HOSTILE, judged, scenes

from danceopd.bench.report import charts, facts
from danceopd.bench.report.export import FIGURE, csv_of, export, figures, latex_of, markdown_of
from danceopd.bench.report.verdict import verdict
from danceopd.bench.results import load


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return load(scenes(tmp_path_factory.mktemp("scenes"), each=2))[0]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return load(judged(tmp_path_factory.mktemp("judged"), items=44, size=(64, 48), files=2))[0]


def test_the_files_lie_beside_the_scores(scores: dict, tmp_path: Path) -> None:
    assert [p.name for p in export(tmp_path, scores)] == ["scores.csv", "scores.md", "scores.tex"]
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8") == csv_of(scores)


@pytest.mark.parametrize("which", ["scores", "edits"])
def test_csv_has_every_figure_to_the_last_digit(which: str, request: pytest.FixtureRequest) -> None:
    scores = request.getfixturevalue(which)
    rows = list(csv.DictReader(io.StringIO(csv_of(scores))))
    found = {(r["kind"], r["capability"], r["name"], r["model"], r["against"]): r for r in rows}
    assert len(found) == len(rows) == len(list(figures(scores)))

    def same(figure: dict, *place: str) -> None:
        row = found[place]
        for key in FIGURE:
            assert row[key] == ("" if figure.get(key) is None else str(figure[key])), (place, key)

    for capability in facts.capabilities(scores):
        for model in scores["models"]:
            same(model[capability]["overall"], "score", capability, "overall", model["name"], "")
            for name, figure in model[capability]["categories"].items():
                same(figure, "category", capability, name, model["name"], "")
        for other, delta in scores["comparison"][capability]["deltas"].items():
            same(delta, "difference", capability, "overall", "student", other)
            for name, figure in delta["categories"].items():
                same(figure, "difference", capability, name, "student", other)
        for model in scores["models"] if which == "scores" and capability == "editing" else ():
            same(model[capability]["exact"]["overall"], "exact score", capability, "overall", model["name"], "")
    kinds = {row["kind"] for row in rows}
    assert ("exact difference" in kinds) == (which == "scores")
    assert {"score", "category", "difference"} <= kinds
    if which == "edits":
        assert {"subset", "metric", "interference"} <= kinds
        cell = scores["interference"]["categories"][0]
        same(
            cell["cells"]["student"]["teacher"], "interference", "editing", cell["category"], "student", cell["teacher"]
        )


def test_markdown_prints_the_scores_and_the_best_bold(scores: dict) -> None:
    text = markdown_of(scores)
    lines = {line.split(" | ")[0].strip("| ").replace("\\", ""): line for line in text.splitlines() if line[:2] == "| "}
    for line in facts.score_table(scores, "editing", 3)[:-1]:
        cells = [cell.strip() for cell in lines[line["name"]].strip("|").split("|")[1:]]
        assert cells  # the last table with this name: differences
    right = scores["models"][-1]["editing"]["exact"]["overall"]["mean"]
    assert "## Editing, share with all facts right\n" in text
    assert f"editing, all facts right {right:.2f}" in text
    table = text.split("## Editing, score from 0 to 10")[1].split("##")[0]
    for line in facts.score_table(scores, "editing", 3):
        row = next(r for r in table.splitlines() if r.replace("\\", "").startswith(f"| {line['name']} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        for model, cell in zip(scores["models"], cells, strict=True):
            figure = line["cells"][model["name"]]
            words = f"{figure['mean']:.3f} \\[{figure['low']:.3f}, {figure['high']:.3f}\\]"
            assert cell == (f"**{words}**" if model["name"] in line["best"] else words)
    best = facts.score_table(scores, "editing", 3)[-1]["best"]
    means = {m["name"]: m["editing"]["overall"]["mean"] for m in scores["models"]}
    assert max(means, key=lambda name: means[name]) in best
    assert verdict(scores)["sentence"].split(":")[0] in text


def test_latex_is_whole_and_says_the_same(scores: dict) -> None:
    text = latex_of(scores)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") >= 4
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    table = text.split("Editing, score from 0 to 10")[1].split(r"\end{table}")[0]
    row = next(r for r in table.splitlines() if r.startswith("overall &"))
    assert table.splitlines()[table.splitlines().index(row) - 1] == r"\midrule"
    line = facts.score_table(scores, "editing", 3)[-1]
    for model, cell in zip(scores["models"], row.removesuffix(r" \\").split(" & ")[1:], strict=True):
        figure = line["cells"][model["name"]]
        mean = f"{figure['mean']:.3f}"
        words = rf"\textbf{{{mean}}}" if model["name"] in line["best"] else mean
        assert cell == rf"{words} {{\scriptsize {{[}}{figure['low']:.3f}, {figure['high']:.3f}{{]}}}}"


def test_words_cannot_break_out_of_a_table(edits: dict) -> None:
    """The base's label and the judge's name are hostile, and so is a category here."""
    edits["models"][0]["label"] = HOSTILE + " | \\input{/etc/passwd} % $x$ & \\\\ \n=1+1"
    text = latex_of(edits)
    assert r"\input" not in text.replace(r"\textbackslash{}input", "")
    columns = {line.count(" & ") - line.count(r"\& ") for line in text.splitlines() if line.endswith(r" \\")}
    assert columns <= {3, 4, 5}
    head = next(line for line in markdown_of(edits).splitlines() if line.startswith("| | ") and "passwd" in line)
    assert len(re.findall(r"(?<!\\)\|", head)) == 1 + 1 + len(edits["models"])
    assert "<script" not in markdown_of(edits).replace("\\<script", "")
    edits["models"][0]["name"] = "=HYPERLINK(1)"
    assert "\n=H" not in csv_of(edits) and ",=H" not in csv_of(edits) and "'=HYPERLINK(1)" in csv_of(edits)


def test_the_matrix_is_what_the_bench_wrote(edits: dict) -> None:
    drawn, told = charts.matrix(edits), edits["interference"]
    assert len(drawn["rows"]) == len(told["teachers"]) + len(told["categories"]) > 2
    for row in told["categories"]:
        mine = next(r for r in drawn["rows"] if r["name"] == row["category"] and r["teacher"] == row["teacher"])
        for model, cell in row["cells"].items():
            assert mine["cells"][model]["teacher"] == cell["teacher"]
    assert charts.matrix(edits | {"interference": None}) is None


def test_a_radar_point_stands_where_its_mean_is(scores: dict) -> None:
    charts.assign_colours(scores["models"])
    found = charts.radar(scores, "editing")
    student = next(s for s in found["shapes"] if s["role"] == "student")
    means = facts.student_of(scores)["editing"]["categories"]
    assert [ray["name"] for ray in found["rays"]] == list(means)
    for (x, y), figure in zip(student["points"], means.values(), strict=True):
        assert (x * x + y * y) ** 0.5 == pytest.approx(charts.RADIUS * figure["mean"] / 10, abs=0.1)
    assert student["points"][0][0] == pytest.approx(0, abs=0.1)


def test_bars_and_differences_start_at_the_scale(scores: dict) -> None:
    charts.assign_colours(scores["models"])
    scores = scores | {"suite": scores["suite"] | {"scale": {"editing": [1, 5]}}}
    bar = charts.bars(scores, "editing")[0]["bars"][0]
    mean = scores["models"][0]["editing"]["overall"]["mean"]
    part = min(1, max(0, (mean - 1) / 4))
    assert bar["end"] == pytest.approx(charts.LEFT + charts.WIDTH * part, abs=0.1)
    drawn = charts.differences(scores, "editing")
    whole = drawn["rows"][0]["marks"][0]
    assert whole["x"] == pytest.approx(charts.MIDDLE + charts.HALF * whole["value"]["mean"] / drawn["limit"], abs=0.1)
