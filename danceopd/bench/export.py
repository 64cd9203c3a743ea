"""The tables of a bench beside its report: `scores.csv`, `scores.md` and `scores.tex`, all from `scores.json`.

The CSV has one line a figure, with every digit that `scores.json` has. Markdown and LaTeX print means with 95 %
intervals, the best of each line bold; the LaTeX needs `booktabs` alone and is meant to be `\\input`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from danceopd.bench import charts, standing
from danceopd.disk import disk_faults, replace_file

DIGITS = 3
COLUMNS = ("kind", "capability", "name", "model", "against", "mean", "low", "high", "lower", "upper", "n", "failed")
FIGURE = COLUMNS[5:]


def export(folder: str | Path, scores: Mapping[str, Any]) -> list[Path]:
    """Write the three tables of `scores.json` into a bench's folder; returns their paths."""
    written = []
    for suffix, make in (("csv", csv_of), ("md", markdown_of), ("tex", latex_of)):
        path = Path(folder) / f"scores.{suffix}"
        with disk_faults(path):
            replace_file(path, make(scores).encode("utf-8"))
        written.append(path)
    return written


def figures(scores: Mapping[str, Any]) -> Iterator[dict]:
    """Every figure of `scores.json`, one flat record each: {kind, capability, name, model, against} and the figure."""

    def record(kind: str, capability: str, name: str, model: str, figure: Any, against: str = "") -> dict:
        place = dict(zip(COLUMNS, (kind, capability, name, model, against)))
        return place | {key: figure.get(key) for key in FIGURE}

    for capability in standing.capabilities(scores):
        for model in scores["models"]:
            found = model.get(capability)
            if not found:
                continue
            for kind, name, figure in (
                ("score", standing.OVERALL, found["overall"]),
                *(("group", name, figure) for name, figure in (found.get("groups") or {}).items()),
                *(("category", name, figure) for name, figure in found["categories"].items()),
            ):
                yield record(kind, capability, name, model["name"], figure)
        comparison = (scores.get("comparison") or {}).get(capability) or {"deltas": {}}
        student = standing.student_of(scores)["name"]
        for other, found in comparison["deltas"].items():
            yield record("difference", capability, standing.OVERALL, student, found, other)
            for name, figure in found["categories"].items():
                yield record("difference", capability, name, student, figure, other)
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
                other = row["teacher"] if against == "teacher" else standing.base_of(scores) or ""
                yield record("interference", row["capability"], row["category"], model, cell[against], other)
    for name, probe in (scores.get("probes") or {}).items():
        for model, figure in probe["models"].items():
            yield record("probe", probe["capability"], name, model, figure)


def csv_of(scores: Mapping[str, Any]) -> str:
    """One line a figure; an empty field is a number that does not exist."""
    stream = io.StringIO(newline="")
    out = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    out.writeheader()
    for record in figures(scores):
        out.writerow({key: _cell(value) for key, value in record.items()})
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """A field; words that a spreadsheet would take for a formula get an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _tables(scores: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[tuple[str, list[tuple[str, bool]]]]]]:
    """(title, columns, rows) of every table; a cell is its words and whether it is the best of its row."""
    for capability in standing.capabilities(scores):
        models = [m for m in scores["models"] if m.get(capability)]
        rows = [
            (line["name"], [(_words(line["cells"][m["name"]]), m["name"] in line["best"]) for m in models])
            for line in standing.lines(scores, capability, DIGITS)
        ]
        title = f"{standing.CAPABILITIES[capability]}, {standing.measure(scores, capability)}"
        yield title, [m["label"] for m in models], rows
        deltas = ((scores.get("comparison") or {}).get(capability) or {"deltas": {}})["deltas"]
        names = [name for name in deltas if deltas[name].get("mean") is not None]
        if names:
            own = standing.student_of(scores)[capability]["categories"]
            rows = [
                (category, [(_words(_difference(deltas[n], category), sign=True), False) for n in names])
                for category in (*own, standing.OVERALL)
            ]
            title = f"{standing.CAPABILITIES[capability]}, student minus"
            yield title, [standing.label(scores, n) for n in names], rows
    matrix = charts.matrix(scores)
    if matrix:
        names = matrix["columns"]
        rows = [(row["name"], [(_interference(row["cells"].get(n)), False) for n in names]) for row in matrix["rows"]]
        title = "Interference, minus the teacher whose categories they are"
        yield title, [standing.label(scores, n) for n in names], rows
    for title, found in (("Subsets", standing.subsets(scores)), ("Held out and probes", standing.apart(scores))):
        if found:
            names = [m["name"] for m in scores["models"]]
            rows = [(line["name"], [(_words(line["cells"][n]), False) for n in names]) for line in found]
            yield title, [m["label"] for m in scores["models"]], rows


def _difference(delta: Mapping[str, Any], category: str) -> Mapping[str, Any] | None:
    return delta if category == standing.OVERALL else delta["categories"].get(category)


def _interference(cell: Mapping[str, Any] | None) -> str:
    return "–" if cell is None else f"{_words(cell['teacher'], sign=True)}, {cell['verdict']}"


def _words(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    """A figure with its interval: 0.849 [0.820, 0.877]; without an interval its mean alone."""
    if not figure or figure.get("mean") is None:
        return "–"
    mean, low, high = (
        standing.number(v, DIGITS, sign) if (v := figure.get(k)) is not None else "" for k in ("mean", "low", "high")
    )
    missing = f" ({figure['failed']} without)" if figure.get("failed") else ""
    return f"{mean} [{low}, {high}]{missing}" if low else f"{mean}{missing}"


def markdown_of(scores: Mapping[str, Any]) -> str:
    """The verdict and the tables as Markdown."""
    suite = scores["suite"]
    parts = [
        f"# {_md(standing.student_of(scores)['label'])} on {_md(suite['name'])} {_md(suite['version'])}",
        _md(standing.verdict(scores)["sentence"]),
        _md(standing.overall_sentence(scores)),
    ]
    for title, columns, rows in _tables(scores):
        head = f"| | {' | '.join(map(_md, columns))} |\n|---|{'---:|' * len(columns)}"
        body = [
            f"| {_md(name)} | {' | '.join(f'**{_md(text)}**' if best else _md(text) for text, best in cells)} |"
            for name, cells in rows
        ]
        parts.append(f"## {_md(title)}\n\n" + "\n".join([head, *body]))
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
    """The tables as LaTeX, each a `table` with booktabs rules."""
    suite = scores["suite"]
    about = f"{standing.student_of(scores)['label']!a} on {suite['name']!a} {suite['version']!a}"
    parts = [f"% {about}; needs \\usepackage{{booktabs}}"]
    for title, columns, rows in _tables(scores):
        body: list[str] = []
        for name, cells in rows:
            if name == standing.OVERALL and body:
                body.append(r"\midrule")
            body.append(" & ".join([_tex(name), *(_tex_cell(*cell) for cell in cells)]) + r" \\")
        parts.append(
            "\n".join(
                [
                    r"\begin{table}[t]",
                    r"\centering\small",
                    rf"\caption{{{_tex(title)} ({_tex(suite['name'])} {_tex(suite['version'])}), 95\,\% intervals.}}",
                    rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
                    r"\toprule",
                    " & ".join(["", *map(_tex, columns)]) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"
