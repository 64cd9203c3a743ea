"""The package as it is installed: everything in the wheel, found from another folder, plain and editable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("danceopd", "pipelines", "checkpoints")
SHIPPED_DATA = (".safetensors", ".json", ".txt", ".md", ".yaml", ".jinja")
WHERE = """
import danceopd, danceopd.pipelines, danceopd.checkpoints, danceopd.worlds.scenes.grammar
from danceopd.common.shipped import _root
print(danceopd.__file__, danceopd.pipelines.__file__, _root(), sep="\\n")
"""


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ROOMS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".training"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tree / "dist", tree)
    return next((tree / "dist").glob("danceopd-*.whl"))


def environment(folder: Path, *what: object) -> Path:
    """A new environment with `what` installed, that sees this one's packages but not this one's danceopd."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *what)
    (Path(site_of(python)) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site_of(python: Path) -> str:
    return run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()


def files_of(room: str) -> set[str]:
    prefix = "danceopd" if room == "danceopd" else f"danceopd/{room}"
    return {
        f"{prefix}/{path.relative_to(ROOT / room).as_posix()}"
        for path in (ROOT / room).rglob("*")
        if (path.suffix == ".py" or (room == "checkpoints" and path.suffix in SHIPPED_DATA))
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }


@pytest.mark.parametrize("room", ROOMS)
def test_the_wheel_holds_every_module_and_checkpoint(wheel: Path, room: str) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert files_of(room) - inside == set()


def test_the_wheel_holds_templates_and_kernels_and_nothing_else(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "danceopd/bench/report/templates").rglob("*.*")}
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "danceopd/kernels/cuda/csrc").rglob("*.cu*")}
    assert min(len(templates), len(kernels)) > 5 and (templates | kernels) - set(inside) == set()
    assert {"danceopd/py.typed", "danceopd/recipe/recipe.schema.json"} <= set(inside)
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"danceopd"}
    assert not [name for name in inside if "tests/" in name or name.startswith("danceopd/danceopd")]


@pytest.mark.parametrize("editable", [False, True])
def test_an_installed_package_works_from_another_folder(tree, wheel, tmp_path: Path, editable: bool) -> None:
    python = environment(tmp_path / "venv", *(["-e", tree] if editable else [wheel]))
    (tmp_path / "elsewhere").mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = run(python, "-c", WHERE, cwd=tmp_path / "elsewhere", env=env).splitlines()
    home = tree if editable else Path(site_of(python))
    below = home if editable else home / "danceopd"
    assert found == [
        str(home / "danceopd" / "__init__.py"),
        str(below / "pipelines" / "__init__.py"),
        str(below / "checkpoints"),
    ]
    program = python.parent / "danceopd"
    assert run(program, "version", cwd=tmp_path / "elsewhere", env=env).startswith("danceopd ")
    if (ROOT / "checkpoints" / "base").is_dir():
        code = "from danceopd.recipe.recipe import Recipe; print(Recipe().base)"
        assert run(python, "-c", code, cwd=tmp_path / "elsewhere", env=env).strip() == str(below / "checkpoints/base")


def test_lazy_names_and_the_room_of_the_same_name() -> None:
    code = (
        "import sys, danceopd\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "import types; fake = types.ModuleType('danceopd.merge'); fake.merge = lambda: 'merged'\n"
        "sys.modules['danceopd.merge'] = fake; danceopd.merge_room = fake\n"
        "danceopd.merge = fake  # what importing the room does to its package\n"
        "assert danceopd.merge() == 'merged'\n"
        "from danceopd import Recipe, UserError\nassert Recipe.__module__ == 'danceopd.recipe.recipe'\n"
        "assert {'merge', 'Recipe', 'load_student'} <= set(dir(danceopd))\n"
        "try:\n    danceopd.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    assert "has no attribute 'nothing'" in run(sys.executable, "-c", code)
