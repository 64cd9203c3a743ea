"""The command line: each command is a thin call of one public function, imported when it runs.

`--help` never waits for torch. How each ends, with which sentence and exit status, is `boundary.py`'s.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli import bench as commands
from danceopd.cli import kernels as machine
from danceopd.cli.blending.command import blend
from danceopd.cli.boundary import Commands, echo, prepare, traceback_in
from danceopd.cli.flags import (
    DTYPES,
    TEACHER,
    App,
    Base,
    Device,
    Drop,
    Height,
    Json,
    MergeBase,
    MergeSteps,
    Output,
    RecipeSeed,
    RunFolder,
    Seed,
    Settings,
    TimeLimit,
    Trackers,
    Width,
    number,
    one_of,
    print_json,
    settings,
    words,
)
from danceopd.cli.openmoji import app as openmoji
from danceopd.cli.plugins import plugins
from danceopd.cli.publish.command import push
from danceopd.cli.ui.command import ui
from danceopd.cli.wizard.command import init
from danceopd.errors import UserError

SHIPPED = ("autoencoder", "base", "generation", "editing", "local-edit", "global-edit")


def _stages() -> list[str]:
    """What `teach` trains."""
    from danceopd.worlds.toy.effects import EFFECTS

    return [*SHIPPED, *EFFECTS]


app = App(
    cls=Commands,
    help="Merge what several image models can do into one adapter, and prove that nothing got worse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(init)


@app.command()
def merge(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; flags win over it.")] = None,
    base: MergeBase = None,
    generation: Annotated[str | None, typer.Option(help=TEACHER.format("Generation"))] = None,
    editing: Annotated[str | None, typer.Option(help=TEACHER.format("Editing"))] = None,
    output: RunFolder = None,
    steps: MergeSteps = None,
    seed: RecipeSeed = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    trackers: Trackers = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Also make OUTPUT a whole pipeline.")] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="Start at what another run has learnt, such as with another rate.")
    ] = None,
    set_keys: Settings = None,
) -> None:
    """Distil the teachers into one student LoRA. With nothing given: the shipped small model.

    Running the same command again continues an interrupted run.

    Example: danceopd merge recipe.yaml --steps 500 --set optimizer.lr=1e-4
    """
    from danceopd.recipe.recipe import Recipe

    resolved = Recipe.load(
        recipe, base=base, generation=generation, editing=editing, output=output, steps=steps, seed=seed, device=device,
        time_limit=time_limit, trackers=trackers, settings=settings(set_keys or ())
    )  # fmt: skip
    from danceopd.merge import merge as run

    traceback_in(resolved.output)
    if start is not None:
        from danceopd.run.provenance import start_from

        resolved = start_from(resolved, start)
    student = run(resolved)
    if not student.first:  # another process of the same run says it
        return
    done = "finished before" if student.seconds == 0 else f"{student.steps} steps, {student.seconds:.0f} s"
    echo(f"student: {resolved.output} ({done})")
    if fuse:
        from danceopd.adapters.fuse import fuse_in_place

        echo(f"pipeline: {fuse_in_place(resolved.output)}")


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; flags win over it.")] = None,
    base: MergeBase = None,
    generation: Annotated[str | None, typer.Option(help=TEACHER.format("Generation"))] = None,
    editing: Annotated[str | None, typer.Option(help=TEACHER.format("Editing"))] = None,
    output: RunFolder = None,
    steps: MergeSteps = None,
    device: Device = None,
    gpu: Annotated[
        str | None, typer.Option(help="A card that is not here: its memory (24GB) or its name (4090, h100).")
    ] = None,
    tflops: Annotated[float | None, typer.Option(min=0.0001, help="Reckon with this speed; default: measure.")] = None,
    seed: RecipeSeed = None,
    time_limit: TimeLimit = None,
    trackers: Trackers = None,
    fuse: Annotated[bool, typer.Option("--fuse", hidden=True)] = False,  # so that merge's flags can be planned
    set_keys: Settings = None,
    as_json: Json = False,
) -> None:
    """Check all that a merge would, and say what memory, time and disk it takes. Loads no weight.

    Example: danceopd plan recipe.yaml --gpu 24GB
    """
    from danceopd.recipe.recipe import Recipe

    resolved = Recipe.load(
        recipe, base=base, generation=generation, editing=editing, output=output, steps=steps, seed=seed, device=device,
        time_limit=time_limit, trackers=trackers, settings=settings(set_keys or ())
    )  # fmt: skip
    from danceopd.plan import plan as run

    facts = run(resolved, tflops, gpu)
    if as_json:
        print_json(facts)
    else:
        from danceopd.cli.plan import show

        show(facts)
    if facts["refused"]:
        raise UserError(facts["refused"])


@app.command()
def audit(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; default: the shipped demo.")] = None,
    questions: Annotated[int | None, typer.Option(help="Held-out questions of each teacher; default: 64.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each question; default: 8.")] = None,
    draws: Annotated[
        str | None, typer.Option(help="Who draws them: student (as it would start; the default) or teacher.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a sample; default: the recipe's rollout.steps.")] = None,
    levels: Annotated[str, typer.Option(help="Noise levels at which the likelihood is tried, with commas.")] = "",
    judge: Annotated[str | None, typer.Option(help="Scores edits where no exact truth is known; as of bench.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: beside the run folder, as student-audit.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Before training: say which signals rank the model's own samples, and which rank them no better than chance.

    Example: danceopd audit recipe.yaml --questions 48 --draws teacher. Running the same command again continues.
    """
    from danceopd.recipe.recipe import Recipe

    resolved = Recipe.load(recipe, seed=seed, device=device)
    from danceopd.cli.audit import run, show

    noise = [number(word, "--levels") for word in words(levels)]
    facts = run(resolved, output, noise, judge, questions=questions, samples=samples, draws=draws, steps=steps)
    if as_json:
        print_json(facts)
    else:
        show(facts)
        echo(f"audit: {facts['folder']}")


@app.command()
def sample(
    student: Annotated[Path, typer.Argument(help="A student's folder, a LoRA, or a whole pipeline.")],
    prompt: Annotated[str, typer.Argument(help="What the image shows, or what to change in the source image.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Source image to edit; again for each further reference.")
    ] = None,
    seed: Seed = 0,
    count: Annotated[int, typer.Option("-n", "--count", help="Number of images; seeds count up from --seed.")] = 1,
    output: Output = Path("samples"),
    base: Base = None,
    device: Device = None,
    height: Height = None,
    width: Width = None,
    accept: Annotated[
        str | None, typer.Option(help="base: run on a base of the same layers that the student was not trained on.")
    ] = None,
) -> None:
    """Generate or edit images with a student, through the stock diffusers pipeline.

    Example: danceopd sample student "make the fox blue" --image fox.png -n 4
    """
    if (height is None) != (width is None):
        raise UserError("only one of --height and --width is given; give both, or neither")
    from danceopd.sample import sample as run

    size = None if height is None or width is None else (height, width)
    run(student, prompt, image, seed, count, output, base, device, report=echo, size=size, accept=accept)


app.command()(push)
app.command()(ui)
app.command()(commands.bench)
app.command()(commands.suites)
app.command()(commands.report)
app.command()(commands.compare)
app.add_typer(openmoji, name="openmoji")


@app.command()
def teach(
    stage: Annotated[
        str, typer.Argument(
            help=f"One of: {', '.join(SHIPPED)}; or a small effect (docs/many-teachers.md).", autocompletion=_stages
        )
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: checkpoints/STAGE.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: the stage's own.")] = None,
    base: Annotated[str, typer.Option(help="Base of a teacher: a folder or a shipped name.")] = "base",
    init: Annotated[str | None, typer.Option(help="LoRA that a teacher starts from; default: zero.")] = None,
    seed: Seed = 0,
) -> None:
    """Train one of the shipped checkpoints from scratch. Running it again continues it.

    Example: danceopd teach editing -o my-editing
    """
    from danceopd.common.messages import did_you_mean

    if stage not in _stages():
        raise UserError(f"no stage is named {stage!r}{did_you_mean(stage, _stages())}")
    from danceopd.common.console import progress_bar
    from danceopd.worlds.toy.stages import teach as run

    with progress_bar(stage, ends=True) as bar:
        folder = run(
            stage, output=output, steps=steps, seed=seed, base=base, init=init,
            report=lambda step, total, loss: bar(step, total, f"loss {loss:.4f}"),
        )  # fmt: skip
    echo(f"{stage}: {folder}")


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The base: a pipeline or transformer folder, or a safetensors file.")],
    finetuned: Annotated[
        str, typer.Argument(help="A whole model trained from it, in the same forms; or a LoRA, DoRA, LoKr or LoHa.")
    ],
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the LoRA; with --energy, the largest.")] = 64,
    output: Output = Path("extracted"),
    energy: Annotated[
        float | None,
        typer.Option(help="Give each layer the smallest rank that keeps this share, such as 0.99 (diffusers 0.40 on)."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="What the LoRA is stored in: fp32, bf16 or fp16.", autocompletion=DTYPES)
    ] = "fp32",
    drop: Drop = None,
) -> None:
    """Turn a fine-tuned model, or an adapter of another kind, into a LoRA of its base; say what each layer lost.

    Example: danceopd extract ./base ./finetuned -r 64 -o extracted
    """
    from danceopd.cli.extract import run, show, summary

    file, found = run(base, finetuned, output, rank, energy, device or "auto", dtype, drop or ())
    show(found)
    echo(summary(found))
    echo(f"LoRA: {file.parent}")


app.command()(blend)


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="A run's folder, a LoRA, or a shipped name.")],
    format: Annotated[
        str,
        typer.Option(
            help="diffusers, comfyui, peft or kohya.",
            autocompletion=one_of("diffusers", "comfyui", "peft", "kohya"),
        ),
    ] = "diffusers",
    output: Output = Path("exported"),
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.", autocompletion=DTYPES)] = "fp32",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Largest rank of a layer; default: exact.")] = None,
    base: Base = None,
    drop: Drop = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="A layer not to write, `*` for anything; may be given several times.")
    ] = None,
    second: Annotated[
        str | None, typer.Option(help="A LoRA of the base's second transformer (Wan 2.2 A14B), for the same file.")
    ] = None,
) -> None:
    """Write a student under the names another tool wants, and read it back to prove it.

    Example: danceopd export student --format comfyui -o for-comfyui
    """
    from danceopd.adapters.export import export_as

    echo(export_as(student, output, format, dtype, base, rank, drop or (), leave_out or (), second).sentence)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A LoRA, a model's folder or file, a run's folder, a shipped name.")],
    names: Annotated[bool, typer.Option("--names", help="Also list every adapted module.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a LoRA, a model or a run is, and what it can be used for. Loads no weight.

    Example: danceopd inspect downloaded.safetensors --names
    """
    from danceopd.cli.inspect import describe, show

    facts = describe(path)
    if as_json:
        print_json(facts)
    else:
        show(facts, names)


for about in (plugins, machine.kernels, machine.schema, machine.version):
    app.command()(about)
app.callback()(machine.program)


def main() -> None:
    """The `danceopd` program."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on few cores
    prepare()
    app(prog_name="danceopd")
