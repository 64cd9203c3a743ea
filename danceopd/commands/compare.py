"""`danceopd compare`: two finished benches, item by item, in the terminal and as compare.json and compare.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bench.pairs import Pair, questions, tally, vote
from ..bench.table import progress_bar
from ..bench.versus import pairs, side, versus
from ..disk import disk_faults, replace_file
from ..errors import UserError

OURS = ("compare.json", "compare.md", "judge.jsonl")
HEADS = ("category", "n", "A", "B", "A - B", "95%", "W/L/T", "p")


def run(
    run_a: Path,
    run_b: Path,
    output: Path,
    models: Sequence[str] = (),
    anyway: bool = False,
    judge: str | None = None,
    repeats: int = 1,
    max_cost: float | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    judge_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a model of each bench (its student, or `models`: one name for both, or two), and write `output`.

    A `judge` (`judges.judge_named`) also votes on every pair of pictures, on the first `limit` of each category; an
    interrupted vote goes on where it stopped. `dry_run` says what that would take, writes nothing, and returns with
    `estimate`. Returns what compare.json holds. Raises UserError for anything a user can mend.
    """
    if len(models) > 2:
        raise UserError(f"--models names {len(models)} models; give one for both benches, or two with a comma between")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give 1 or more pairs of each category")
    if judge is None and (dry_run or limit is not None or repeats != 1 or max_cost is not None):
        raise UserError("--dry-run, --limit, --repeats and --max-cost are about the votes of a judge; add --judge")
    names = [*models, *models][:2] if models else [None, None]
    a, b = side(run_a, names[0]), side(run_b, names[1])
    found = versus(a, b, anyway)
    _refuse_foreign(output, found)
    asked = _first(pairs(a, b), limit) if judge else []
    if judge and dry_run:
        session = _session(judge, output, repeats, max_cost, judge_options)
        return found | {"estimate": vars(session.estimate(questions(asked)))}
    found |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found |= {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
    if judge:
        found["votes"] = _votes(_session(judge, output, repeats, max_cost, judge_options), asked)
    with disk_faults(output):
        replace_file(output / "compare.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
        replace_file(output / "compare.md", markdown(found).encode())
    return found


def _refuse_foreign(output: Path, found: dict) -> None:
    """Refuses a folder that holds anything else than this comparison."""
    if output.is_file():
        raise UserError(f"--output {output} is a file; name a folder")
    held = [path.name for path in output.iterdir()] if output.is_dir() else []
    foreign = [name for name in held if name not in OURS and not name.startswith(".")]
    if foreign:
        raise UserError(f"output folder {output} holds what is no comparison ({foreign[0]}); choose another --output")
    if "compare.json" in held:
        try:
            known = json.loads((output / "compare.json").read_text(encoding="utf-8"))
            same = all(known[s][key] == found[s][key] for s in "ab" for key in ("model", "sha256", "created"))
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"output folder {output} holds another comparison; choose another --output, or delete it")


def _first(found: Sequence[Pair], limit: int | None) -> list[Pair]:
    """The first pairs of each category."""
    kept: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        kept.setdefault((pair.capability, pair.category), []).append(pair)
    return [pair for group in kept.values() for pair in group[:limit]]


def judges(one: Path, other: Path) -> None:
    """Prints how far two files of answers agree, by what was asked."""
    from rich.table import Table

    from ..bench.judges import agreement_of_files
    from ..console import wide

    found = agreement_of_files(one, other)
    table = Table(box=None, pad_edge=False)
    heads = ("n", "unread", "exact", "difference", "kappa", "spearman")
    for head in ("asked", *heads):
        table.add_column(head, justify="left" if head == "asked" else "right")
    for aspect, figures in found.items():
        counts = [str(figures[head]) for head in heads[:2]]
        table.add_row(aspect, *counts, *(_number(figures.get(head)) for head in heads[2:]))
    wide().print(table, highlight=False)


def _session(
    judge: str, output: Path, repeats: int, max_cost: float | None, options: Mapping[str, Any] | None
) -> Any:
    from ..bench.judges import Session, judge_named

    return Session(judge_named(judge, **(options or {})), output / "judge.jsonl", repeats, max_cost)


def _votes(session: Any, asked: Sequence[Pair]) -> dict[str, Any]:
    """A judge's votes: `judge`, `capabilities` with their figures, `items`, and what it took."""
    total = sum(1 for _ in questions(asked)) * session.repeats
    done = 0
    with progress_bar() as progress:

        def step(_: Any) -> None:
            nonlocal done
            done += 1
            progress(done, total, "votes")

        answers = session.answers(questions(asked), step)
    votes = [vote(pair, answers) for pair in asked]
    figures = {c: tally(votes, c) for c in dict.fromkeys(pair.capability for pair in asked)}
    about = {"judge": session.judge.identity, "repeats": session.repeats, "capabilities": figures}
    return about | {"usage": session.usage, "stopped": session.stopped, "items": votes}


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.2f}"


def _cells(name: str, figure: dict, a: dict | None, b: dict | None) -> list[str]:
    """One row of a table."""
    interval = "-" if figure["mean"] is None else f"{figure['low']:+.2f} to {figure['high']:+.2f}"
    sides = [_number(s["mean"]) if s else "-" for s in (a, b)]
    record = f"{figure['wins']}/{figure['losses']}/{figure['ties']}"
    return [name, str(figure["n"]), *sides, _number(figure["mean"], True), interval, record, _p(figure["p"])]


def tables(found: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of words under `HEADS`) of everything that was compared; the last row of each is the whole."""
    made = []
    for capability, parts in found["capabilities"].items():
        sides, difference = (parts["a"], parts["b"]), parts["difference"]
        rows = [
            _cells(category, figure, *(s["categories"].get(category) if s else None for s in sides))
            for category, figure in difference["categories"].items()
        ]
        rows.append(_cells("all", difference, *(s["overall"] if s else None for s in sides)))
        made.append((capability.capitalize(), rows))
    apart = [_cells(name, figure, None, None) for name, figure in found["probes"].items()]
    apart += [_cells(f"held out, {name}", figure, None, None) for name, figure in found["heldout"].items()]
    if apart:
        made.append(("Apart from the scores", apart))
    for capability, figure in (found.get("votes") or {"capabilities": {}})["capabilities"].items():
        if figure:
            rows = [_cells(category, part, None, None) for category, part in figure["categories"].items()]
            made.append((f"Votes of the judge, {capability}", [*rows, _cells("all", figure, None, None)]))
    return made


def lines(found: dict) -> list[str]:
    """What is said below the tables: sides, failures, votes, metrics, what else differs."""
    said = [f"{s.upper()}: {found[s]['model']} of {found[s]['folder']}" for s in "ab"]
    said.append("A - B is paired by item; p is the sign test's over wins and losses; all is the mean of the categories")
    for capability, parts in found["capabilities"].items():
        if parts["difference"]["failed"]:
            failed = parts["difference"]["failed"]
            said.append(f"{capability}: {failed} items have no score on one side or the other and are in no mean")
        for name, of in parts["metrics"].items():
            if of["low"] > 0 or of["high"] < 0:
                said.append(f"{capability}, {name}: {of['mean']:+.3g} ({of['low']:+.3g} to {of['high']:+.3g})")
    for s, number in found["only"].items():
        if number:
            said.append(f"{number} items are in {s.upper()} only and were left out")
    votes = found.get("votes")
    for capability, of in (votes or {"capabilities": {}})["capabilities"].items():
        if of and of["position"] is not None:
            said.append(f"{capability} votes: {of['position']:.0%} changed with the order, {of['failed']} failed")
    if votes and votes["stopped"]:
        said.append(votes["stopped"])
    return said + found["notes"]


def markdown(found: dict) -> str:
    """compare.md."""
    text = [f"# {found['a']['model']} (A) against {found['b']['model']} (B)", ""]
    text += [f"**Not asked alike: they differ in {warning}.**" for warning in found["warnings"]]
    for title, rows in tables(found):
        text += ["", f"## {title}", "", f"| {' | '.join(HEADS)} |", "|---" + "|---:" * (len(HEADS) - 1) + "|"]
        text += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*text, "", *(f"- {line}" for line in lines(found))]) + "\n"


def show(found: dict) -> None:
    """Prints the tables and the lines; a dry run prints what the votes would take."""
    from rich import box
    from rich.table import Table

    from ..console import wide

    console = wide()
    if "estimate" in found:
        of = found["estimate"]
        cost = "at a price that is not known" if of["cost"] is None else f"about ${of['cost']:.2f}"
        console.print(f"{of['questions']} questions, {of['to_ask']} of them to ask, {cost}", highlight=False)
        return
    for warning in found["warnings"]:
        console.print(f"warning: not asked alike, they differ in {warning}", style="yellow", highlight=False)
    for title, rows in tables(found):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        table.pad_edge, table.padding = False, (0, 0)
        for head in HEADS:
            table.add_column(head, justify="left" if head == "category" else "right", no_wrap=True)
        for row in rows:
            whole = row is rows[-1] and row[0] == "all"
            table.add_row(*row, style="bold" if whole else "")
        console.print(table, highlight=False)
        console.print()
    for line in lines(found):
        console.print(line, style="dim", highlight=False, markup=False)
