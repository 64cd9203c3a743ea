"""Small copies of the benchmarks on disk, in the formats that users have: real files, a few images a category."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from danceopd.bench.judges.protocol import Answer
from danceopd.bench.suites import gedit, imgedit

COCO = ("bench", "dog", "cat", "car", "bus", "kite")


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """An image of noise for each seed; ``size`` is (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def picture(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> Path:
    """The same, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path)
    return path


def gedit_rows(each: int = 2, languages: Sequence[str] = gedit.LANGUAGES) -> list[dict[str, Any]]:
    """Records of GEdit-Bench: ``each`` for a category and language, the first of them marked as in the intersection.

    As in the published data, a photograph serves subject-remove and subject-replace under one key (there two do).
    """
    first = {"subject-replace": list(gedit.CATEGORIES).index("subject-remove")}
    return [
        {
            "task_type": category,
            "key": f"{language}{first.get(category, at) if n == 0 else at:02}{n:04}",
            "instruction": f"{category} number {n}" if language == "en" else f"第{n}个：换掉背景",
            "instruction_language": language,
            "Intersection_exist": n == 0,
        }
        for at, category in enumerate(gedit.CATEGORIES)
        for n in range(each)
        for language in languages
    ]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def gedit_tree(folder: Path, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    """A table and `<key>_SRCIMG.png` beside it."""
    rows = gedit_rows() if rows is None else rows
    for seed, row in enumerate(rows):
        picture(folder / f"{row['key']}_SRCIMG.png", seed)
    write_lines(folder / "info.jsonl", rows)
    return folder


def gedit_results(folder: Path, rows: Sequence[dict[str, Any]], size: tuple[int, int] = (128, 128)) -> Path:
    """A model's images in the official layout, of another size than the sources."""
    for seed, row in enumerate(rows):
        home = folder / "fullset" / row["task_type"] / row["instruction_language"]
        picture(home / f"{row['key']}.png", 1000 + seed, size)
        picture(home / f"{row['key']}_SRCIMG.png", seed)
    return folder


def imgedit_tree(folder: Path, each: int = 2, adjust: str = "adjust") -> Path:
    """What `Benchmark.tar` unpacks to; the first published table, and its copies, call adjust `alter`."""
    home, table = folder / "Benchmark" / "singleturn", {}
    for at, kind in enumerate(imgedit.CATEGORIES):
        for n in range(each):
            key = str(10 * at + n)
            named = adjust if kind == "adjust" else kind
            table[key] = {"id": f"animal/{key:0>9}.jpg", "prompt": f"{kind} the animal", "edit_type": named}
            picture(home / table[key]["id"], int(key))
    (home / "singleturn.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def geneval_records(each: int = 1) -> list[dict[str, Any]]:
    """Records in GenEval's form, ``each`` of the six kinds."""
    found: list[dict[str, Any]] = []
    for one, other in ((COCO[n % 6], COCO[(n + 1) % 6]) for n in range(each)):
        a, b = {"class": one, "count": 1}, {"class": other, "count": 1}
        red, blue, left = {**a, "color": "red"}, {**b, "color": "blue"}, {**b, "position": ["left of", 0]}
        many, more = {"class": one, "count": 2}, {"class": one, "count": 3}
        found += [
            {"tag": "single_object", "include": [a], "prompt": f"a photo of a {one}"},
            {"tag": "two_object", "include": [a, b], "prompt": f"a photo of a {one} and a {other}"},
            {"tag": "counting", "include": [many], "exclude": [more], "prompt": f"a photo of two {one}s"},
            {"tag": "colors", "include": [red], "prompt": f"a photo of a red {one}"},
            {"tag": "position", "include": [a, left], "prompt": f"a {other} left of a {one}"},
            {"tag": "color_attr", "include": [red, blue], "prompt": f"a photo of a red {one} and a blue {other}"},
        ]
    return found


def answer(*numbers: float, status: Any = "ok", choice: str | None = None, reasoning: str = "because") -> Answer:
    """A judge's answer."""
    return Answer("", status, numbers=numbers or None, choice=choice, reasoning=reasoning)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
