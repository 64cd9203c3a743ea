"""What a student's run folder says about its training, for the report: recipe, samples, alarms, validation error.

Each is None where the run does not have it, or where the student is not a run's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from danceopd.common.files import disk_errors, partial_path
from danceopd.common.parse import YAML_BYTES, parse_yaml, read_text
from danceopd.errors import UserError
from danceopd.run.card import without_paths

FAULTS = (OSError, ValueError, KeyError, TypeError)
"""Errors of a file that is missing, or not as a run writes it."""
GRIDS, GRID_SIDE = 4, 1280
"""Sample grids of a run that are copied, and their longest side in pixels."""


def about_training(student: str | Path | None, folder: Path) -> dict[str, Any]:
    """All of it, for `scores.json`; sample grids are copied into the bench's `folder`."""
    about: dict[str, Any] = {"monitor": monitor_summary(student), "validation": validation_error(student)}
    about |= {"skills": skills_summary(student), "recipe": recipe_summary(student), "recipe_yaml": recipe_text(student)}
    return about | {"samples": training_samples(student, folder)}


def recipe_summary(student: str | Path | None) -> dict[str, Any] | None:
    """What was merged and how, from the run's recipe.yaml: {base, teachers, rank, steps}.

    A teacher is {name, adapter, capability, scale, weight}; of paths only the last part, since reports are shared.
    """
    with suppress(*FAULTS, yaml.YAMLError, UserError, AttributeError):
        found = parse_yaml(read_text(Path(student or "") / "recipe.yaml", "recipe", YAML_BYTES))
        kept = ("name", "adapter", "capability", "scale", "weight")
        teachers = [{key: t[key] for key in kept if t.get(key) is not None} for t in found["teachers"]]
        for teacher in teachers:
            teacher["adapter"] = Path(str(teacher.get("adapter", "base"))).name
        about = {"base": Path(str(found["base"])).name, "teachers": teachers, "rank": found["student"]["rank"]}
        return about | {"steps": found["steps"]}
    return None


def recipe_text(student: str | Path | None) -> str | None:
    """The run's whole recipe.yaml, with the last part of every path only."""
    with suppress(*FAULTS, yaml.YAMLError, UserError):
        found = parse_yaml(read_text(Path(student or "") / "recipe.yaml", "recipe", YAML_BYTES))
        return yaml.safe_dump(without_paths(found), sort_keys=False, allow_unicode=True, width=100)
    return None


def training_samples(student: str | Path | None, folder: Path) -> list[dict[str, Any]]:
    """Copies of the run's sample grids below `folder`/training: [{step, image}], the first, the last, some between.

    Empty where the run drew none.
    """
    steps: dict[int, Path] = {}
    for file in (Path(student) / "samples").glob("step-*.png") if student else ():
        with suppress(ValueError):
            steps[int(file.stem.removeprefix("step-"))] = file
    order = sorted(steps)
    chosen = dict.fromkeys(order[round(n * (len(order) - 1) / (GRIDS - 1))] for n in range(GRIDS)) if order else {}
    found = []
    for step in chosen:
        copy = folder / "training" / f"{steps[step].stem}.webp"
        with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(steps[step]) as opened:
            picture = opened.convert("RGB")
            picture.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
            with disk_errors(copy):
                copy.parent.mkdir(exist_ok=True)
                part = partial_path(copy)
                picture.save(part, format="WEBP", quality=85)
                part.replace(copy)
            found.append({"step": step, "image": f"training/{copy.name}"})
    return found


def monitor_summary(student: str | Path | None) -> dict[str, Any] | None:
    """The monitor's judge, its alarms, what was rolled back, and how many checks there were."""
    with suppress(*FAULTS):
        found = _read(student, "monitor.json", "watch.json")
        return {key: found[key] for key in ("judge", "alarms", "rolled_back")} | {"checks": len(found["checks"])}
    return None


def skills_summary(student: str | Path | None) -> list[str] | None:
    """What a run with ranked samples saw in hindsight, in sentences; None where it saw nothing."""
    with suppress(*FAULTS, AttributeError):
        return [str(line) for one in _read(student, "skills.json").values() for line in one.get("summary", [])] or None
    return None


def validation_error(student: str | Path | None) -> dict[str, Any] | None:
    """The run's velocity error against its teachers on held-out prompts: every check, and the exported step.

    {checks: [{step, error, teachers: name -> error}], exported, rows}; an `error` is 0 for the teachers' own velocity,
    and None where it could not be measured. None as a whole until the run has finished, or if the exported step was
    not checked.
    """
    with suppress(*FAULTS):
        found, finished = _read(student, "validation.json", "gap.json"), _read(student, "finished.json")
        checks = [
            {
                "step": check["step"],
                "error": _error(check),
                "teachers": {name: _error(teacher) for name, teacher in check["teachers"].items()},
            }
            for check in found["checks"]
        ]
        exported = finished.get("exported", finished["step"])
        if any(check["step"] == exported for check in checks):
            return {"checks": checks, "exported": exported, "rows": found["rows"]}
    return None


def _error(check: Mapping[str, Any]) -> float | None:
    """The validation error of a check; older runs call it a gap."""
    return _number(check["error"] if "error" in check else check["gap"])


def _read(student: str | Path | None, *names: str) -> Any:
    """The JSON of the first of the files that exists; older runs have the later names."""
    files = [Path(student or "") / name for name in names]
    file = next((file for file in files if file.is_file()), files[0])
    return json.loads(file.read_text(encoding="utf-8"))


def _number(value: Any) -> float | None:
    """A number; None for one that is not finite, which runs write by name ("nan")."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
