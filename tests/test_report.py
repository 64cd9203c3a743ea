"""The report is opened as a reader opens it: the real file in a real browser, with the network forbidden."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danceopd.bench import compare, table
from danceopd.bench.report import _chosen, _items, load, report
from danceopd.errors import UserError
from danceopd.scenes.edits import TASKS, edits
from danceopd.scenes.prompts import TAGS, prompts
from danceopd.scenes.render import render

SKILL = {  # chance of a right generation, of a right edit
    "base": (0.6, 0.02),
    "generation": (0.95, 0.02),
    "editing": (0.45, 0.9),
    "blend": (0.75, 0.45),
    "student": (0.9, 0.85),
}
ROLES = {"base": "base", "generation": "teacher", "editing": "teacher", "blend": "blend", "student": "student"}


def synthetic(folder: Path, each: int = 3, noise: float = 6.0, seed: int = 0, models: dict | None = None) -> Path:
    """A finished bench of invented models: right pictures with chance `SKILL`, other scenes otherwise."""
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

    for model, skill in (models or SKILL).items():
        for n, prompt in enumerate(drawn):
            right, key = rng.random() < skill[0], f"{prompt.tag}-{n:03d}"
            rows.append(
                {
                    "model": model,
                    "capability": "generation",
                    "category": prompt.tag,
                    "key": key,
                    "prompt": prompt.prompt,
                    "seed": n,
                    "probe": None,
                    "score": float(right),
                    "correct": right,
                    "reason": "" if right else "1 star expected, no star found",
                    "image": save(
                        f"images/{model}/{prompt.tag}/{key}.png", prompt.scene if right else rng.choice(wrong)
                    ),
                }
            )
        for n, edit in enumerate(edited):
            right, key = rng.random() < skill[1], f"{edit.task_type}-{n:03d}"
            score = 10 - rng.random() * 2 if right else rng.random() * 4
            scene = (
                edit.target if right else rng.choice([edit.source, replace(edit.target, things=edit.target.things[:1])])
            )
            rows.append(
                {
                    "model": model,
                    "capability": "editing",
                    "category": edit.task_type,
                    "key": key,
                    "prompt": edit.instruction,
                    "seed": n,
                    "probe": None,
                    "score": score,
                    "correct": right,
                    "reason": "" if right else "the picture did not change",
                    "image": save(f"images/{model}/{edit.task_type}/{key}.png", scene),
                    "source": save(f"images/source/{edit.task_type}/{key}_SRCIMG.png", edit.source),
                    "target": save(f"images/target/{edit.task_type}/{key}.png", edit.target),
                }
            )
    write(folder, rows, list(models or SKILL))
    return folder


def write(folder: Path, rows: list[dict], models: list[str]) -> None:
    means = {m: {c: compare.summary(rows, m, c) for c in ("generation", "editing")} for m in models}
    teachers, others = [m for m in models if ROLES[m] == "teacher"], [m for m in models if m != "student"]
    scores = {
        "format": "danceopd-bench/1",
        "suite": {"name": "scenes", "version": "1", "protocol": "ab" * 32},
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
        "comparison": {
            c: compare.comparison(rows, "student", "base", teachers, others, c) for c in ("generation", "editing")
        },
        "blend_grid": [],
        "probes": {},
        "versions": {"torch": "2.13.0"},
        "machine": "Linux x86_64, 2 CPU threads",
        "seconds": {"total": 42.0, "models": {}},
        "ceiling": {
            "generation": {"overall": 0.98, "categories": dict.fromkeys(TAGS, 0.98)},
            "editing": {"overall": 9.6, "categories": dict.fromkeys(TASKS, 9.6)},
        },
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
