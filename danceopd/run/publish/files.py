"""What of a finished run is published: weights, the model card, its pictures, the recipe, and the report of a bench.

The card is written anew for the place where it will be: its snippet loads from that repository, and its base is a name
that others can load. Checkpoints, logs, caches and data stay at home, and so does every path of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from danceopd.adapters.header import METADATA_KEY
from danceopd.common.files import disk_errors
from danceopd.common.parse import YAML_BYTES, parse_yaml, read_text
from danceopd.errors import UserError
from danceopd.run.card import HUB_NAME, without_paths
from danceopd.run.directory import FINISHED, WEIGHTS

CARD, RECIPE, PIPELINE = "README.md", "recipe.yaml", "model_index.json"
HERE = "path/to/this/folder"
"""How a card's snippet names the folder that it lies in."""
BENCH = ("bench/report.html", "bench/contact.png")
"""Of a bench in the run folder: pages that hold no path of this machine."""
LEFT = ("checkpoints", "cache", "logs", "samples", "bench", "start")
"""Folders of a run that are no part of a fused pipeline."""
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w./:])(/(?:home|root|Users|mnt|tmp|data|workspace|content|opt|var|srv)/[^\s`'\")|,]*)")
_WINDOWS = re.compile(r"(?<!\w)([A-Za-z]:\\[^\s`'\")|,]+)")


@dataclass(frozen=True)
class Publication:
    """A folder with what is published, and what there is to know of it: its `files` by size in bytes, the card's base,
    and sentences on what was assumed."""

    folder: Path
    files: dict[str, int]
    base: str
    notes: list[str]


def publication(run: str | Path, target: Path, repo: str, base_model: str | None = None) -> Publication:
    """Write what is published of the finished `run` as `repo` into the empty folder `target`.

    `base_model` is the base's name on the hub, for a run whose base was a folder. UserError for a run that is not
    finished, a card that is missing or names a path of this machine, and a base without a name on the hub.
    """
    run = Path(run).expanduser()
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give the run folder of a finished merge")
    fused = (run / PIPELINE).is_file()
    if not (fused or (run / WEIGHTS).is_file()):
        raise UserError(f"{run} has no {WEIGHTS}; give the run folder of a finished merge")
    if not (run / FINISHED).is_file():
        raise UserError(f"{run} is no finished run (it has no {FINISHED}); run the merge again to its end")
    text = read_text(run / CARD, "the model card", YAML_BYTES) if (run / CARD).is_file() else ""
    if not text:
        raise UserError(f"{run / CARD} is missing; run the merge again, which writes it without training")
    card, base, notes = _card_of(text, repo, base_model, run / CARD)
    names = [WEIGHTS] if not fused else list(_pipeline_files(run))
    names += [name for name in _pictures(card, run) if name not in names]
    names += [name for name in (*BENCH, "validation.png") if (run / name).is_file() and name not in names]
    with disk_errors(target):
        for name in names:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == WEIGHTS:
                copy_lora(run / name, place, base)
                continue
            try:
                os.link((run / name).resolve(), place)
            except OSError:  # another disk
                shutil.copyfile(run / name, place)
        (target / CARD).write_text(card, encoding="utf-8")
        recipe = without_paths(parse_yaml(read_text(run / RECIPE, "recipe", YAML_BYTES)))
        recipe.pop("trackers", None)
        (target / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in sorted(target.rglob("*"))
             if path.is_file()}  # fmt: skip
    return Publication(target, files, base, notes)


def copy_lora(file: Path, place: Path, base: str) -> None:
    """Copy a LoRA, with `base` as the base in danceopd's record, which may be a path here."""
    with open(file, "rb") as source, open(place, "wb") as copy:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        metadata = header.setdefault("__metadata__", {})
        record = json.loads(metadata.get(METADATA_KEY, "{}"))
        metadata[METADATA_KEY] = json.dumps({**record, **({"base": base} if base else {})}, sort_keys=True)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        copy.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, copy)


def _card_of(text: str, repo: str, base_model: str | None, path: Path) -> tuple[str, str, list[str]]:
    """The card for `repo`, the base that it names, and what was assumed."""
    parts = text.split("---\n", 2)
    fields = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    if not isinstance(fields, dict) or "danceopd" not in (fields.get("tags") or ()):
        raise UserError(f"{path} is not the card of a danceopd run (no tag `danceopd` in its front matter); bring the "
                        "tag back, or run the merge again, which writes the card")  # fmt: skip
    base, notes, body = str(fields.get("base_model", "")), [], parts[2]
    if base_model is not None:
        fields["base_model"] = base_model
        body = body.replace(f'from_pretrained("path/to/{Path(base).name}")', f'from_pretrained("{base_model}")')
        base = base_model
    elif base and not HUB_NAME.fullmatch(base):
        raise UserError(
            f"the card names the base as {base!r}, which nobody else can load; give its name on the hub, as "
            "--base-model black-forest-labs/FLUX.2-klein-base-4B"
        )
    if "license" not in fields:
        notes.append("the card names no license: add `license:` to its front matter, as the base's license allows")
    body = body.replace(HERE, repo).replace(f"# {path.resolve().parent.name}\n", f"# {repo.split('/')[-1]}\n", 1)
    card = f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n{body}"
    for line in card.splitlines():
        found = _PATH.search(line) or _WINDOWS.search(line)
        if found:
            raise UserError(f"{path} names {found[1]}, a path of this machine ({line.strip()[:60]!r}); take it out")
    return card, base, notes


def _pictures(card: str, run: Path) -> Iterator[str]:
    """The pictures in the run's folder that the card shows; UserError for one that is not there."""
    for name in dict.fromkeys(_PICTURE.findall(card)):
        if "://" in name:
            continue
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if not (inside and (run / name).is_file()):
            raise UserError(f"the card shows {name}, which is not in {run}; bring it back, or take it out of {CARD}")
        yield name


def _pipeline_files(run: Path) -> Iterator[str]:
    """The files of a fused pipeline: model_index.json, and those of its parts."""
    yield PIPELINE
    for folder in sorted(path for path in run.iterdir() if path.is_dir() and path.name not in LEFT):
        yield from (path.relative_to(run).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
