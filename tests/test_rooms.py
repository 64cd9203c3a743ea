"""The rooms of the package: imports point down, no circle, no long file, no full folder, a first page in each."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors", "common", "plugins", "pipelines", "recipe", "kernels", "models", "adapters", "worlds", "data", "engine",
    "run", "labelfree", "planning", "bench", "assembly", "drawing", "merge plan sample", "audit", "cli", "api",
)  # fmt: skip
"""Rooms from the bottom to the top: each imports only its own and those before it."""
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms.split()}
MOST_FILES, MOST_LINES = 12, 400


class Source(NamedTuple):
    """A module of the package, the package that it stands in, its file and its text."""

    module: str
    package: str
    path: Path
    text: str


def sources() -> Iterator[Source]:
    """Every module. `pipelines/` installs as `danceopd.pipelines`."""
    for top, prefix in (("danceopd", ""), ("pipelines", "danceopd.")):
        for path in sorted((ROOT / top).rglob("*.py")):
            package = prefix + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            module = package if path.name == "__init__.py" else f"{package}.{path.stem}"
            yield Source(module, package, path, path.read_text())


@pytest.fixture(scope="module")
def modules() -> list[Source]:
    """Every module; not a handful of them, as a wrong path would give."""
    found = list(sources())
    assert len(found) > 100
    return found


def imported(node: ast.AST, package: str) -> list[str]:
    """Dotted names of the package that an import statement in `package` names."""
    names = []
    if isinstance(node, ast.ImportFrom):
        below = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        names = [".".join([*below, *filter(None, [node.module]), alias.name]) for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    return [name for name in names if name.startswith("danceopd.") and not name.startswith("danceopd._")]


def imports_up(module: str, package: str, text: str) -> list[str]:
    """The imports of a module that point up, wherever in it they stand; the package itself has no room."""
    if module in ("danceopd", "danceopd.__main__"):
        return []
    room = module.split(".")[1]
    found = [name for node in ast.walk(ast.parse(text)) for name in imported(node, package)]
    return [f"{room} may not import {name}" for name in found if RANK[name.split(".")[1]] > RANK[room]]


def loaded(package: str, text: str) -> list[str]:
    """Names that a module imports while it loads: not in functions, nor for type checkers alone."""
    found, left = [], list(ast.parse(text).body)
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        found += imported(node, package)
        left += ast.iter_child_nodes(node)
    return found


def runs(modules: Sequence[Source]) -> dict[str, list[str]]:
    """What each module runs while it loads: the modules it imports, and the `__init__` of packages outside its own."""
    known = {s.module for s in modules}
    found: dict[str, list[str]] = {}
    for s in modules:  # what is imported is a module, or stands in one
        names = [name if name in known else name.rpartition(".")[0] for name in loaded(s.package, s.text)]
        parts = [name.split(".") for name in names]
        outer = [".".join(part[:end]) for part in parts for end in range(1, len(part))]
        names += [name for name in outer if not f"{s.module}.".startswith(f"{name}.")]
        found[s.module] = [name for name in names if name in known and name != s.module]
    return found


def circle(imports: dict[str, list[str]]) -> list[str]:
    """Modules that import each other in a ring, by depth-first search; empty where there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in imports[module]:
            if found := search(name, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in imports if (found := search(module, []))), [])


def test_imports_point_down(modules: list[Source]) -> None:
    assert [f"{s.path}: {up}" for s in modules for up in imports_up(s.module, s.package, s.text)] == []


def test_no_import_circle(modules: list[Source]) -> None:
    assert circle(runs(modules)) == []


def test_an_upward_import_and_a_circle_would_be_found() -> None:
    up = "def late():\n    from danceopd.engine.trainer import Trainer\n"
    found = imports_up("danceopd.data.sources", "danceopd.data", up)
    assert found == ["data may not import danceopd.engine.trainer.Trainer"]
    assert imports_up("danceopd.run.directory", "danceopd.run", up) == []
    relative = "from .condition import Condition\nfrom ..engine import trainer\n"
    assert imports_up("danceopd.pipelines.sd3", "danceopd.pipelines", relative) == [
        "pipelines may not import danceopd.engine.trainer"
    ]
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import danceopd.a\nelse:\n    import danceopd.b\n"
    assert loaded("danceopd", up) == [] and loaded("danceopd", late) == ["danceopd.b"]
    assert circle({"a": ["b", "d"], "b": ["c"], "c": ["b"], "d": []}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    here = Path()
    package = Source("danceopd.a", "danceopd.a", here, "import danceopd.b.two")
    inside = Source("danceopd.a.one", "danceopd.a", here, "")
    outside = Source("danceopd.b.two", "danceopd.b", here, "from danceopd.a import one")
    assert circle(runs([package, inside, outside]))  # b.two runs the package a, which imports it
    assert not circle(runs([package, inside, outside._replace(text="")]))


def test_no_file_is_long(modules: list[Source]) -> None:
    lines = {s.module: len(s.text.splitlines()) for s in modules}
    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}


def test_no_folder_is_full(modules: list[Source]) -> None:
    count = Counter(s.path.parent for s in modules if s.path.name != "__init__.py")
    assert {str(folder): files for folder, files in count.items() if files > MOST_FILES} == {}


def test_every_room_has_a_first_page(modules: list[Source]) -> None:
    """A docstring in its `__init__.py`; no folder that holds modules, or folders of them, goes without."""
    said = {s.package: bool(ast.get_docstring(ast.parse(s.text))) for s in modules if s.path.name == "__init__.py"}
    parts = [s.package.split(".") for s in modules]
    packages = {".".join(names[: i + 1]) for names in parts for i in range(len(names))}
    assert [package for package in sorted(packages) if not said.get(package)] == []


NONE_ABOVE = {
    "danceopd.recipe": ("kernels", "models", "data", "engine", "run", "labelfree", "bench"),
    "danceopd.data": ("engine", "run", "labelfree", "bench"),
    "danceopd.data.encode": ("engine", "run", "labelfree", "bench"),
    "danceopd.engine.trainer": ("run", "labelfree", "bench"),
}
"""From the bottom to the top: what one may not load, none before it may, so one process imports them all."""


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, list[str]]:
    """The modules of the package that are loaded after each import."""
    code = "import importlib, json, sys\nfound = {}\nfor room in sys.argv[1:]:\n    importlib.import_module(room)\n"
    code += "    found[room] = [m for m in sys.modules if m.startswith('danceopd.')]\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code, *NONE_ABOVE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("room", "above"), NONE_ABOVE.items())
def test_a_room_loads_none_above_it(room: str, above: tuple[str, ...], loaded_by: dict[str, list[str]]) -> None:
    names = tuple(f"danceopd.{name}" for name in above)
    assert room in loaded_by[room] and [m for m in loaded_by[room] if m.startswith(names)] == []
