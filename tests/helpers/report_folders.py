"""Finished benches of made-up models for the tests of the report: exact scenes, and judged edits of large images."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd.bench import statistics
from danceopd.bench.interference import interference
from danceopd.worlds.scenes.edits import TASKS, edits
from danceopd.worlds.scenes.prompts import TAGS, prompts
from danceopd.worlds.scenes.render import render

SKILL = {  # probability of a correct generation, of a correct edit
    "base": (0.6, 0.02),
    "generation": (0.95, 0.02),
    "editing": (0.45, 0.9),
    "blend": (0.75, 0.45),
    "student": (0.9, 0.85),
}
ROLES = {"base": "base", "generation": "teacher", "editing": "teacher", "blend": "blend", "student": "student"}
HOSTILE = """</script><script>window.evil=1</script>"'><img src=x onerror="window.evil=2">{{7*7}}&amp;"""
"""HTML and template code that a model's name, an instruction or an answer may contain."""


def scenes(folder: Path, each: int = 3, noise: float = 6.0, seed: int = 0) -> Path:
    """A bench of exact scenes in an older format: correct with probability `SKILL`, else another scene."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    drawn, edited = prompts("test", each * len(TAGS), 0), edits("test", each * len(TASKS), 0)
    wrong = [p.scene for p in prompts("val", 50, 1)]
    rows = []

    def save(path: str, scene) -> str:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = render(scene) + generator.normal(0, noise if "/source/" not in path else 0, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        return path

    for model, skill in SKILL.items():
        for n, prompt in enumerate(drawn):
            right, key = rng.random() < skill[0], f"{prompt.tag}-{n:03d}"
            scene = prompt.scene if right else rng.choice(wrong)
            row = {"category": prompt.tag, "key": key, "prompt": prompt.prompt, "capability": "generation"}
            row |= {"score": float(right), "reason": "" if right else "1 star expected, no star found"}
            row["image"] = save(f"images/{model}/{prompt.tag}/{key}.png", scene)
            rows.append(row | _model_fields(model, n, right))
        for n, edit in enumerate(edited):
            right, key = rng.random() < skill[1], f"{edit.task_type}-{n:03d}"
            other = rng.choice([edit.source, replace(edit.target, things=edit.target.things[:1])])
            row = {"category": edit.task_type, "key": key, "prompt": edit.instruction, "capability": "editing"}
            row |= {"score": 10 - rng.random() * 2 if right else rng.random() * 4}
            row |= {"reason": "" if right else "the picture did not change"}
            place = f"{edit.task_type}/{key}"
            row["image"] = save(f"images/{model}/{place}.png", edit.target if right else other)
            row["source"] = save(f"images/source/{place}_SRCIMG.png", edit.source)
            row["target"] = save(f"images/target/{place}.png", edit.target)
            rows.append(row | _model_fields(model, n, right))
    scores = _scores(
        rows, list(SKILL), ("generation", "editing"),
        {"name": "scenes", "version": "1", "protocol": "ab" * 32, "exact": ["editing"]},
    )  # fmt: skip
    scores["ceiling"] = {
        "read": 1.0,
        "n": 2 * each * len(TAGS),
        "generation": {"overall": 0.98, "categories": dict.fromkeys(TAGS, 0.98)},
        "editing": {"overall": 9.6, "categories": dict.fromkeys(TASKS, 9.6)},
    }
    return write(folder, scores, rows)


def _model_fields(model: str, seed: int, correct: bool) -> dict:
    return {"model": model, "seed": seed, "probe": None, "correct": correct}


def judged(folder: Path, items: int = 48, size: tuple[int, int] = (1024, 1024), files: int = 6, seed: int = 0) -> Path:
    """A bench of judged edits in the current format: statuses, reasons, subsets, held-out items, metrics, hostile text.

    Every row has an image path of its own, a hard link to one of `files` large images.
    """
    rng = random.Random(seed)
    places = _photos(folder / "photos", files, size)
    categories = ("subject-add", "subject-remove", "style_change", "text_change")
    rows = []
    for model, skill in SKILL.items():
        for n in range(items):
            category, key = categories[n % 4], f"{n:04x}"
            words = HOSTILE if n == 0 else f"make number {n} of the things blue"
            good = rng.random() < skill[1] * (0.4 if model == "student" and category == "text_change" else 1)
            status = (
                "ok" if model in ("base", "editing") or n % 11 else ("unparsable", "refused", "missing")[n // 11 % 3]
            )
            numbers = [rng.randint(6, 10) if good else rng.randint(0, 4) for _ in range(4)]
            row = {"capability": "editing", "category": category, "group": "local", "key": key, "prompt": words}
            row |= {
                "model": model,
                "seed": n,
                "probe": None,
                "tags": ["intersection"] if n % 2 else [],
                "heldout": n % 8 == 7,
            }
            row |= {
                "status": status,
                "correct": good and status == "ok",
                "source": f"images/source/{key}.jpg",
                "target": None,
            }
            row |= {"score": (min(numbers[:2]) * min(numbers[2:])) ** 0.5 if status == "ok" else None}
            row |= {"reason": "" if status == "ok" else "no score", "metrics": {"psnr": 20 + rng.random() * 10}}
            row["judge"] = {
                aspect: {
                    "numbers": part,
                    "reasoning": f"{HOSTILE} the judge said much about {words} " * 3,
                    "repeats": [],
                }
                if status == "ok"
                else {"numbers": None, "status": status, "text": f"I would rather not. {HOSTILE}", "repeats": []}
                for aspect, part in (("SC", numbers[:2]), ("PQ", numbers[2:]))
            }
            row["image"] = f"images/{model}/{key}.jpg" if status != "missing" else None
            for path in filter(None, (row["image"], row["source"])):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    os.link(places[rng.randrange(files)], file)
            rows.append(row)
    suite = {
        "name": "gedit",
        "version": "1",
        "protocol": "cd" * 32,
        "rules": {"resize": "to the source's size", "order": ["text", "source"]},
    }
    suite |= {
        "scale": {"editing": [0, 10]},
        "share": {"editing": False},
        "subsets": {"intersection": ["tag:intersection"]},
    }
    scores = _scores(rows, list(SKILL), ("editing",), suite)
    scores["models"][0]["label"] = HOSTILE
    scores["judge"] = {"name": f"a judge {HOSTILE}", "temperature": 0}
    scores["subsets"] = {
        "intersection": {"editing": statistics.subsets(rows, list(SKILL), "editing", suite["subsets"])["intersection"]}
    }
    psnr = {m: [row["metrics"]["psnr"] for row in rows if row["model"] == m] for m in SKILL}
    metrics = {m: {"psnr": statistics.mean(values, False)} for m, values in psnr.items()}
    scores |= {"metrics": {"editing": metrics}, "pictures": {m: {"n": items, "near_duplicates": 0.25} for m in SKILL}}
    scores["interference"] = interference(rows, "student", "base", ["generation", "editing"], ["blend"])
    return write(folder, scores, rows)


def _photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Images with detail at every scale, like photographs."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    made = []
    for n in range(count):
        total = np.zeros((size[1], size[0], 3))
        for power in range(2, 9):
            cells = generator.normal(0, 1, (2**power, 2**power, 3)).clip(-3, 3)
            layer = [
                Image.fromarray(cells[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            total += np.stack([np.asarray(part) for part in layer], -1) * 90 / 1.6**power
        made.append(folder / f"{n}.jpg")
        Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)).save(made[-1], quality=92)
    return made


def _scores(rows: list[dict], models: list[str], capabilities: tuple[str, ...], suite: dict) -> dict:
    teachers, others = [m for m in models if ROLES[m] == "teacher"], [m for m in models if m != "student"]
    means: dict[str, dict] = {m: {c: statistics.summary(rows, m, c) for c in capabilities} for m in models}
    found = {c: statistics.comparison(rows, "student", "base", teachers, others, c) for c in capabilities}
    for c in suite.get("exact", ()):
        right, how = statistics.exact_rows(rows, c), statistics.EXACT
        found[c]["exact"] = statistics.comparison(right, "student", "base", teachers, others, c, **how)
        for m in models:
            means[m][c]["exact"] = statistics.summary(right, m, c, **how)
    return {
        "format": "danceopd-bench/1",
        "suite": suite,
        "created": "2026-06-22T10:00:00+00:00",
        "command": "danceopd bench student",
        "seed": 0,
        "limit": None,
        "call": {"height": 64, "width": 64, "steps": 10},
        "base": {"path": "base", "sha256": "cd" * 32},
        "student": "student",
        "models": [
            {"name": m, "label": m, "role": ROLES[m], "path": m, "sha256": f"{n}e" * 32} | means[m]
            for n, m in enumerate(models)
        ],
        "comparison": found,
        "blend_grid": [],
        "probes": {},
        "versions": {"torch": "2.13.0"},
        "machine": "Linux x86_64, 2 CPU threads",
        "seconds": {"total": 42.0, "models": {}},
    }


def write(folder: Path, scores: dict, rows: list[dict]) -> Path:
    """Write the two files of a bench."""
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
