"""A comparison of two benches as tables and words: rows of text for the terminal, compare.md and compare.html."""

from __future__ import annotations

from danceopd.bench.evidence.people import sentences
from danceopd.bench.report.facts import ALL_RIGHT
from danceopd.bench.report.table import why_unscored
from danceopd.bench.report.verdict import SIGN

HEADS = ("category", "n", "A", "B", "A - B", "95%", "W/L/T", "p")


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None, sign: bool = False) -> str:
    """A figure with two digits; a dash for None."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.2f}"


def _cells(name: str, figure: dict, a: dict | None, b: dict | None) -> list[str]:
    """One row of a table, under `HEADS`."""
    interval = "-" if figure["mean"] is None else f"{figure['low']:+.2f} to {figure['high']:+.2f}"
    sides = [number(s["mean"]) if s else "-" for s in (a, b)]
    record = f"{figure['wins']}/{figure['losses']}/{figure['ties']}"
    return [name, str(figure["n"]), *sides, number(figure["mean"], True), interval, record, _p(figure["p"])]


def tables(found: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of text under `HEADS`) of every table; the last row is that of all categories."""
    made = []
    measures = []
    for capability, parts in found["capabilities"].items():
        measures.append((capability.capitalize(), parts))
        if "exact" in parts:
            measures.append((f"{capability.capitalize()}, share with {ALL_RIGHT}", parts["exact"]))
    for title, parts in measures:
        sides, difference = (parts["a"], parts["b"]), parts["difference"]
        rows = [
            _cells(category, figure, *(s["categories"].get(category) if s else None for s in sides))
            for category, figure in difference["categories"].items()
        ]
        rows.append(_cells("all", difference, *(s["overall"] if s else None for s in sides)))
        made.append((title, rows))
    apart = [_cells(name, figure, None, None) for name, figure in found["probes"].items()]
    apart += [_cells(f"held out, {name}", figure, None, None) for name, figure in found["heldout"].items()]
    if apart:
        made.append(("Held-out items and probes", apart))
    for capability, figure in (found.get("votes") or {"capabilities": {}})["capabilities"].items():
        if figure:
            rows = [_cells(category, part, None, None) for category, part in figure["categories"].items()]
            made.append((f"Votes of the judge, {capability}", [*rows, _cells("all", figure, None, None)]))
    for capability, figure in (found.get("people") or {"capabilities": {}})["capabilities"].items():
        if figure:
            rows = [_cells(category, part, None, None) for category, part in figure["categories"].items()]
            made.append((f"Votes of people, {capability}", [*rows, _cells("all", figure, None, None)]))
    return made


def notes(found: dict) -> list[str]:
    """The lines below the tables: the sides, failures, metrics, votes, other differences."""
    made = [f"{s.upper()}: {found[s]['model']} of {found[s]['folder']}" for s in "ab"]
    made.append("A - B: mean paired difference with its 95 % interval; W/L/T: wins, losses and ties of A; p: sign test")
    made.append("all: the unweighted mean of the categories")
    for capability, parts in found["capabilities"].items():
        if parts["difference"]["failed"]:
            failed = parts["difference"]["failed"]
            made.append(f"{capability}: {failed} items have no score on one or both sides and are in no mean")
        for name, of in parts["metrics"].items():
            if of["low"] > 0 or of["high"] < 0:
                made.append(f"{capability}, {name}: {of['mean']:+.3g} ({of['low']:+.3g} to {of['high']:+.3g})")
    for s, number in found["only"].items():
        if number:
            made.append(f"{number} items are in {s.upper()} only and were left out")
    votes = found.get("votes")
    for capability, of in (votes or {"capabilities": {}})["capabilities"].items():
        if of and of["position"] is not None:
            order = f"{of['position']:.0%} changed with the order of the images"
            made.append(f"{capability} votes: {order}, {of['failed']} failed")
        elif of:
            made.append(f"{capability} votes: none of {of['failed']} could be read")
    made += sentences(found["people"]) if found.get("people") else []
    made += map(why_unscored, (votes or {}).get("unscored") or ())
    if votes and votes["stopped"]:
        made.append(votes["stopped"])
    return made + [f"different {note}" for note in found["notes"]]


def markdown(found: dict) -> str:
    """The text of compare.md."""
    text = [f"# {found['a']['model']} (A) against {found['b']['model']} (B)", ""]
    text += [f"**Not run alike: they differ in {warning}.**" for warning in found["warnings"]]
    text += [f"**{verdict_line(found)}**"]
    for title, rows in tables(found):
        text += ["", f"## {title}", "", f"| {' | '.join(HEADS)} |", "|---" + "|---:" * (len(HEADS) - 1) + "|"]
        text += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*text, "", *(f"- {line}" for line in notes(found))]) + "\n"


def verdict_line(found: dict) -> str:
    """The sign and the sentence of the verdict."""
    return f"{SIGN[found['verdict']['kind']]} {found['verdict']['sentence']}"
