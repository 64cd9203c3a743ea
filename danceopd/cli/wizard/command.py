"""The command `danceopd init`: looks at the files, asks for what they do not say, writes a recipe and plans it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danceopd.cli.boundary import echo
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.cli.wizard.look import TeacherFile

STEPS, RANK = 1000, 64
SIDE = 1024
"""Pixels of a side that are proposed; a card that is too small for them gets fewer."""


def init(
    files: Annotated[
        list[str] | None, typer.Argument(help="LoRAs and whole models, in any order; a pipeline's folder is the base.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a folder, or owner/name on the hub.")] = None,
    generation: Annotated[str | None, typer.Option(help="The file that draws from prompts.")] = None,
    editing: Annotated[str | None, typer.Option(help="The file that edits pictures.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    gpu: Annotated[
        str | None, typer.Option(help="A card that is not here: its memory (24GB) or its name (4090, h100).")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; say what was assumed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a recipe for these files, with comments, for the card that is here, and plan it.

    Example: danceopd init draw.safetensors edit.safetensors --base black-forest-labs/FLUX.2-klein-base-4B
    """
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name the recipe's file, such as {output / 'recipe.yaml'}")
    if output.exists() and not force:
        raise UserError(f"{output} is there already; --force replaces it, -o names another")
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not yes
    base, teachers = _sorted_out(base, files or [], generation, editing, asks)
    for one in teachers:
        echo(f"{one.about}: {'edits' if one.capability == 'editing' else 'draws'}")
    fields: dict[str, Any] = {"base": base}
    settled, said, sizes, card = _preset(fields, teachers, gpu)
    for line in said:
        echo(line)
    _write(output, settled, teachers, card, sizes)
    echo(f"recipe: {output}\n")
    _plan(output, gpu)


def _sorted_out(
    base: str | None, files: Sequence[str], generation: str | None, editing: str | None, asks: bool
) -> tuple[str, list[TeacherFile]]:
    """The base, and the teachers with their capabilities; what is not known is asked for, or refused."""
    from danceopd.cli.wizard.look import BASES, look, named_apart, shared_base

    teachers: list[TeacherFile] = []
    given = [(path, capability) for path, capability in ((generation, "generation"), (editing, "editing")) if path]
    for path, capability in [*given, *((path, None) for path in files)]:
        found = look(path, is_base=base is None and capability is None)
        if isinstance(found, str):
            base = found
        else:
            teachers.append(found if capability is None else replace(found, capability=capability))
    if not teachers:
        raise UserError("there is no file to merge; give the LoRAs, such as danceopd init draw.safetensors "
                        "edit.safetensors --base owner/name")  # fmt: skip
    base = base or shared_base(teachers)
    if base is None:
        families = [family for one in teachers for family in one.families]
        hint = next((BASES[family] for family in families if family in BASES), None)
        if not asks:
            such = f" (for {families[0]} often {hint})" if hint else ""
            raise UserError(f"none of the files says which base it was trained on; give --base{such}")
        base = typer.prompt("Base model: a folder, or owner/name on the hub", default=hint)
    return base, _capabilities(named_apart(teachers), _edits(base), asks)


def _edits(base: str) -> bool:
    """Whether the base's family can edit at all, as far as that is known without a download."""
    from danceopd.common.shipped import resolve

    place = Path(resolve(base, "base model", hub=True))
    if not (place / "model_index.json").is_file():
        return True
    from danceopd.pipelines.registry import family_of

    return family_of(place).editing is not None


def _capabilities(teachers: list[TeacherFile], edits: bool, asks: bool) -> list[TeacherFile]:
    """Each teacher with a capability; a lone one gets the base beside it."""
    from danceopd.cli.wizard.look import TeacherFile

    found = []
    for one in teachers:
        if not edits and one.capability == "editing":
            raise UserError(f"{one.path} is named for editing, and the base's family only draws; name it --generation")
        if not edits:
            one = replace(one, capability="generation")
        elif one.capability is None and asks:
            answer = typer.prompt(f"{one.path}: does it draw (d) or edit (e)?", default="d")
            one = replace(one, capability="editing" if answer.strip().lower().startswith("e") else "generation")
        elif one.capability is None:
            echo(f"assumed: {one.path} draws, for its name does not say that it edits (--editing {one.path} says so)")
            one = replace(one, capability="generation")
        found.append(one)
    if len(found) > 1:
        return found
    other = "editing" if edits and found[0].capability == "generation" else "generation"
    echo(f"assumed: one file alone cannot be merged, so the base itself is the second teacher, for {other}")
    return [*found, TeacherFile("base", "plain", 0, (), None, other)]


def _preset(
    fields: dict[str, Any], teachers: Sequence[TeacherFile], gpu: str | None
) -> tuple[dict[str, Any], list[str], dict[str, Any], str]:
    """The recipe's fields, what there is to say, the keys that the card asks for, and a line on the card."""
    from danceopd.cli.wizard.look import EDITING_BASES
    from danceopd.common.system import gigabytes, resolve_device
    from danceopd.engine.teachers import check_teachers
    from danceopd.models.base import base_folder
    from danceopd.planning.cards import card_here, card_named
    from danceopd.planning.settings import changes_that_fit, prepare
    from danceopd.recipe.recipe import AUTO, Recipe

    card = card_here(resolve_device("auto")) if gpu is None else card_named(gpu)
    largest = max(one.rank for one in teachers)
    names = chain(["student"], (f"student-{number}" for number in count(2)))
    output = next(name for name in names if not Path(name).exists())
    fields |= {"data": "auto", "output": output, "steps": STEPS, "batch": 8, "student": {"rank": max(RANK, largest)}}
    if not _has_size(fields["base"]):
        fields["call"] = {"height": SIDE, "width": SIDE}
    else:
        del fields["data"]  # the small base has its scenes
    named = [{"name": one.name, "adapter": one.path, "capability": one.capability} for one in teachers]
    recipe = Recipe("the recipe", **fields, teachers=named)
    folder, said = base_folder(recipe.base), list[str]()
    if not card.cuda:
        said.append("there is no GPU here; --gpu 24GB writes the recipe for another machine")
    prepared = prepare(recipe, folder, check_teachers(recipe.teachers, folder, values=False), card, ended=False,
                       room=False)  # fmt: skip
    assert prepared.run is not None
    if prepared.run.refused and (editing := EDITING_BASES.get(prepared.run.family.name)):
        fields["editing_base"] = editing
        said.append(f"assumed: editing_base {editing}, which has what {fields['base']} lacks to edit")
    sizes: dict[str, Any] = {}
    for change in changes_that_fit(prepared.recipe, prepared.run, card) or []:
        for key, value in change.values.items():
            if value in (None, "none") or (key in AUTO and key != "dtype"):
                continue  # as it is by default, or found by auto
            part, _, name = key.partition(".")
            if name:
                fields[part] = {**fields.get(part, {}), name: value}
            else:
                sizes[key] = value
            said.append(f"for {card.name}: {key} {value}")
    return fields, said, sizes, f"for {card.name}, {gigabytes(card.memory)}"


def _has_size(base: str) -> bool:
    """Whether the base says by itself in which size it draws."""
    from danceopd.common.shipped import resolve

    return (Path(resolve(base, "base model", hub=True)) / "danceopd.json").is_file()


def _write(
    output: Path, fields: dict[str, Any], teachers: Sequence[TeacherFile], card: str, sizes: dict[str, Any]
) -> None:
    """The recipe, and the schema that its first line names beside it."""
    from danceopd.cli.wizard.text import recipe_text
    from danceopd.common.files import disk_errors, write_atomic, write_json
    from danceopd.recipe.reference import SCHEMA, schema

    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if not (output.parent / SCHEMA.name).exists():
            write_json(output.parent / SCHEMA.name, schema())
        write_atomic(output, recipe_text(fields, teachers, output.name, SCHEMA.name, card, sizes).encode())


def _plan(output: Path, gpu: str | None) -> None:
    """The plan of the written recipe, as `danceopd plan` prints it."""
    from danceopd.cli.plan import show
    from danceopd.plan import plan
    from danceopd.recipe.recipe import Recipe

    facts = plan(Recipe.from_yaml(output), gpu=gpu)
    show(facts)
    if facts["refused"]:
        raise UserError(f"{output} is written, and a merge would refuse it: {facts['refused']}")
