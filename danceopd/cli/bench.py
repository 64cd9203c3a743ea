"""The commands `danceopd bench`, `suites`, `report` and `compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danceopd.cli.boundary import echo
from danceopd.cli.flags import Json, number, pairs, print_json, words
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.suites.protocol import Suite

SUITE, JUDGE, BLEND, PEOPLE = "Suite", "Judge", "Blends", "People"
JudgeRepeats = Annotated[int, typer.Option(help="How often the judge is asked each question.", rich_help_panel=JUDGE)]
MaxCost = Annotated[
    float | None,
    typer.Option(
        help="US dollars that the judge may cost; asking stops before they are exceeded.", rich_help_panel=JUDGE
    ),
]
JudgeKeyFile = Annotated[
    Path | None, typer.Option(help="File with the API key; default: OPENAI_API_KEY.", rich_help_panel=JUDGE)
]
JudgeCodec = Annotated[
    str | None, typer.Option(help="How images are sent: png, jpeg or jpeg:QUALITY.", rich_help_panel=JUDGE)
]
JudgeConcurrency = Annotated[int | None, typer.Option(help="Requests at once.", rich_help_panel=JUDGE)]
JudgeLongest = Annotated[
    int | None, typer.Option(help="Longest side of an image that is sent, in pixels.", rich_help_panel=JUDGE)
]
JudgeTimeout = Annotated[
    float | None, typer.Option(help="Seconds until an answer counts as lost.", rich_help_panel=JUDGE)
]
JudgeStart = Annotated[
    float | None,
    typer.Option(
        help="Further seconds for a program's first answer; default: 600, or 0 with --judge-timeout.",
        rich_help_panel=JUDGE,
    ),
]
JudgeThinking = Annotated[
    int | None, typer.Option(help="Reasoning tokens before an answer.", rich_help_panel=JUDGE)
]
PriceIn = Annotated[
    float | None, typer.Option(help="US dollars per million input tokens.", rich_help_panel=JUDGE)
]
Margin = Annotated[
    float | None, typer.Option(help="Share of the scale that may be lost and still counts as nothing; default: 0.05.")
]
PriceOut = Annotated[
    float | None, typer.Option(help="US dollars per million output tokens.", rich_help_panel=JUDGE)
]


def bench(
    student: Annotated[
        Path | None,
        typer.Argument(help="The model to score: a run folder, LoRA, pipeline or shipped name; or give --images."),
    ] = None,
    suite: Annotated[str, typer.Option(help="The suite; `danceopd suites` lists them. Or module:Class.")] = "scenes",
    against: Annotated[
        str,
        typer.Option(help='Models to compare with: base, teachers, a teacher, blend, a path; or "none". Default: all.'),
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder; default: bench in the student's folder.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many prompts and so many edits; default: all.")] = None,
    categories: Annotated[str, typer.Option(help="Only these categories, comma-separated; default: all.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; same seed, same machine: same images.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Batch size of generation; default: by image size.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="Add held-out and compound items, reported apart.")] = False,
    only_score: Annotated[
        bool, typer.Option("--only-score", help="Generate no image; score those that are there.")
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: images made elsewhere, in the suite's official layout. May be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print images, questions and cost; generate and ask nothing.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Your copy of the suite's data.", rich_help_panel=SUITE)] = None,
    language: Annotated[
        str | None, typer.Option(help="Language of the instructions: en or cn.", rich_help_panel=SUITE)
    ] = None,
    official_prompts: Annotated[
        Path | None,
        typer.Option(help="Judge prompts of the official code: the folder of your copy.", rich_help_panel=SUITE),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Images for each prompt, in suites with several.", rich_help_panel=SUITE)
    ] = None,
    features: Annotated[
        str, typer.Option(help="Networks for judge-free metrics: lite0, clip:MODEL, dino:MODEL; comma-separated.")
    ] = "",
    drift: Annotated[
        str, typer.Option(help='Also draw prompts that no teacher is for: "auto", or a file with one in each line.')
    ] = "",
    metrics: Annotated[
        str, typer.Option(help="Judge-free metrics of your own: plug-ins, or module:function; comma-separated.")
    ] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            help='openai:MODEL@URL, hf:PATH, cmd:PROGRAM, replay:FILE, a plug-in; or "none": images and metrics only.',
            rich_help_panel=JUDGE,
        ),
    ] = None,
    second_judge: Annotated[
        str | None, typer.Option(help="Another judge, asked the same once.", rich_help_panel=JUDGE)
    ] = None,
    repeats: JudgeRepeats = 1,
    max_cost: MaxCost = None,
    judge_key_file: JudgeKeyFile = None,
    judge_temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; default: 0.", rich_help_panel=JUDGE)
    ] = None,
    judge_codec: JudgeCodec = None,
    judge_longest: JudgeLongest = None,
    judge_concurrency: JudgeConcurrency = None,
    judge_timeout: JudgeTimeout = None,
    judge_start: JudgeStart = None,
    judge_thinking: JudgeThinking = None,
    judge_device: Annotated[
        str | None, typer.Option(help="Device of a local judge: cpu or cuda.", rich_help_panel=JUDGE)
    ] = None,
    judge_batch: Annotated[
        int | None, typer.Option(help="Batch size of a local judge.", rich_help_panel=JUDGE)
    ] = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    blend_method: Annotated[
        str, typer.Option(help="Merge methods of blend, comma-separated; see `danceopd blend`.", rich_help_panel=BLEND)
    ] = "linear",
    blend_weights: Annotated[
        str, typer.Option(help="Weights of blend, such as generation=0.7,editing=0.9.", rich_help_panel=BLEND)
    ] = "",
    margin: Margin = None,
    as_json: Json = False,
) -> None:
    """Score a student, its base, its teachers and LoRA blends on the same items and noise; write a report.

    The exit status is 2 if the student got no score at all. The same command again continues.
    `accelerate launch --multi_gpu -m danceopd bench …` generates on several GPUs.

    Example: danceopd bench student --suite folder --data pairs.jsonl --judge hf:./Qwen2.5-VL-7B-Instruct
    """
    folders = pairs(images or (), "--images", "mine=results/mine")
    weights = pairs(words(blend_weights), "--blend-weights", "generation=0.7")
    from danceopd.bench.options import BlendOptions, JudgeOptions, SuiteOptions
    from danceopd.bench.report.table import print_table
    from danceopd.bench.report.verdict import MARGIN
    from danceopd.bench.results import nothing_scored
    from danceopd.bench.run import Bench
    from danceopd.common.console import progress_bar

    arguments = {
        "key_file": judge_key_file,
        "temperature": judge_temperature,
        "codec": judge_codec,
        "longest": judge_longest,
        "concurrency": judge_concurrency,
        "timeout": judge_timeout,
        "start": judge_start,
        "thinking": judge_thinking,
        "device": judge_device,
        "batch": judge_batch,
        "price_in": price_in,
        "price_out": price_out,
    }
    by_teacher = {name: number(weight, "--blend-weights") for name, weight in weights.items()}
    with progress_bar("bench", transient=True) as progress:
        planned = Bench(
            student,
            suite,
            words(against),
            output,
            folders,
            blends=BlendOptions(by_teacher, words(blend_method)),
            limit=limit,
            categories=words(categories),
            probes=probes,
            seed=seed,
            device=device,
            batch=batch,
            only_score=only_score,
            suite_options=SuiteOptions(data, language, official_prompts, samples),
            judge=JudgeOptions(judge, arguments, repeats, max_cost, second_judge),
            features=words(features),
            drift=drift or None,
            metrics=words(metrics),
            margin=MARGIN if margin is None else margin,
            progress=progress,
        )
        found = planned.estimate() if dry_run else planned.run()
    if isinstance(found, dict):
        (print_json if as_json else show_estimate)(found)
    elif found.is_main and as_json:
        print_json(found.scores)
        refuse_nothing("score", found.scores["unscored"] if nothing_scored(found.scores) else [])
    elif found.is_main:  # of several processes, one prints
        print_table(found.scores)
        for line in about_run(found.scores):
            echo(line)
        echo(f"report: {found.report}")
        refuse_nothing("score", found.scores["unscored"] if nothing_scored(found.scores) else [])


def refuse_nothing(what: str, reasons: list[dict[str, Any]]) -> None:
    """UserError with the judge's own sentence where it was asked and not one score, or vote, came of it."""
    if reasons:
        why = reasons[0]["reason"][:200] or "it gave no reason"
        raise UserError(f"there is not one {what} ({why}); mend that and run the same command again")


def about_run(scores: dict[str, Any]) -> list[str]:
    """What else must be known of a run: how much of the benchmark it was, which snapshots answered, what was left."""
    lines = []
    for capability, whole in (scores.get("published") or {}).items():
        overall = (scores["models"][-1].get(capability) or {}).get("overall") or {}
        count = sum(overall.get(key) or 0 for key in ("n", "failed"))
        if count < whole:
            lines.append(f"items: {count} of {whole} of {scores['suite']['name']}")
    judging = scores.get("judging") or {}
    if len(names := (judging.get("usage") or {}).get("judges") or {}) > 1:
        said = ", ".join(f"{name} ({count})" for name, count in names.items())
        lines.append(f"judge: the answers are of {len(names)} snapshots, whose scores do not compare: {said}")
    return lines + ([f"judge: {judging['stopped']}"] if judging.get("stopped") else [])


def show_estimate(found: dict[str, Any]) -> None:
    """Print what a bench would generate, ask and cost."""
    items = []
    for capability, count in found["items"].items():
        whole = found["published"].get(capability, count)
        items += [f"{count} of {f'{whole} of ' if count < whole else ''}{capability}"] if count else []
    echo(f"items: {', '.join(items)}")
    echo(f"models: {', '.join(found['models'])}")
    echo(f"images to generate: {found['images']}")
    if found["judge"] is None:
        return echo("questions: none; no judge is asked")
    for which in ("judge", "second_judge"):
        if found.get(which):
            _show_cost(which.replace("_", " "), found[which])


def _show_cost(which: str, judge: dict[str, Any]) -> None:
    echo(f"{which}: {judge['name']}")
    echo(
        f"questions: {judge['questions']} ({judge['recorded']} already answered, {judge['equal']} equal to another, "
        f"{judge['to_ask']} to ask)"
    )
    echo(f"tokens: about {judge['tokens_in']:,} in, {judge['tokens_out']:,} out")
    if judge["cost"] is None:
        echo("cost: unknown; give --price-in and --price-out, in dollars per million tokens")
    else:
        echo(f"cost: about {judge['cost']:.2f} dollars, at most {judge['at_most']:.2f}")


def suites(as_json: Json = False) -> None:
    """List the suites, their versions, and where their data is.

    Example: danceopd suites --json
    """
    from rich.console import Console
    from rich.table import Table

    from danceopd.bench.suites.registry import suite_class, suite_names

    if as_json:
        classes = {name: suite_class(name) for name in suite_names()}
        return print_json(
            {name: {"version": c.version, "about": about(c), "data": data_sentence(c)} for name, c in classes.items()}
        )
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in suite_names():
        cls = suite_class(name)
        table.add_row(name, cls.version, f"{about(cls)} {data_sentence(cls)}")
    Console(markup=False).print(table, highlight=False)


def about(suite: type[Suite]) -> str:
    """What a suite is: the first line of its module, without its name."""
    line = (sys.modules[suite.__module__].__doc__ or "").partition("\n")[0]
    words = line.partition(" suite: ")[2] or line
    return f"{words[:1].upper()}{words[1:]}".replace("``", "")


def data_sentence(suite: type[Suite]) -> str:
    """Where a suite's data is, or how to get it."""
    place = suite.here()
    if place is not None:
        return f"Its data is in {place}."
    return f"Its data is not on this machine: {suite.needs}." if suite.needs else "It needs no data."


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished bench.")],
) -> None:
    """Write the report of a finished bench again, and print its table.

    Example: danceopd report student/bench
    """
    from danceopd.bench.report.report import report as write
    from danceopd.bench.report.table import print_table
    from danceopd.bench.results import load

    scores, _ = load(folder)
    path = write(folder)
    print_table(scores)
    echo(f"report: {path}")


def compare(
    run_a: Annotated[Path, typer.Argument(help="Output folder of a finished bench; or a judge.jsonl.")],
    run_b: Annotated[Path, typer.Argument(help="Another one of the same suite (or the same); or a judge.jsonl.")],
    models: Annotated[str, typer.Option(help="One model for both, or two: a,b. Default: the students.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")] = Path("compare"),
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare even if suite, judge or seeds differ.")] = False,
    judge: Annotated[
        str | None, typer.Option(help="Also let a judge vote on each pair of images.", rich_help_panel=JUDGE)
    ] = None,
    repeats: JudgeRepeats = 1,
    limit: Annotated[
        int | None, typer.Option(help="Vote on at most so many pairs of each category.", rich_help_panel=JUDGE)
    ] = None,
    max_cost: MaxCost = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print questions and cost; ask nothing.", rich_help_panel=JUDGE)
    ] = False,
    judge_key_file: JudgeKeyFile = None,
    judge_codec: JudgeCodec = None,
    judge_longest: JudgeLongest = None,
    judge_concurrency: JudgeConcurrency = None,
    judge_timeout: JudgeTimeout = None,
    judge_start: JudgeStart = None,
    judge_thinking: JudgeThinking = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    margin: Margin = None,
    blind: Annotated[
        int | None, typer.Option(help="Write blind.html: people vote on so many pairs.", rich_help_panel=PEOPLE)
    ] = None,
    votes: Annotated[
        list[Path] | None, typer.Option(help="Votes that blind.html saved. May be repeated.", rich_help_panel=PEOPLE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two finished benches item by item, with pictures; writes compare.html, compare.md and compare.json.

    The exit status is 2 if a judge was asked and no vote could be read.
    With two files of judge's answers (judge.jsonl), print the agreement of the judges instead.

    Example: danceopd compare student/bench other/bench -o compare
    """
    from danceopd.bench.options import JudgeOptions
    from danceopd.bench.report.verdict import MARGIN
    from danceopd.cli.compare import no_vote, run, show, show_agreement

    if run_a.is_file() and run_b.is_file():
        return show_agreement(run_a, run_b, as_json)
    arguments: dict[str, Any] = {"key_file": judge_key_file, "codec": judge_codec, "concurrency": judge_concurrency}
    arguments |= {"longest": judge_longest, "timeout": judge_timeout, "start": judge_start, "thinking": judge_thinking}
    options = JudgeOptions(judge, arguments | {"price_in": price_in, "price_out": price_out}, repeats, max_cost)
    margin = MARGIN if margin is None else margin
    found = run(run_a, run_b, output, words(models), anyway, options, limit, dry_run, margin, blind, votes or ())
    (print_json if as_json else show)(found)
    if not dry_run:
        if not as_json:
            echo(f"comparison: {output / 'compare.html'}")
            if blind:
                echo(f"page to vote on: {output / 'blind.html'} (keep blind.json: it knows which side was which model)")
        refuse_nothing("vote", found["votes"]["unscored"] if no_vote(found) else [])
