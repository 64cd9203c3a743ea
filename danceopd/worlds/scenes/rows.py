"""The data source "scenes": rows of synthetic scenes, made when they are asked for and not read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError


def is_scenes(spec: str | Path) -> bool:
    """Whether the source is "scenes" or some of its tasks, whose rows are generated and not read from a file."""
    return str(spec).partition(":")[0] == "scenes"


def scene_tasks(spec: str | Path, capability: str, split: str, count: int, seed: int) -> list[Any]:
    """`count` `Prompt`s or `Edit`s of `danceopd.worlds.scenes` from one split, of the tasks that `spec` names."""
    if capability != "editing":
        from danceopd.worlds.scenes.prompts import TAGS, prompts

        return prompts(split, count, seed, _only(spec, {tag: (tag,) for tag in TAGS}))
    from danceopd.worlds.scenes.edits import TASKS, edits, group_of
    from danceopd.worlds.scenes.grammar import BACKGROUNDS, STYLES

    goals = {"background_change": BACKGROUNDS, "style_change": STYLES}
    one = [f"{task}={value}" for task, values in goals.items() for value in values]  # one of a task's goals alone
    known = {task: (task,) for task in (*TASKS, *one)}
    for task in TASKS:
        known[group_of(task)] = (*known.get(group_of(task), ()), task)
    return edits(split, count, seed, _only(spec, known))


def scene_rows(spec: str | Path, capability: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` training rows: prompts, or instructions with their source; targets are rendered when they are read."""
    tasks = scene_tasks(spec, capability, "train", count, seed)
    if capability != "editing":
        return [{"prompt": task.prompt, "target": partial(_rendered, task.scene)} for task in tasks]
    return [
        {"instruction": e.instruction, "source": _rendered(e.source), "target": partial(_rendered, e.target)}
        for e in tasks
    ]


def _rendered(scene: Any) -> Image.Image:
    from danceopd.worlds.scenes.render import render

    return Image.fromarray(render(scene))


def _only(spec: str | Path, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The tasks that `scenes:a,b` names; None for all of them."""
    _, _, names = str(spec).partition(":")
    if not names:
        return None
    chosen: tuple[str, ...] = ()
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"data source {str(spec)!r} names the task {name!r}, which does not exist{hint}")
        chosen += known[name]
    return chosen
