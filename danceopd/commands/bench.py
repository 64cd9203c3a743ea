"""`danceopd bench`, `danceopd suites` and `danceopd report`: measure models, and look at what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from danceopd.commands.flags import number, pairs, words

SUITE, JUDGE, BLEND = "Suite", "Judge", "Blends"


def bench(
    student: Annotated[
        Path | None,
        typer.Argument(help="What to score: a run's folder, a LoRA, a pipeline, a shipped name; or give --images."),
    ] = None,
    suite: Annotated[str, typer.Option(help="Which suite; `danceopd suites` lists them.")] = "scenes",
    against: Annotated[
        str, typer.Option(help='Of base, blend and teachers\' names, with commas; or "none". Default: all of them.')
    ] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: bench, in the student's.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many prompts and so many edits; default: all.")] = None,
    categories: Annotated[str, typer.Option(help="Only these, with commas; default: all.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same machine: the same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Pictures drawn at once; default: what their size allows.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="Also held-out and compound items.")] = False,
    only_score: Annotated[bool, typer.Option("--only-score", help="Draw nothing; score what is there.")] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: pictures made elsewhere, in the suite's official tree. May be given again."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; draw and ask nothing.")] = False,
    data: Annotated[Path | None, typer.Option(help="Your copy of the suite's data.", rich_help_panel=SUITE)] = None,
    language: Annotated[str | None, typer.Option(help="Of instructions: en or cn.", rich_help_panel=SUITE)] = None,
    official_prompts: Annotated[
        Path | None,
        typer.Option(help="The suite's own prompts for the judge, from your copy of its code.", rich_help_panel=SUITE),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Pictures a prompt, of suites that draw several.", rich_help_panel=SUITE)
    ] = None,
    features: Annotated[
        str, typer.Option(help="Networks that see each edit: lite0, clip:MODEL, dino:MODEL; with commas.")
    ] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            help='openai:MODEL@URL, hf:PATH, cmd:PROGRAM, replay:FILE, or "none": only draw and measure.',
            rich_help_panel=JUDGE,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Ask everything so many times.", rich_help_panel=JUDGE)] = 1,
    max_cost: Annotated[float | None, typer.Option(help="Dollars to stop at.", rich_help_panel=JUDGE)] = None,
    judge_key_file: Annotated[
        Path | None, typer.Option(help="File with the key; else OPENAI_API_KEY.", rich_help_panel=JUDGE)
    ] = None,
    judge_temperature: Annotated[float | None, typer.Option(help="Default: 0.", rich_help_panel=JUDGE)] = None,
    judge_codec: Annotated[
        str | None, typer.Option(help="How pictures are sent: png or jpeg:75.", rich_help_panel=JUDGE)
    ] = None,
    judge_longest: Annotated[
        int | None, typer.Option(help="Longest side of a picture that is sent.", rich_help_panel=JUDGE)
    ] = None,
    judge_concurrency: Annotated[int | None, typer.Option(help="Questions at once.", rich_help_panel=JUDGE)] = None,
    judge_timeout: Annotated[float | None, typer.Option(help="Seconds for one answer.", rich_help_panel=JUDGE)] = None,
    judge_thinking: Annotated[
        int | None, typer.Option(help="Tokens it may think before it answers.", rich_help_panel=JUDGE)
    ] = None,
    judge_device: Annotated[str | None, typer.Option(help="Of a local judge.", rich_help_panel=JUDGE)] = None,
    judge_batch: Annotated[
        int | None, typer.Option(help="Questions that a local judge reads at once.", rich_help_panel=JUDGE)
    ] = None,
    price_in: Annotated[
        float | None, typer.Option(help="Dollars a million tokens that are read.", rich_help_panel=JUDGE)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(help="Dollars a million tokens that are written.", rich_help_panel=JUDGE)
    ] = None,
    blend_method: Annotated[
        str, typer.Option(help="How blend is made: a method, or several with commas.", rich_help_panel=BLEND)
    ] = "linear",
    blend_weights: Annotated[
        str, typer.Option(help="Its weights, such as generation=0.7,editing=0.9.", rich_help_panel=BLEND)
    ] = "",
) -> None:
    """Score a student, and what it came from, on the same prompts, edits and seeds; write a report.

    Running the same command again continues. `accelerate launch --multi_gpu -m danceopd bench …` shares the drawing.
    """
    folders = pairs(images or (), "--images", "mine=results/mine")
    weights = pairs(words(blend_weights), "--blend-weights", "generation=0.7")
    from danceopd.bench.run import Bench
    from danceopd.bench.table import print_table, progress_bar

    with progress_bar() as progress:
        asked = Bench(
            student,
            suite,
            words(against),
            output,
            limit=limit,
            categories=words(categories),
            seed=seed,
            device=device,
            batch=batch,
            probes=probes,
            only_score=only_score,
            images=folders,
            data=data,
            language=language,
            official_prompts=official_prompts,
            samples=samples,
            features=words(features),
            judge=judge,
            judge_options={
                "key_file": judge_key_file,
                "temperature": judge_temperature,
                "codec": judge_codec,
                "longest": judge_longest,
                "concurrency": judge_concurrency,
                "timeout": judge_timeout,
                "thinking": judge_thinking,
                "device": judge_device,
                "batch": judge_batch,
                "price_in": price_in,
                "price_out": price_out,
            },
            repeats=repeats,
            max_cost=max_cost,
            blend_weights={name: number(weight, "--blend-weights") for name, weight in weights.items()},
            blend_methods=words(blend_method),
            progress=progress,
        )
        found = asked.estimate() if dry_run else asked.run()
    if isinstance(found, dict):
        show_estimate(found)
    elif found.first:  # another process of the same bench says it
        print_table(found.scores)
        if stopped := (found.scores["judging"] or {}).get("stopped"):
            typer.echo(f"judge: {stopped}")
        typer.echo(f"report: {found.report}")


def show_estimate(found: dict[str, Any]) -> None:
    """Print what a bench would take."""
    items = ", ".join(f"{count} of {capability}" for capability, count in found["items"].items() if count)
    typer.echo(f"items: {items}")
    typer.echo(f"models: {', '.join(found['models'])}")
    typer.echo(f"pictures to draw: {found['pictures']}")
    judge = found["judge"]
    if judge is None:
        typer.echo("questions: none, for no judge is asked")
        return
    typer.echo(f"judge: {judge['name']}")
    typer.echo(
        f"questions: {judge['questions']} ({judge['recorded']} are answered, {judge['equal']} are equal to others, "
        f"{judge['to_ask']} to ask)"
    )
    typer.echo(f"tokens: about {judge['tokens_in']:,} in, {judge['tokens_out']:,} out")
    if judge["cost"] is None:
        typer.echo("cost: not known; give --price-in and --price-out, in dollars a million tokens")
    else:
        typer.echo(f"cost: about {judge['cost']:.2f} dollars, at most {judge['at_most']:.2f}")


def suites() -> None:
    """Say which suites there are, in which version, and where their data is."""
    from rich.console import Console
    from rich.table import Table

    from danceopd.bench.suites import SUITES, suite_class

    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in SUITES:
        made = suite_class(name)
        table.add_row(name, made.version, f"{about(made)} {data_sentence(made)}")
    Console(markup=False).print(table, highlight=False)


def about(suite: Any) -> str:
    """The first line of the suite's module, without its name."""
    line = (sys.modules[suite.__module__].__doc__ or "").partition("\n")[0]
    words = line.partition(" suite: ")[2] or line
    return f"{words[:1].upper()}{words[1:]}".replace("``", "")


def data_sentence(suite: Any) -> str:
    """Where a suite's data is, or how to get it."""
    needs = getattr(suite, "needs", "")
    place = suite.here() if hasattr(suite, "here") else None
    if place is not None:
        return f"Its data is in {place}."
    return f"Its data is not here: {needs}." if needs else "It needs no data."


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished bench.")],
) -> None:
    """Write the report of a finished bench again, from its folder, and print its table."""
    from danceopd.bench.report import report as write
    from danceopd.bench.scores import load
    from danceopd.bench.table import print_table

    scores, _ = load(folder)
    path = write(folder)
    print_table(scores)
    typer.echo(f"report: {path}")
