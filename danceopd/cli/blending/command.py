"""`danceopd blend` as the command line has it; imported without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli.boundary import echo
from danceopd.cli.flags import DTYPES, Base, Device, Drop, Output, Seed, number, words
from danceopd.errors import UserError


def blend(
    adapters: Annotated[list[str], typer.Argument(help="LoRAs of one base: files, folders or shipped names.")],
    method: Annotated[
        str,
        typer.Option(
            help="linear, slerp, task-arithmetic, ties, dare-linear, dare-ties, magnitude-prune, breadcrumbs, sce, "
            "knots, tsv, iso-c, regmean, regmean++ or ssr (docs/blending.md); or a plug-in, module:name."
        ),
    ] = "linear",
    weights: Annotated[str, typer.Option(help="One for each, with commas; default: the method's own.")] = "",
    density: Annotated[float | None, typer.Option(help="Share of entries kept, where a method drops some.")] = None,
    scale: Annotated[str, typer.Option(help="Strength of the whole; auto: the LoRAs' mean energy.")] = "1",
    layers: Annotated[
        list[str] | None,
        typer.Option(help="REGEX=W multiplies the blend of these layers by W (0: left out); REGEX=W,W: their weights."),
    ] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(help="As --layers for blocks: 3-7=0.5, single_transformer_blocks.0-9=1,0.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="core: run the method in the core space of the LoRAs.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank to end at; default: the sum of all.")] = None,
    size: Annotated[str | None, typer.Option(help="Largest size of the file, such as 50MB: sets the rank.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.", autocompletion=DTYPES)] = "fp32",
    output: Output = Path("blend"),
    seed: Seed = 0,
    base: Base = None,
    drop: Drop = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="For regmean, regmean++ and ssr: prompts or edits of each LoRA, in order, or a recipe."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts or edits of each LoRA; default: 8, of ssr 1.")] = None,
    device: Device = None,
    report: Annotated[bool, typer.Option("--report", help="Also say and draw where the LoRAs fight.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be written; reads no weight.")] = False,
) -> None:
    """Merge LoRAs in weight space, without training, into one LoRA of any rank.

    Example: danceopd blend a.safetensors b.safetensors --method ties --weights 0.7,0.9 -o blend
    """
    from danceopd.adapters.blending.layers import parse_blocks, parse_layers
    from danceopd.cli.blend import Asked, Request, planned, run, show, summary

    if plan and report:
        raise UserError("--plan reads no weight, so it has no --report; leave one of the two out")
    request = Request(
        adapters, output, method, [number(word, "--weights") for word in words(weights)] or None, rank, density,
        scale if scale == "auto" else number(scale, "--scale"), seed, base, drop or (),
        (*parse_layers(layers or ()), *parse_blocks(blocks or ())), space, size, dtype,
        Asked(data or (), prompts, device),
    )  # fmt: skip
    if plan:
        echo(planned(request))
        return
    file, found = run(request, echo if report else None)
    show(found)
    echo(summary(found))
    echo(f"LoRA: {file.parent}")
