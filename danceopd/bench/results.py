"""The result of a bench: `scores.json`, computed from the rows (`summarise`), and read back (`load`).

One plain JSON object with everything that a reader or another program needs: the models and their hashes, means with
intervals, failures with the bounds that they leave and their reasons, the student's comparison, the verdict, subsets,
probes and blends, the ceiling, and what produced the numbers (suite, protocol, rules, judge, seed, call, versions,
machine). The tables and the report read nothing else but the rows beside it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from danceopd.bench import statistics
from danceopd.bench.interference import interference
from danceopd.bench.metrics.metrics import metric_means
from danceopd.bench.pages.contact import NAME as CONTACT_SHEET
from danceopd.bench.report.facts import ALL_RIGHT
from danceopd.bench.report.schema import check_row, check_scores, rename_steps
from danceopd.bench.report.verdict import MARGIN, verdict
from danceopd.bench.suites.protocol import JudgedSuite
from danceopd.common.system import command_line, redacted
from danceopd.errors import UserError
from danceopd.plugins import is_plugin, name_of, origin
from danceopd.recipe.recipe import CAPABILITIES

if TYPE_CHECKING:
    from danceopd.bench.lineup import Lineup, Model
    from danceopd.bench.suites.protocol import Suite

FORMAT = "danceopd-bench/1"
OLD_KEYS = {"watch": "monitor", "field_gap": "validation"}
"""Keys of the scores of older benches, and what they are called now."""


NO_JUDGE = "no judge was asked"
"""The reason of rows that nobody was to score (`--judge none`)."""
UNSCORED_SHOWN, REASON = 3, 400
"""Reasons that are kept, and characters of each."""


class Benched:
    """What has a folder, and after a bench its results: `scores`, `report` and `grid`."""

    folder: Path

    @property
    def bench_folder(self) -> Path:
        """Where its bench is, or would be."""
        return self.folder / "bench"

    @property
    def scores(self) -> dict[str, Any] | None:
        """The contents of `scores.json` of its bench, plain JSON; None before a bench.

        `scores["models"]` are the models with their means by capability and category, `scores["verdict"]` says whether
        anything got worse, `scores["comparison"]` has the student's paired differences. UserError for a damaged bench.
        """
        return load(self.bench_folder)[0] if (self.bench_folder / "scores.json").is_file() else None

    @property
    def report(self) -> Path | None:
        """The path of the bench's `report.html`, one self-contained page; None before a bench."""
        return path if (path := self.bench_folder / "report.html").is_file() else None

    @property
    def grid(self) -> Image.Image | None:
        """One labelled picture, RGB: the bench's best, typical and worst items by model; None before a bench."""
        return open_picture(self.bench_folder / CONTACT_SHEET)

    def bench(self, suite: str = "scenes", **options: Any) -> BenchResult:
        """Score it against its base and its teachers on a suite; see `danceopd.bench` for the options."""
        from danceopd.bench.run import bench

        return bench(self.folder, suite, **options)


def open_picture(path: Path) -> Image.Image | None:
    """The image of a file in RGB; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True, repr=False)
class BenchResult:
    """A finished bench: its folder, the contents of `scores.json` and `samples.jsonl`, and the report's path.

    Of several processes only the main one (`is_main`) has it; the others generated images and hold nothing. In a
    notebook it shows its verdict and its contact sheet.
    """

    folder: Path
    scores: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    report: Path = Path()
    is_main: bool = True

    @property
    def verdict(self) -> str:
        """Whether anything got worse, in one sentence."""
        return str(self.scores["verdict"]["sentence"]) if self.scores else ""

    @property
    def sheet(self) -> Path | None:
        """The path of contact.png; None where there was nothing to show."""
        return path if (path := self.folder / CONTACT_SHEET).is_file() else None

    @property
    def grid(self) -> Image.Image | None:
        """contact.png as an RGB image: the best, a typical and the worst item by model; None where there is none."""
        return open_picture(self.folder / CONTACT_SHEET)

    def overall(self, model: str, capability: str) -> float:
        """A model's overall score in "generation" or "editing", on the suite's scale."""
        found = next(m for m in self.scores["models"] if m["name"] == model)
        return found[capability]["overall"]["mean"]

    def __repr__(self) -> str:
        return f"BenchResult({str(self.folder)!r}, {self.verdict!r})"

    def _repr_html_(self) -> str:
        shown = "" if self.sheet is None else base64.b64encode(self.sheet.read_bytes()).decode()
        picture = f'<img src="data:image/png;base64,{shown}" style="max-width:100%">' if shown else ""
        return f"<p><b>{html.escape(self.verdict)}</b></p>{picture}"


def load(folder: str | Path) -> tuple[dict, list[dict]]:
    """(scores, rows) of a bench folder; UserError if it is not a finished bench, or a damaged one."""
    folder, file = Path(folder), "scores.json"
    try:
        scores = json.loads((folder / file).read_text(encoding="utf-8"))
        _rename(scores)
        check_scores(scores)
        if isinstance(scores.get("command"), str):
            scores["command"] = redacted(scores["command"])  # that of an older bench may have a key in it
        file = "samples.jsonl"
        lines = (folder / file).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 as well
        rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            check_row(row)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no finished bench ({Path(error.filename).name} is missing); run "
            "`danceopd bench` with this output folder first."
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{folder} holds a damaged bench ({file}, {str(error)[:200]}); run `danceopd bench` again into another one."
        ) from None
    return scores, rows


def _rename(scores: Any) -> None:
    """Give the scores of an older bench the keys of today, in place."""
    if not isinstance(scores, dict):
        return
    for old, new in OLD_KEYS.items():
        if old in scores:
            scores.setdefault(new, scores.pop(old))
    rename_steps(scores)
    found = scores.get("validation")
    for check in found.get("checks") or () if isinstance(found, dict) else ():
        if isinstance(check, dict) and "gap" in check:
            check.setdefault("error", check.pop("gap"))


def unscored(rows: Sequence[dict]) -> list[dict]:
    """Why rows have no score, the most frequent reason first: {reason, status, count}, the judge's own sentence."""
    found = Counter(
        (" ".join("".join(c if c.isprintable() else " " for c in row.get("reason") or "").split())[:REASON], status)
        for row in rows
        if (status := row.get("status") or "ok") != "ok" and row.get("reason") != NO_JUDGE
    )
    return [{"reason": why, "status": status, "count": n} for (why, status), n in found.most_common(UNSCORED_SHOWN)]


def nothing_scored(scores: Mapping[str, Any]) -> bool:
    """Whether the student should have been scored, and has no score at all."""
    mine = [m for m in scores["models"] if m["name"] == scores["student"]]
    figures = [of["overall"] for m in mine for c in CAPABILITIES if (of := m.get(c))]
    asked = scores.get("judge") is not None or not (scores.get("suite") or {}).get("judged")
    return asked and bool(scores.get("unscored")) and all(figure["mean"] is None for figure in figures)


def versions() -> dict[str, str]:
    """The versions of all packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in ("danceopd", "torch", "diffusers", "transformers", "peft", "numpy", "pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def suite_facts(suite: Suite) -> dict:
    """A suite's name, version, protocol, rules and scales as plain JSON."""
    facts: dict[str, Any] = {key: getattr(suite, key) for key in ("name", "version", "protocol", "rules", "share")}
    facts["judged"], facts["exact"] = isinstance(suite, JudgedSuite), list(suite.exact)
    facts["scale"] = {capability: list(ends) for capability, ends in suite.scale.items()}
    return facts | {"subsets": {name: list(parts) for name, parts in suite.subsets.items()}}


def summarise(rows: Sequence[dict], lineup: Lineup, suite: Suite, settings: dict) -> dict:
    """The contents of `scores.json`; `settings` are further entries, from the seed to the seconds that it took."""
    capabilities = [c for c in CAPABILITIES if any(r["capability"] == c and statistics.ordinary(r) for r in rows)]
    kind: dict[str, dict[str, Any]] = {c: {"share": suite.share[c], "scale": suite.scale[c]} for c in suite.scale}
    exact = {c: statistics.exact_rows(rows, c) for c in capabilities if c in suite.exact}
    means = {m.name: {c: statistics.summary(rows, m.name, c, **kind[c]) for c in capabilities} for m in lineup.models}
    for name, by_capability in means.items():
        for c, found in by_capability.items():
            if found and c in exact:
                found["exact"] = statistics.summary(exact[c], name, c, **statistics.EXACT)
    best = best_blend(means, lineup.names("blend"), suite.scale)
    shown = [m for m in lineup.models if m.role != "blend" or m.name == best]
    others = [m.name for m in shown if m.role != "student"]
    base = next((m.name for m in shown if m.role == "base"), None)
    student = lineup.student.name

    def comparison(rows: Sequence[dict], c: str, how: Mapping[str, Any]) -> dict | None:
        return statistics.comparison(rows, student, base, lineup.teachers_for(c), others, c, **how)

    compared = {c: comparison(rows, c, kind[c]) for c in capabilities}
    for c, found in compared.items():
        if found and c in exact:
            found["exact"] = comparison(exact[c], c, statistics.EXACT)
    scores = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "suite": suite_facts(suite),
        "base": lineup.base and {"path": lineup.base.path, "sha256": lineup.base.sha256},
        "student": student,
        "models": [_about(m, rows) | means[m.name] for m in shown],
        "comparison": compared,
        "interference": interference(
            rows,
            student,
            base,
            lineup.names("teacher"),
            [m.name for m in shown if m.role == "blend"],
            suite.share,
            suite.scale,
        ),
        "subsets": _subsets(rows, [m.name for m in shown], suite, kind),
        "metrics": _metrics(rows, [m.name for m in shown], capabilities),
        "blend_grid": _blend_grid(lineup, means, best),
        "probes": _probes(rows, kind, suite.exact),
        "unscored": unscored(rows),
        "versions": versions(),
        **settings,
    }
    return scores | {"verdict": verdict(scores, settings.get("margin", MARGIN))}


def _about(model: Model, rows: Sequence[dict]) -> dict:
    kept = ("name", "label", "role", "path", "sha256", "capability")
    about = {key: getattr(model, key) for key in kept} | {"weights": list(model.weights)}
    if model.image_folder is not None:  # its weights are unknown: its images identify it
        images = sorted(f"{r['key']} {r['pixels_sha256']}\n" for r in rows if r["model"] == model.name)
        about["sha256"] = hashlib.sha256("".join(images).encode()).hexdigest()
    return about


def _subsets(rows: Sequence[dict], models: Sequence[str], suite: Suite, kind: dict) -> dict[str, dict]:
    """Subset -> capability -> model -> its overall score there."""
    found: dict[str, dict] = {}
    for capability, how in kind.items():
        for name, by_model in statistics.subsets(rows, models, capability, suite.subsets, **how).items():
            found.setdefault(name, {})[capability] = by_model
    return found


def _metrics(rows: Sequence[dict], models: Sequence[str], capabilities: Sequence[str]) -> dict[str, dict]:
    """Capability -> model -> judge-free metrics."""
    return {c: {name: metric_means(rows, name, c) for name in models} for c in capabilities}


def _blend_grid(lineup: Lineup, means: dict, best: str | None) -> list[dict]:
    """Every blend that was tried, if there is more than one."""
    blends = [m for m in lineup.models if m.role == "blend"]
    if len(blends) < 2:
        return []
    found = []
    for model in blends:
        overall = {c: (means[model.name].get(c) or {}).get("overall", {}).get("mean") for c in CAPABILITIES}
        found.append({"name": model.name, "label": model.label, "weights": list(model.weights)} | overall)
        found[-1]["best"] = model.name == best
    return found


def _probes(rows: Sequence[dict], kind: dict, exact: Sequence[str]) -> dict[str, dict]:
    """Probe -> its capability, and by model the mean with its interval; of `exact` capabilities both measures."""
    found: dict[str, dict] = {}
    for probe, capability in {row["probe"]: row["capability"] for row in rows if row["probe"]}.items():
        own = [row for row in rows if row["probe"] == probe]
        found[probe] = _probe(own, capability, kind[capability])
        if capability in exact:
            right = statistics.exact_rows(own, capability)
            found[f"{probe}, {ALL_RIGHT}"] = _probe(right, capability, statistics.EXACT)
    return found


def _probe(rows: Sequence[dict], capability: str, how: Mapping[str, Any]) -> dict:
    values: dict[str, list[float | None]] = {}
    for row in rows:
        values.setdefault(row["model"], []).append(row["score"])
    return {"capability": capability, "models": {m: statistics.mean(v, **how) for m, v in values.items()}}


def best_blend(
    summaries: dict[str, dict], blends: Sequence[str], scale: Mapping[str, tuple[float, float]]
) -> str | None:
    """The blend with the highest sum of overall scores, each scaled to 0 to 1; failures count as the lowest score."""
    if not blends:
        return None

    def worth(name: str) -> float:
        found = ((scale[c], s["overall"]) for c, s in summaries[name].items() if s)
        return sum((overall["lower"] - low) / (high - low) for (low, high), overall in found)

    return max(blends, key=worth)


def used_plugins(suite: str, metrics: Sequence[Any], lineup: Lineup) -> dict[str, str]:
    """Where the plug-ins of a bench are from, by kind and name; a judge's stands in its identity."""
    named = [("suite", suite), ("family", lineup.family or "")]
    named += [("metric", name_of("metric", metric)) for metric in metrics]
    named += [("blend method", model.method) for model in lineup.models if model.method]
    return {f"{kind} {name}": str(origin(kind, name)) for kind, name in named if is_plugin(kind, name)}
