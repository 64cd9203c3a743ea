"""A recipe as a file with comments: what `danceopd init` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from danceopd.cli.wizard.look import TeacherFile

HEAD = """# yaml-language-server: $schema={schema}
# Written by `danceopd init`. `danceopd plan {file}` checks it, `danceopd merge {file}` runs it.
# What is not named here has its default; docs/recipe.md lists every key, docs/choosing.md says which ones to change.
"""
WIDE = 38
"""Column of the comments, where there is room."""


def recipe_text(
    fields: Mapping[str, Any], teachers: Sequence[TeacherFile], file: str, schema: str, card: str,
    sizes: Mapping[str, Any],
) -> str:
    """The text of a recipe. `fields` are its keys but for the teachers, `sizes` those that `card` asked for."""
    largest = max(one.rank for one in teachers)
    rank = f"no less than the {largest} of the teachers" if largest else "of the LoRA that is learnt"
    notes = {
        "base": "must be the one that the teachers were trained on",
        "editing_base": "what the base lacks to edit, such as an image processor, is read from here",
        "data": "prompts and edits that ship; or {generation: prompts.txt, editing: edits.csv} (docs/data.md)",
        "output": "the run's folder; the student is in it",
        "steps": "more as long as the validation error falls; fewer for a try",
        "batch": "rows of an update",
        "student": rank,
        "call": "what you will generate with",
    }
    lines = [HEAD.format(file=file, schema=schema)]
    for key, value in fields.items():
        lines.append(_line(f"{key}: {_value(value)}", notes.get(key, "")))
        if key == "base":
            lines += _teachers(teachers)
    lines.append(f"\n# {card}")
    if sizes:
        lines += [f"{key}: {_value(value)}" for key, value in sizes.items()]
    lines.append("# dtype, micro_batch, gradient_checkpointing and rollout.merged are auto: the fastest that fit.")
    return "\n".join(lines) + "\n"


def _teachers(teachers: Sequence[TeacherFile]) -> list[str]:
    lines = ["teachers:"]
    for one in teachers:
        fields = {"name": one.name, "adapter": one.path, "capability": one.capability}
        lines += [f"  # {one.about}", f"  - {_value(fields)}"]
    return [*lines, ""]


def _line(text: str, note: str) -> str:
    if not note:
        return text
    line = f"{text:<{WIDE}} # {note}"
    return line if len(line) <= 110 else f"# {note}\n{text}"


def _value(value: Any) -> str:
    """A value in YAML, on one line."""
    written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return written.strip()[1:-1]
