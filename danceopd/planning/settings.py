"""What `auto` stands for in a recipe: the fastest settings that fit the card; and which changes make a recipe fit.

A merge settles its recipe here before it loads anything, so nothing after this sees `auto`. A run that has begun keeps
the settings in its folder. A recipe that does not fit is refused, with changes that would make it fit and their time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from danceopd.common.system import gigabytes
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.models.base import stored_dtype
from danceopd.planning.cards import CARDS, Card
from danceopd.planning.checks import for_distilled, note_of_triggers
from danceopd.planning.memory import PHASES, Part, memory, peak
from danceopd.planning.outline import Outline, outline
from danceopd.planning.times import queries, relative_time
from danceopd.recipe.recipe import AUTO, Recipe
from danceopd.run.directory import begun_recipe, is_finished

NEEDED = tuple(phase for phase in PHASES if phase != "trial")
"""Phases that a run cannot do without: a trial that finds no room leaves the stock modules."""
FILLED = 0.91
"""How much of a card `auto` fills: the rest is for what an allocator loses between blocks of memory."""
SIDES = (768, 512)
"""Sides of smaller pictures that are offered, in pixels."""
RANKS = (32, 16)
"""Smaller ranks that are offered."""
OFFLOADED = {"rollout.merged": False, "gradient_checkpointing": True}
"""What an offloaded base works with."""


@dataclass(frozen=True)
class Prepared:
    """A recipe without `auto`, the outline of its run (None: the run has ended), and lines for the user."""

    recipe: Recipe
    run: Outline | None
    said: list[str]


class Change(NamedTuple):
    """A change of a recipe: the new values by key, and how it is written there."""

    values: dict[str, Any]
    words: str

    @property
    def kind(self) -> str:
        """Changes of one kind take each other's place."""
        return "offload" if "offload" in self.values else next(iter(self.values))


def prepare(
    recipe: Recipe, folder: Path, teachers: Sequence[TeacherWeights], card: Card, world: int = 1, *,
    ended: bool = True, room: bool = True,
) -> Prepared:  # fmt: skip
    """Settle what a recipe leaves open; UserError for what a merge would refuse later, and where it has no room.

    `folder` is the base's, `teachers` as `check_teachers` returns them, `world` processes share the run. Without
    `ended` a run that has ended is outlined, too; without `room` one that can be outlined and does not fit passes.
    """
    begun = begun_recipe(recipe.output, recipe)
    recipe, said = for_distilled(recipe, folder, begun)
    schedule = recipe.optimizer.schedule
    if begun is not None and begun.steps != recipe.steps and schedule != "constant":
        moves = "rises" if recipe.steps > begun.steps else "falls"
        said.append(
            f"optimizer.schedule {schedule} ends at step {recipe.steps} now, not at {begun.steps}: the learning rate "
            f"{moves} where the run goes on"
        )
    kept = {} if begun is None else {key: begun.value(key) for key in AUTO}
    if ended and is_finished(recipe.output, recipe):
        return Prepared(recipe.replaced({key: value for key, value in kept.items() if _is_auto(recipe, key)}), None, [])
    run = outline(recipe, folder, teachers)
    if run.saved == "nf4" and not card.cuda:
        raise UserError(
            f"{folder} was saved quantised to 4 bits, which diffusers loads on a GPU alone; take the model in bf16"
        )
    settled = settle(recipe, run, card, kept, world)
    refused = run.refused or unfit(settled, run, card, world)
    if room and refused:
        raise UserError(refused)
    if any(_is_auto(recipe, key) for key in AUTO):
        need = gigabytes(_worst(memory(settled, run, card, world)))
        said.append(f"settings: {_written(settled, AUTO)} (planned: {need} of {gigabytes(card.memory)} of {card.name})")
    if settled.monitor.every is None and settled.monitored_every:
        said.append(
            f"monitored every {settled.monitored_every} steps on {settled.monitor.prompts} held-out prompts, for the "
            "run goes beyond plain distillation (monitor.every: 0 switches it off)"
        )
    return Prepared(settled, run, [*said, *note_of_triggers(recipe), *run.notes])


def settle(
    recipe: Recipe, run: Outline, card: Card, kept: Mapping[str, Any] | None = None, world: int = 1
) -> Recipe:
    """The recipe with values in place of `auto`: those in `kept`, else the fastest that fit, else the leanest."""
    kept = dict(kept or {})
    if recipe.offload == "blocks":  # may be new since the run began, and works with nothing else
        kept |= {key: value for key, value in OFFLOADED.items() if key in kept}
    begun = {key: kept[key] for key in AUTO if _is_auto(recipe, key) and kept.get(key, "auto") != "auto"}
    recipe = recipe.replaced({key: value for key, value in begun.items() if key == "dtype"})
    if recipe.dtype == "auto":
        half = card.cuda and card.bf16 and stored_dtype(run.folder) in (torch.bfloat16, torch.float16)
        half |= run.saved is not None  # what is around its packed weights is in bf16
        recipe = recipe.replaced({"dtype": "bf16" if half else "fp32"})
    options = list(_options(recipe, run, world))
    if begun:
        options.insert(0, recipe.replaced(begun))
    found = queries(recipe, run)
    needs = [_worst(memory(option, run, card, world)) for option in options]
    if begun and needs[0] <= card.memory:
        return options[0]
    fitting = [option for option, need in zip(options, needs) if need <= FILLED * card.memory]
    if not fitting:
        return options[needs.index(min(needs))]
    return min(fitting, key=lambda option: relative_time(option, run, found))


def unfit(recipe: Recipe, run: Outline, card: Card, world: int = 1) -> str | None:
    """Why a settled recipe is refused, with changes that make it fit and what each costs; None where it has room."""
    parts = memory(recipe, run, card, world)
    need = _worst(parts)
    if need <= card.memory:
        return None
    phase = max(NEEDED, key=lambda one: peak(parts, one))
    what = f"the merge needs about {gigabytes(need)} ({phase}) and {card.name} has {gigabytes(card.memory)}"
    found = _changes(recipe, run, card, world)
    if found is None:
        smallest = min((memory_ for memory_, _ in CARDS.values() if memory_ * 1e9 >= need), default=None)
        larger = "" if smallest is None else f" of {smallest:.0f} GB or more"
        return f"{what}; smaller batches, pictures and ranks do not make it fit: take a card{larger}, or a smaller base"
    changes, left = found
    words = [f"{change.words} ({_cost(recipe, run, change)})" for change in changes]
    return f"{what}; it fits in {gigabytes(left)} with {' and '.join(words)}"


def changes_that_fit(recipe: Recipe, run: Outline, card: Card) -> list[Change] | None:
    """The changes with which a settled recipe fits a card, none where it does; None where nothing makes it fit."""
    if _worst(memory(recipe, run, card)) <= card.memory:
        return []
    found = _changes(recipe, run, card, 1)
    return None if found is None else found[0]


def _changes(recipe: Recipe, run: Outline, card: Card, world: int) -> tuple[list[Change], int] | None:
    """The fewest changes, of those that cost least first, that make a recipe fit; and the memory that it then takes.
    None where nothing does."""
    offered = list(_offered(recipe, run, card))

    def need(changes: Sequence[Change]) -> int:
        changed, outline_ = recipe, run
        for change in changes:
            changed = changed.replaced(change.values)
            if "call.height" in change.values:
                outline_ = run.at_size(changed, change.values["call.height"])
        return _worst(memory(changed, outline_, card, world))

    taken: list[Change] = []
    for change in offered:
        taken = [one for one in taken if one.kind != change.kind] + [change]
        if need(taken) <= card.memory:
            break
    else:
        return None
    for change in list(taken):
        fewer = [one for one in taken if one is not change]
        if need(fewer) <= card.memory:
            taken = fewer
    return taken, need(taken)


def _offered(recipe: Recipe, run: Outline, card: Card) -> Iterator[Change]:
    """Changes that take less memory, those that cost least first."""
    if recipe.dtype == "fp32" and card.cuda:
        dtype = "bf16" if card.bf16 else "fp16"
        yield Change({"dtype": dtype}, f"dtype: {dtype}")
    if recipe.rows_at_once > recipe.group_size:
        yield Change({"micro_batch": recipe.group_size}, f"micro_batch: {recipe.group_size}")
    if not recipe.gradient_checkpointing:
        yield Change({"gradient_checkpointing": True}, "gradient_checkpointing: true")
    if recipe.rollout.merged:
        yield Change({"rollout.merged": False}, "rollout.merged: false")
    plain = run.may_be_stored_otherwise and run.kept(recipe) is None
    plain = plain and recipe.offload == "none" and recipe.parallel != "fsdp" and not recipe.compile
    if plain and card.cuda and recipe.objective != "flowopd":
        also = {"rollout.merged": False} if recipe.rollout.merged else {}
        yield Change({"base_dtype": "nf4", "offload": "none", **also}, _also("base_dtype: nf4", also))
    if plain and card.cuda:
        also = {key: value for key, value in OFFLOADED.items() if recipe.value(key) != value}
        yield Change({"base_dtype": None, "offload": "blocks", **also}, _also("offload: blocks", also))
    for side in SIDES:
        if max(p.size[0] * p.size[1] for p in run.pictures) > side * side:
            yield Change({"call.height": side, "call.width": side}, f"call: {{height: {side}, width: {side}}}")
    for rank in RANKS:
        if rank < recipe.student.rank:
            yield Change({"student.rank": rank}, f"student: {{rank: {rank}}}")


def _also(words: str, values: Mapping[str, Any]) -> str:
    """A change in words, with what it needs besides."""
    return ", ".join([words, *(f"{key}: {str(value).lower()}" for key, value in values.items())])


def _cost(recipe: Recipe, run: Outline, change: Change) -> str:
    """What a change costs in time, in words."""
    changed = recipe.replaced(change.values)
    after = run.at_size(changed, change.values["call.height"]) if "call.height" in change.values else run
    if "dtype" in change.values:
        return "faster"
    ratio = relative_time(changed, after, queries(changed, after)) / relative_time(recipe, run, queries(recipe, run))
    if abs(ratio - 1) < 0.005:
        return "no more time"
    return f"{ratio - 1:.0%} more time" if ratio > 1 else f"{1 - ratio:.0%} less time"


def _options(recipe: Recipe, run: Outline, world: int) -> Iterator[Recipe]:
    """The recipe with every combination of what it leaves to `auto`, the plainest first."""
    rows: list[int | None] = [None]
    count = recipe.batch
    while count > recipe.group_size:
        count = max(recipe.group_size, -(-count // 2) // recipe.group_size * recipe.group_size)
        rows.append(count)
    sharded = recipe.parallel == "fsdp" and world > 1
    shared, packed = recipe.offload == "blocks", run.kept(recipe) is not None
    choices: dict[str, Sequence[Any]] = {
        "rollout.merged": (False,) if sharded or shared or packed else (True, False),
        "gradient_checkpointing": (True,) if shared else (False, True), "micro_batch": rows,
    }  # fmt: skip
    open_ = [key for key in choices if _is_auto(recipe, key)]
    found: list[dict[str, Any]] = [{}]
    for key in open_:
        found = [{**values, key: value} for values in found for value in choices[key]]
    yield from (recipe.replaced(values) for values in found)


def _worst(parts: Sequence[Part]) -> int:
    return max(peak(parts, phase) for phase in NEEDED)


def _is_auto(recipe: Recipe, key: str) -> bool:
    return bool(recipe.value(key) == "auto")


def _written(recipe: Recipe, keys: Sequence[str]) -> str:
    """Keys and values as a recipe writes them."""
    shown = {None: "all", True: "true", False: "false"}
    return ", ".join(f"{key} {shown.get(value, value)}" for key in keys for value in (recipe.value(key),))
