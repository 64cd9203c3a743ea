"""What a finished bench says: `scores.json`, put together from rows, and read back.

Everything a reader or another program needs stands in one plain JSON object: the models and their hashes, means
with intervals, the student's comparison, probes and blends apart, the ceiling, and what made the numbers: suite,
protocol, seed, call, versions, machine. The table and the report read nothing else but the rows beside it.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.bench import compare
from danceopd.errors import UserError
from danceopd.recipe import CAPABILITIES

if TYPE_CHECKING:
    from danceopd.bench.models import Lineup, Model

FORMAT = "danceopd-bench/1"


def load(folder: str | Path) -> tuple[dict, list[dict]]:
    """(scores, rows) of a bench folder. UserError when it is none, or is not complete."""
    folder = Path(folder)
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no finished bench ({Path(error.filename).name} is missing); run "
            "`danceopd bench` with this output folder first."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder} holds a damaged bench ({error}); run `danceopd bench` again into another folder."
        ) from None
    return scores, rows


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("danceopd", "torch", "diffusers", "transformers", "peft", "numpy", "pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: str) -> str:
    """What it ran on, in words."""
    import torch

    chip = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.system()} {platform.machine()}, {chip}"


def summarise(rows: Sequence[dict], lineup: Lineup, settings: dict) -> dict:
    """`scores.json` of a bench; `settings` is what its maker knows, from the suite to the seconds it took."""
    capabilities = [c for c in CAPABILITIES if any(r["capability"] == c and not r["probe"] for r in rows)]
    means = {m.name: {c: compare.summary(rows, m.name, c) for c in capabilities} for m in lineup.models}
    best = best_blend(means, lineup.roles("blend"))
    shown = [m for m in lineup.models if m.role != "blend" or m.name == best]
    others = [m.name for m in shown if m.role != "student"]
    base = next((m.name for m in shown if m.role == "base"), None)
    student = lineup.student.name
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "base": {"path": lineup.base.path, "sha256": lineup.base.sha256},
        "student": student,
        "models": [_about(m) | means[m.name] for m in shown],
        "comparison": {
            c: compare.comparison(rows, student, base, lineup.teachers_first_of(c), others, c) for c in capabilities
        },
        "blend_grid": _blend_grid(lineup, means, best),
        "probes": _probes(rows),
        "versions": versions(),
        **settings,
    }


def _about(model: Model) -> dict:
    kept = ("name", "label", "role", "path", "sha256", "capability")
    return {key: getattr(model, key) for key in kept} | {"weights": list(model.weights)}


def _blend_grid(lineup: Lineup, means: dict, best: str | None) -> list[dict]:
    """Every blend that was tried, when there is more than one."""
    blends = [m for m in lineup.models if m.role == "blend"]
    if len(blends) < 2:
        return []
    found = []
    for model in blends:
        overall = {c: (means[model.name].get(c) or {}).get("overall", {}).get("mean") for c in CAPABILITIES}
        found.append({"name": model.name, "label": model.label, "weights": list(model.weights)} | overall)
        found[-1]["best"] = model.name == best
    return found


def _probes(rows: Sequence[dict]) -> dict[str, dict]:
    """Probe -> its capability, and by model a mean with its interval."""
    values: dict[str, dict[str, list[float]]] = {}
    capability = {row["probe"]: row["capability"] for row in rows if row["probe"]}
    for row in rows:
        if row["probe"]:
            values.setdefault(row["probe"], {}).setdefault(row["model"], []).append(row["score"])
    return {
        probe: {
            "capability": capability[probe],
            "models": {m: compare.mean(v, capability[probe] == "generation") for m, v in by_model.items()},
        }
        for probe, by_model in values.items()
    }


def best_blend(summaries: dict[str, dict], blends: Sequence[str]) -> str | None:
    """The blend with the highest sum of overall scores, editing counted from 0 to 1."""
    if not blends:
        return None
    scale = dict.fromkeys(CAPABILITIES, 1.0) | {"editing": 0.1}

    def worth(name: str) -> float:
        return sum(scale[c] * s["overall"]["mean"] for c, s in summaries[name].items() if s)

    return max(blends, key=worth)
