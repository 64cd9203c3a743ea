"""Layered drawings made for these tests, in the layout of the npm package openmoji; none is OpenMoji's."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.kinds import Kind
from danceopd.worlds.openmoji.render import render
from danceopd.worlds.scenes.grammar import Scene

LINE = 'fill="none" stroke="#000000" stroke-width="2" stroke-linejoin="round" stroke-linecap="round"'
DRAWN = {
    # name: (body, shade, colour layer, line layer)
    "car": (
        "#ea5a47",
        (),
        '<path fill="#ea5a47" d="M6 44 V34 L18 32 L26 22 H48 L56 32 L66 34 V44 Z"/>'
        '<path fill="#92d3f5" d="M28 25 H46 L50 31 H23 Z"/>'
        '<circle fill="#9B9B9A" cx="18" cy="46" r="6"/><circle fill="#9b9b9a" cx="54" cy="46" r="6"/>',
        f'<path {LINE} d="M6 44 V34 L18 32 L26 22 H48 L56 32 L66 34 V44 Z"/>'
        f'<circle {LINE} cx="18" cy="46" r="6"/><circle {LINE} cx="54" cy="46" r="6"/>'
        '<circle fill="#ea5a47" cx="36" cy="38" r="2"/>',  # of the line work: no part of the body
    ),
    "apple": (
        "#d22f27",
        ("#781e32",),
        '<circle fill="#d22f27" cx="36" cy="42" r="20"/><path fill="#781e32" d="M48 26 A20 20 0 0 1 48 58 Z"/>'
        '<path fill="#5c9e31" d="M36 22 Q46 6 52 14 Q46 24 36 22 Z"/>',
        f'<circle {LINE} cx="36" cy="42" r="20"/><path {LINE} d="M36 22 V12"/>',
    ),
    "clock": (
        "#fff",
        (),
        '<circle fill="#fff" cx="36" cy="36" r="26"/>',
        f'<circle {LINE} cx="36" cy="36" r="26"/><path {LINE} d="M36 18 V36 L48 44"/>',
    ),
    "kite": (
        "#ffa7c0",
        ("#e67a94",),
        '<path fill="#ffa7c0" d="M36 6 L18 28 L36 54 Z"/><path fill="#e67a94" d="M36 6 L54 28 L36 54 Z"/>',
        f'<path {LINE} d="M36 6 L18 28 L36 54 L54 28 Z M18 28 H54 M36 6 V54 Q44 60 36 68"/>',
    ),
    "bed": (
        "#92d3f5",
        (),
        '<rect fill="#a57939" x="4" y="42" width="64" height="10"/>'
        '<rect fill="#92d3f5" x="22" y="28" width="46" height="14"/>',
        f'<path {LINE} d="M4 18 V56 M68 24 V56 M4 42 H68 M4 52 H68 M22 42 V28 H68"/>',
    ),
    "book": (
        "#61b2e4",
        ("#1e50a0",),
        '<path fill="#61b2e4" d="M14 10 H56 V58 H14 Z"/><path fill="#1e50a0" d="M14 10 H22 V58 H14 Z"/>',
        f'<path {LINE} d="M14 10 H56 V58 H14 Z M22 10 V58 M28 22 H50 M28 30 H50"/>',
    ),
    "bottle": (
        "#b1cc33",
        (),
        '<path fill="#b1cc33" d="M32 6 H40 V22 L48 32 V66 H24 V32 L32 22 Z"/>',
        f'<path {LINE} d="M32 6 H40 V22 L48 32 V66 H24 V32 L32 22 Z M24 42 H48"/>',
    ),
    "chair": (
        "#fcea2b",
        (),
        '<path fill="#fcea2b" d="M18 6 H26 L28 36 H54 V44 H20 Z"/>',
        f'<path {LINE} d="M18 6 H26 L28 36 H54 V44 H20 Z M22 44 L18 66 M52 44 L56 66"/>',
    ),
}
KINDS = tuple(Kind(name, f"own-{name}", "#ffffff" if d[0] == "#fff" else d[0], d[1]) for name, d in DRAWN.items())
NAMES = tuple(kind.name for kind in KINDS)


def svg(name: str) -> str:
    """A drawing as an SVG with the package's layers."""
    _, _, colour, line = DRAWN[name]
    return (
        '<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
        f'<g id="color">{colour}</g><g id="hair"/><g id="skin"/><g id="line">{line}</g></svg>'
    )


def write(folder: Path) -> Path:
    """Write the folder that `fetch` would make."""
    place = folder / "color" / "svg"
    place.mkdir(parents=True)
    for kind in KINDS:
        (place / f"{kind.file}.svg").write_text(svg(kind.name), encoding="utf-8")
    (folder / "openmoji.json").write_text(json.dumps({"package": "own"}), encoding="utf-8")
    return folder


def package(path: Path, without: str | None = None) -> Path:
    """Write the package's tgz file; `without` names a drawing to leave out."""
    with tarfile.open(path, "w:gz") as bundle:
        files = {f"package/color/svg/{k.file}.svg": svg(k.name) for k in KINDS if k.name != without}
        files |= {"package/LICENSE.txt": "our own", "package/index.js": "not wanted"}
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            bundle.addfile(member, io.BytesIO(text.encode()))
    return path


def pixels(scene: Scene, drawings: Drawings) -> np.ndarray:
    """The scene as it is rendered, (height, width, 3) in 0 to 1."""
    return np.asarray(render(scene, drawings), np.float32) / 255
