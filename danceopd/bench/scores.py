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

from danceopd.bench import compare
from danceopd.bench.models import Lineup, best_blend
from danceopd.errors import UserError
from danceopd.recipe import CAPABILITIES

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


def summarise(work: _Work, rows: Sequence[dict]) -> dict:
    """Everything `scores.json` says but the seconds."""
    lineup, means = work.lineup, {}
    capabilities = [c for c in CAPABILITIES if work.items.get(c)]
    for model in lineup.models:
        means[model.name] = {c: compare.summary(rows, model.name, c) for c in capabilities}
    blends = lineup.roles("blend")
    best = best_blend(means, blends)
    shown = [m for m in lineup.models if m.role != "blend" or m.name == best]
    blend_grid = []
    for model in (m for m in lineup.models if m.role == "blend"):
        found = {c: (means[model.name].get(c) or {}).get("overall", {}).get("mean") for c in CAPABILITIES}
        blend_grid.append(
            {"name": model.name, "label": model.label, "weights": list(model.weights), "best": model.name == best}
            | found
        )
    others = [m.name for m in shown if m.role != "student"]
    teachers = {c: lineup.teachers_first_of(c) for c in capabilities}
    base = next((m.name for m in shown if m.role == "base"), None)
    probes: dict[str, dict] = {}
    for row in rows:
        if row["probe"]:
            entry = probes.setdefault(row["probe"], {"capability": row["capability"], "models": {}})
            entry["models"].setdefault(row["model"], []).append(row["score"])
    for entry in probes.values():
        share = entry["capability"] == "generation"
        entry["models"] = {name: compare.mean(values, share) for name, values in entry["models"].items()}
    return {
        "format": "danceopd-bench/1",
        "suite": {"name": work.suite.name, "version": work.suite.version, "protocol": work.suite.protocol},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": work.seed,
        "limit": work.limit,
        "call": work.call,
        "base": {"path": lineup.base.path, "sha256": lineup.base.sha256},
        "student": lineup.student.name,
        "models": [
            {
                "name": m.name,
                "label": m.label,
                "role": m.role,
                "path": m.path,
                "sha256": m.sha256,
                "weights": list(m.weights),
                "capability": m.capability,
            }
            | means[m.name]
            for m in shown
        ],
        "comparison": {
            c: compare.comparison(rows, lineup.student.name, base, teachers[c], others, c) for c in capabilities
        },
        "blend_grid": blend_grid if len(blend_grid) > 1 else [],
        "probes": probes,
        "ceiling": work.ceiling,
        "versions": _versions(),
        "machine": _machine(work.device),
    }
