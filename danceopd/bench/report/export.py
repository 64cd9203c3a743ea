"""The tables beside the report: `scores.json` goes in, `scores.csv`, `scores.md` and `scores.tex` come out.

The CSV has a line for each figure, with every digit of `scores.json`. Markdown and LaTeX print means with 95 %
intervals, the best of each line in bold; the LaTeX needs only `booktabs` and is meant to be `\\input`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danceopd.bench.report import charts, facts
from danceopd.bench.report.verdict import verdict_of
from danceopd.common.files import disk_errors, write_atomic

DIGITS = 3
COLUMNS = ("kind", "capability", "name", "model", "against", "mean", "low", "high", "lower", "upper", "n", "failed")
FIGURE = COLUMNS[5:]


def export(folder: str | Path, scores: Mapping[str, Any]) -> list[Path]:
    """Write the three tables into a bench's folder; returns their paths."""
    written = []
    for suffix, make in (("csv", csv_of), ("md", markdown_of), ("tex", latex_of)):
        path = Path(folder) / f"scores.{suffix}"
        with disk_errors(path):
            write_atomic(path, make(scores).encode("utf-8"))
        written.append(path)
    return written


def figures(scores: Mapping[str, Any]) -> Iterator[dict]:
    """Every figure of `scores.json` as a flat record: {kind, capability, name, model, against} and the figure."""

    def record(kind: str, capability: str, name: str, model: str, figure: Any, against: str = "") -> dict:
        place = dict(zip(COLUMNS, (kind, capability, name, model, against)))
        return place | {key: figure.get(key) for key in FIGURE}

    for of, capability in facts.measures(scores).values():
        exact = "" if of is scores else "exact "
        for model in of["models"]:
            found = model.get(capability)
            if not found:
                continue
            for kind, name, figure in (
                ("score", facts.OVERALL, found["overall"]),
                *(("group", name, figure) for name, figure in (found.get("groups") or {}).items()),
                *(("category", name, figure) for name, figure in found["categories"].items()),
            ):
                yield record(exact + kind, capability, name, model["name"], figure)
        comparison = (of.get("comparison") or {}).get(capability) or {"deltas": {}}
        student = facts.student_of(scores)["name"]
        for other, found in comparison["deltas"].items():
            yield record(f"{exact}difference", capability, facts.OVERALL, student, found, other)
            for name, figure in found["categories"].items():
                yield record(f"{exact}difference", capability, name, student, figure, other)
    for name, by_capability in (scores.get("subsets") or {}).items():
        for capability, models in by_capability.items():
            for model, figure in models.items():
                yield record("subset", capability, name, model, figure)
    for capability, by_model in (scores.get("metrics") or {}).items():
        for model, found in by_model.items():
            for name, figure in found.items():
                yield record("metric", capability, name, model, figure)
    for row in (scores.get("interference") or {}).get("categories") or ():
        for model, cell in row["cells"].items():
            for against in ("teacher", "base"):
                other = row["teacher"] if against == "teacher" else facts.base_of(scores) or ""
                yield record("interference", row["capability"], row["category"], model, cell[against], other)
    for name, probe in (scores.get("probes") or {}).items():
        for model, figure in probe["models"].items():
            yield record("probe", probe["capability"], name, model, figure)


def csv_of(scores: Mapping[str, Any]) -> str:
    """The CSV: a line for each figure; a field is empty where there is no number."""
    stream = io.StringIO(newline="")
    out = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    out.writeheader()
    for record in figures(scores):
        out.writerow({key: _cell(value) for key, value in record.items()})
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """A field; text that a spreadsheet would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


@dataclass(frozen=True)
class _Table:
    """One printed table; a cell is its text and whether it is the best of its row."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]
    note: str = ""


def _tables(scores: Mapping[str, Any]) -> Iterator[_Table]:
    """Every table that is printed."""
    for of, capability in facts.measures(scores).values():
        models = [m for m in of["models"] if m.get(capability)]
        rows = [
            (line["name"], [(_text(line["cells"][m["name"]]), m["name"] in line["best"]) for m in models])
            for line in facts.score_table(of, capability, DIGITS)
        ]
        title = f"{facts.CAPABILITIES[capability]}, {facts.measure(of, capability)}"
        yield _Table(title, [m["label"] for m in models], rows)
        deltas = ((of.get("comparison") or {}).get(capability) or {"deltas": {}})["deltas"]
        names = [name for name in deltas if deltas[name].get("mean") is not None]
        if names:
            own = facts.student_of(of)[capability]["categories"]
            rows = [
                (category, [(_text(_difference(deltas[n], category), sign=True), False) for n in names])
                for category in (*own, facts.OVERALL)
            ]
            title += f", {facts.student_of(scores)['label']} minus other models"
            yield _Table(title, [facts.label(scores, n) for n in names], rows)
    matrix = charts.matrix(scores)
    if matrix:
        names = matrix["columns"]
        rows = [(row["name"], [(_interference(row["cells"].get(n)), False) for n in names]) for row in matrix["rows"]]
        title = "Interference, difference from the teacher whose categories they are"
        note = "; ".join(f"{word}: {text}" for word, text in scores["interference"]["verdicts"].items())
        yield _Table(title, [facts.label(scores, n) for n in names], rows, note)
    apart = {"Subsets": facts.subsets(scores), "Held-out items and probes": facts.separate(scores)}
    for title, found in apart.items():
        if found:
            names = [m["name"] for m in scores["models"]]
            rows = [(line["name"], [(_text(line["cells"][n]), False) for n in names]) for line in found]
            yield _Table(title, [m["label"] for m in scores["models"]], rows)


def _difference(delta: Mapping[str, Any], category: str) -> Mapping[str, Any] | None:
    return delta if category == facts.OVERALL else delta["categories"].get(category)


def _interference(cell: Mapping[str, Any] | None) -> str:
    return "–" if cell is None else f"{_text(cell['teacher'], sign=True)}, {cell['verdict']}"


def _text(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    """A figure with its interval: 0.849 [0.820, 0.877]; its mean alone if it has no interval."""
    if not figure or figure.get("mean") is None:
        return "–"
    mean, low, high = (
        facts.number(v, DIGITS, sign) if (v := figure.get(k)) is not None else "" for k in ("mean", "low", "high")
    )
    missing = f" ({figure['failed']} failed)" if figure.get("failed") else ""
    return f"{mean} [{low}, {high}]{missing}" if low else f"{mean}{missing}"


def markdown_of(scores: Mapping[str, Any]) -> str:
    """The Markdown: the verdict and the tables."""
    suite = scores["suite"]
    parts = [
        f"# {_md(facts.student_of(scores)['label'])} on {_md(suite['name'])} {_md(suite['version'])}",
        _md(verdict_of(scores)["sentence"]),
        _md(facts.overall_sentence(scores)),
    ]
    for table in _tables(scores):
        lines = [f"| | {' | '.join(map(_md, table.columns))} |", f"|---|{'---:|' * len(table.columns)}"]
        for name, cells in table.rows:
            texts = (f"**{_md(text)}**" if best else _md(text) for text, best in cells)
            lines.append(f"| {_md(name)} | {' | '.join(texts)} |")
        parts.append(f"## {_md(table.title)}\n\n" + "\n".join(lines))
        parts += [_md(f"{table.note}.")] if table.note else []
    parts.append(
        "Brackets are 95 % intervals; the best of each line is bold. "
        f"Protocol {_md(suite['protocol'])}; {_md(scores.get('created') or '')}."
    )
    return "\n\n".join(parts) + "\n"


MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_{}<>|#~"} | {"\n": " ", "\r": " ", "[": "\\[", "]": "\\]"})
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", '"': "''", "\n": " ", "\r": " ", "−": "$-$", "–": "--", "[": "{[}", "]": "{]}"}
)


def _md(text: str) -> str:
    return str(text).translate(MARKDOWN)


def _tex(text: str) -> str:
    return str(text).translate(LATEX)


def _tex_cell(text: str, best: bool) -> str:
    mean, _, rest = text.partition(" ")
    words = rf"\textbf{{{_tex(mean)}}}" if best else _tex(mean)
    return rf"{words} {{\scriptsize {_tex(rest)}}}" if rest else words


def latex_of(scores: Mapping[str, Any]) -> str:
    """The LaTeX: a `table` with booktabs rules for each table."""
    suite = scores["suite"]
    about = f"{facts.student_of(scores)['label']!a} on {suite['name']!a} {suite['version']!a}"
    parts = [f"% {about}; needs \\usepackage{{booktabs}}"]
    name_of_suite = f"{_tex(suite['name'])} {_tex(suite['version'])}"
    for table in _tables(scores):
        body: list[str] = []
        for name, cells in table.rows:
            if name == facts.OVERALL and body:
                body.append(r"\midrule")
            body.append(" & ".join([_tex(name), *(_tex_cell(*cell) for cell in cells)]) + r" \\")
        note = f" {_tex(table.note)}." if table.note else ""
        lines = [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{_tex(table.title)} ({name_of_suite}), 95\,\% intervals.{note}}}",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(["", *map(_tex, table.columns)]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
