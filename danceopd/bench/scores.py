"""What a finished bench says: `scores.json`, put together from rows, and read back.

Everything a reader or another program needs stands in one plain JSON object: the models and their hashes, means
with intervals, failures with the bounds they leave, the student's comparison, subsets, probes and blends apart, the
ceiling, and what made the numbers: suite, protocol, rules, judge, seed, call, versions, machine. The table
and the report read nothing else but the rows beside it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench import compare
from danceopd.bench.interference import interference
from danceopd.bench.metrics import figures
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


def suite_facts(suite: Any) -> dict:
    """A suite's protocol, as plain JSON."""
    facts: dict[str, Any] = {key: getattr(suite, key) for key in ("name", "version", "protocol", "rules", "share")}
    facts["scale"] = {capability: list(ends) for capability, ends in suite.scale.items()}
    return facts | {"subsets": {name: list(parts) for name, parts in suite.subsets.items()}}


def summarise(rows: Sequence[dict], lineup: Lineup, suite: Any, settings: dict) -> dict:
    """`scores.json` of a bench; `settings` is what its maker knows, from the seed to the seconds it took."""
    capabilities = [c for c in CAPABILITIES if any(r["capability"] == c and compare.ordinary(r) for r in rows)]
    kind = {c: {"share": suite.share[c], "scale": suite.scale[c]} for c in suite.scale}
    means = {m.name: {c: compare.summary(rows, m.name, c, **kind[c]) for c in capabilities} for m in lineup.models}
    best = best_blend(means, lineup.roles("blend"), suite.scale)
    shown = [m for m in lineup.models if m.role != "blend" or m.name == best]
    others = [m.name for m in shown if m.role != "student"]
    base = next((m.name for m in shown if m.role == "base"), None)
    student = lineup.student.name
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "suite": suite_facts(suite),
        "base": lineup.base and {"path": lineup.base.path, "sha256": lineup.base.sha256},
        "student": student,
        "models": [_about(m, rows) | means[m.name] for m in shown],
        "comparison": {
            c: compare.comparison(rows, student, base, lineup.teachers_first_of(c), others, c, **kind[c])
            for c in capabilities
        },
        "interference": interference(
            rows,
            student,
            base,
            lineup.roles("teacher"),
            [m.name for m in shown if m.role == "blend"],
            suite.share,
            suite.scale,
        ),
        "subsets": _subsets(rows, [m.name for m in shown], suite, kind),
        "metrics": _metrics(rows, [m.name for m in shown], capabilities),
        "blend_grid": _blend_grid(lineup, means, best),
        "probes": _probes(rows, kind),
        "versions": versions(),
        **settings,
    }


def _about(model: Model, rows: Sequence[dict]) -> dict:
    kept = ("name", "label", "role", "path", "sha256", "capability")
    about = {key: getattr(model, key) for key in kept} | {"weights": list(model.weights)}
    if model.pictures is not None:  # nobody knows its weights: its pictures stand for it
        seen = sorted(f"{r['key']} {r['pixels_sha256']}\n" for r in rows if r["model"] == model.name)
        about["sha256"] = hashlib.sha256("".join(seen).encode()).hexdigest()
    return about


def _subsets(rows: Sequence[dict], models: Sequence[str], suite: Any, kind: dict) -> dict[str, dict]:
    """subset -> capability -> model -> its overall figure there."""
    found: dict[str, dict] = {}
    for capability, how in kind.items():
        for name, by_model in compare.subsets(rows, models, capability, suite.subsets, **how).items():
            found.setdefault(name, {})[capability] = by_model
    return found


def _metrics(rows: Sequence[dict], models: Sequence[str], capabilities: Sequence[str]) -> dict[str, dict]:
    """capability -> model -> what needs no judge."""
    return {c: {name: figures(rows, name, c) for name in models} for c in capabilities}


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


def _probes(rows: Sequence[dict], kind: dict) -> dict[str, dict]:
    """Probe -> its capability, and by model a mean with its interval."""
    values: dict[str, dict[str, list[float | None]]] = {}
    capability = {row["probe"]: row["capability"] for row in rows if row["probe"]}
    for row in rows:
        if row["probe"]:
            values.setdefault(row["probe"], {}).setdefault(row["model"], []).append(row["score"])
    return {
        probe: {
            "capability": capability[probe],
            "models": {m: compare.mean(v, **kind[capability[probe]]) for m, v in by_model.items()},
        }
        for probe, by_model in values.items()
    }


def best_blend(
    summaries: dict[str, dict], blends: Sequence[str], scale: Mapping[str, tuple[float, float]]
) -> str | None:
    """The blend with the highest sum of overall scores, each from 0 to 1 of its scale; failures count as the lowest."""
    if not blends:
        return None

    def worth(name: str) -> float:
        found = ((scale[c], s["overall"]) for c, s in summaries[name].items() if s)
        return sum((overall["lower"] - low) / (high - low) for (low, high), overall in found)

    return max(blends, key=worth)
