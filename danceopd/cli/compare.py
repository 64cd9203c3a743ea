"""`danceopd compare`: two finished benches go in, tables in the terminal, compare.json, .md and .html come out.

On request: a page on which people vote without seeing names (`blind`), and the votes that it saved (`people`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench.compare import compare, load_side, pairs
from danceopd.bench.evidence.people import people, read_votes
from danceopd.bench.options import JudgeOptions
from danceopd.bench.pages import blind as blind_page
from danceopd.bench.pages import sides
from danceopd.bench.pages.tables import HEADS, markdown, notes, number, tables, verdict_line
from danceopd.bench.pairwise import Pair, questions, tally, vote
from danceopd.bench.report.verdict import MARGIN, check_margin
from danceopd.bench.results import unscored
from danceopd.cli.flags import print_json
from danceopd.common.console import progress_bar
from danceopd.common.files import disk_errors, write_atomic, write_json
from danceopd.common.system import command_line
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.judges.session import JudgeSession

FILES = ("compare.json", "compare.md", sides.NAME, "judge.jsonl", blind_page.PAGE, blind_page.KEY)
WITHOUT_JUDGE = JudgeOptions()


def run(
    run_a: Path,
    run_b: Path,
    output: Path,
    models: Sequence[str] = (),
    anyway: bool = False,
    judge: JudgeOptions = WITHOUT_JUDGE,
    limit: int | None = None,
    dry_run: bool = False,
    margin: float = MARGIN,
    blind: int | None = None,
    ballots: Sequence[Path] = (),
) -> dict[str, Any]:
    """Compare a model of each bench (its student, or `models`: one name for both, or two), and write `output`.

    `blind`: also write a page on which people vote on so many pairs of images; `ballots`: files that it saved. A
    `judge` also votes on every pair of images, or on the first `limit` of each category; an interrupted vote
    continues. Returns the contents of compare.json. `dry_run` writes nothing, and adds `estimate`, the questions and
    the cost of the votes. UserError for wrong input.
    """
    if len(models) > 2:
        raise UserError(f"--models names {len(models)} models; give one for both benches, or two separated by a comma")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give 1 or more")
    votes = judge.judge is not None
    if not votes and (dry_run or limit is not None or judge.repeats != 1 or judge.max_cost is not None):
        raise UserError("--dry-run, --limit, --repeats and --max-cost need the votes of a judge; add --judge")
    check_margin(margin)
    if blind is not None and blind < 1:
        raise UserError(f"--blind is {blind}; give 1 or more")
    names = [*models, *models][:2] if models else [None, None]
    a, b = load_side(run_a, names[0]), load_side(run_b, names[1])
    found = compare(a, b, anyway, margin)
    _refuse_foreign(output, found)
    chosen = _first(pairs(a, b), limit) if votes else []
    on_page = blind_page.choose(pairs(a, b), blind) if blind else []
    cast = _cast(output, found, ballots)
    if votes and dry_run:
        return found | {"estimate": vars(_session(judge, output).estimate(questions(chosen)))}
    found |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found |= {"command": command_line()}
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if votes:
        found["votes"] = _votes(_session(judge, output), chosen)
    if on_page:
        blind_page.write_blind(output, on_page, {side: found[side]["model"] for side in "ab"})
    if cast:
        found["people"] = people(cast, found["items"], (found.get("votes") or {}).get("items") or ())
    write_json(output / "compare.json", found)
    with disk_errors(output):
        write_atomic(output / "compare.md", markdown(found).encode())
    sides.write_page(output, found, a, b)
    return found


def _cast(output: Path, found: dict, ballots: Sequence[Path]) -> dict:
    """The votes of people in files of this comparison's blind page; UserError where they are of another."""
    key = blind_page.read_key(output)
    if not ballots:
        return {}
    if key is None:
        raise UserError(f"{output} has no {blind_page.KEY}; give the --output folder whose page people voted on")
    if any(key.get(side) != found[side]["model"] for side in "ab"):
        raise UserError(f"people voted on {key.get('a')} and {key.get('b')}; compare these, with --models")
    return read_votes(ballots, key)


def _refuse_foreign(output: Path, found: dict) -> None:
    """UserError for a folder that holds anything else than this comparison."""
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    held = [path.name for path in output.iterdir()] if output.is_dir() else []
    foreign = [name for name in held if name not in FILES and not name.startswith(".")]
    if foreign:
        raise UserError(f"output folder {output} holds other files ({foreign[0]}); choose another --output")
    if "compare.json" in held:
        try:
            known = json.loads((output / "compare.json").read_text(encoding="utf-8"))
            same = all(known[s][key] == found[s][key] for s in "ab" for key in ("model", "sha256", "created"))
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"output folder {output} holds another comparison; choose another --output, or delete it")


def _first(found: Sequence[Pair], limit: int | None) -> list[Pair]:
    """The first `limit` pairs of each category."""
    kept: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        kept.setdefault((pair.capability, pair.category), []).append(pair)
    return [pair for group in kept.values() for pair in group[:limit]]


def show_agreement(one: Path, other: Path, as_json: bool = False) -> None:
    """Print the agreement of two files of answers, by aspect."""
    from rich.table import Table

    from danceopd.bench.judges.agreement import agreement_of_files
    from danceopd.common.console import wide_console

    found = agreement_of_files(one, other)
    if as_json:
        return print_json(found)
    table = Table(box=None, pad_edge=False)
    heads = ("n", "unread", "exact", "difference", "kappa", "spearman")
    for head in ("aspect", *heads):
        table.add_column(head, justify="left" if head == "aspect" else "right")
    for aspect, figures in found.items():
        counts = [str(figures[head]) for head in heads[:2]]
        table.add_row(aspect, *counts, *(number(figures.get(head)) for head in heads[2:]))
    wide_console().print(table, highlight=False)


def _session(options: JudgeOptions, output: Path) -> JudgeSession:
    from danceopd.bench.judges.registry import open_session

    return open_session(
        options.judge or "", output / "judge.jsonl", options.arguments, options.repeats, options.max_cost
    )


def _votes(session: JudgeSession, chosen: Sequence[Pair]) -> dict[str, Any]:
    """A judge's votes: `judge`, `capabilities` with their figures, `items`, and the usage."""
    total = sum(1 for _ in questions(chosen)) * session.repeats
    done = 0
    with progress_bar("compare", transient=True) as progress:

        def on_answer(_: Any) -> None:
            nonlocal done
            done += 1
            progress(done, total, "votes")

        answers = session.answers(questions(chosen), on_answer)
    votes = [vote(pair, answers) for pair in chosen]
    figures = {c: tally(votes, c) for c in dict.fromkeys(pair.capability for pair in chosen)}
    about = {"judge": session.judge.identity, "repeats": session.repeats, "capabilities": figures}
    unread = [v | {"reason": next(filter(None, v["reasons"]), "")} for v in votes if v["status"] != "ok"]
    about |= {"usage": session.usage, "stopped": session.stopped, "unscored": unscored(unread)}
    return about | {"items": votes}


def no_vote(found: dict) -> bool:
    """Whether a judge was asked for votes and not one could be read."""
    figures = (found.get("votes") or {}).get("capabilities") or {}
    return bool(figures) and all(figure["n"] == 0 for figure in figures.values() if figure)


def show(found: dict) -> None:
    """Print the tables and the notes; for a dry run, the questions and the cost of the votes."""
    from rich import box
    from rich.table import Table

    from danceopd.common.console import wide_console

    console = wide_console()
    if "estimate" in found:
        of = found["estimate"]
        cost = "at an unknown price" if of["cost"] is None else f"about ${of['cost']:.2f}"
        console.print(f"{of['questions']} questions, {of['to_ask']} to ask, {cost}", highlight=False)
        return
    for warning in found["warnings"]:
        console.print(f"warning: not run alike, they differ in {warning}", style="yellow", highlight=False)
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
    console.print(verdict_line(found), style="bold", highlight=False)
    for line in notes(found):
        console.print(line, style="dim", highlight=False, markup=False)
