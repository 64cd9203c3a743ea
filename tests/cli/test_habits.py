"""Habits of a command line: the version, quiet and verbose, completion, examples, options that mean the same, JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from conftest import Program
from report_folders import scenes
from test_cli import refused
from typer.testing import CliRunner

import danceopd as package
from danceopd.cli import flags
from danceopd.cli.app import app
from danceopd.common import console
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.reference import schema

RUNNER = CliRunner()
GROUP: Any = typer.main.get_command(app)
COMMANDS = {name: GROUP.commands[name] for name in GROUP.commands if name != "openmoji"} | {
    "openmoji fetch": GROUP.commands["openmoji"].commands["fetch"]
}


def options(command: Any) -> dict[str, Any]:
    """The options of a command by their long names."""
    return {name: one for one in command.params for name in one.opts if name.startswith("--")}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What -q and -v change is of this process."""
    monkeypatch.setattr(console, "_hidden", False)
    monkeypatch.setattr(flags, "_verbose", False)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)


def test_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).stdout == f"danceopd {package.__version__}\n"
    assert json.loads(RUNNER.invoke(app, ["version", "--json"]).stdout)["danceopd"] == package.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_whose_flags_exist(name: str) -> None:
    text = " ".join(RUNNER.invoke(app, [*name.split(), "--help"], env={"COLUMNS": "400"}).stdout.split())
    found = re.search(rf"Example: (danceopd {name} ?.*?)(?= ╭|\. [A-Z])", text)
    assert found, text
    known = {name for one in COMMANDS[name].params for name in one.opts}
    words = shlex.split(found[1])
    assert len(words) > 2 or not COMMANDS[name].params
    assert [word for word in words if word.startswith("-") and word not in known] == []


def test_an_option_means_the_same_everywhere() -> None:
    kinds, shorts = defaultdict(set), defaultdict(set)
    for info in app.registered_commands:
        assert info.callback is not None
        hints = get_type_hints(info.callback)
        for name, one in options(GROUP.commands[info.name or info.callback.__name__]).items():
            if one.name in hints:  # --help is typer's
                kinds[name].add(str(hints[one.name]).removesuffix(" | None").replace("<class 'int'>", "int"))
                shorts[name].add(tuple(sorted(short for short in one.opts if not short.startswith("--"))))
    kinds = {name: {re.sub(r"<class '(.*)'>", r"\1", kind).rpartition(".")[2] for kind in found}
             for name, found in kinds.items()}  # fmt: skip
    one_or_many = {"--data": {"Path", "list[str]"}}  # of a suite there is one, of a blend one for each LoRA
    assert {name: found for name, found in kinds.items() if len(found) > 1} == one_or_many
    assert {name: found for name, found in shorts.items() if len(found) > 1} == {}
    letters = {short: name for name, found in shorts.items() for group in found for short in group}
    assert len(letters) == sum(bool(group) for found in shorts.values() for group in found)


def test_what_merge_takes_can_be_planned() -> None:
    assert set(options(COMMANDS["merge"])) - {"--from"} <= set(options(COMMANDS["plan"]))  # --from copies a student


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("danceopd me", ["merge"]), ("danceopd export x --format k", ["kohya"]), ("danceopd merge --dev", ["--device"])],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_DANCEOPD_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "danceopd"], env=dict(os.environ) | words, capture_output=True, text=True
    )
    assert done.stdout.split() == offered, done.stderr


@pytest.mark.parametrize("arguments", [["-q", "version"], ["version", "-q"]])
def test_quiet_shows_no_progress(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert RUNNER.invoke(app, arguments).exit_code == 0
    with console.progress_bar("work", ends=True) as report:
        report(1, 1, "done")
    assert capsys.readouterr().err == ""


LOUD = """
import logging, sys, warnings
from danceopd.cli import flags
flags.raise_voice({verbose})
logging.getLogger("torch").setLevel("WARNING")  # as torch does
for name in ("torchao", "torch.utils._pytree", "diffusers.loaders.lora_base", "transformers.utils"):
    logging.getLogger(name).warning("noise of %s", name)
warnings.warn_explicit("noise of warnings", UserWarning, "x.py", 1, module="transformers.utils")
logging.getLogger("danceopd").warning("ours")
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_other_libraries_are_silent_unless_asked(verbose: bool) -> None:
    done = subprocess.run([sys.executable, "-c", LOUD.format(verbose=verbose)], capture_output=True, text=True)
    assert "ours" in done.stderr and done.returncode == 0
    assert done.stderr.count("noise of") == (5 if verbose else 0)


def test_a_level_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    monkeypatch.setattr(flags, "LIBRARIES", ("nothing",))
    flags.raise_voice(False)
    assert (os.environ["DIFFUSERS_VERBOSITY"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("info", "error")


def test_verbose_says_what_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = logging.getLogger("danceopd")
    monkeypatch.setattr(own, "level", own.level)
    assert RUNNER.invoke(app, ["-v", "version"]).exit_code == 0
    assert own.isEnabledFor(logging.INFO)


def test_set_gives_any_key(files: dict) -> None:
    given = flags.settings(["optimizer.lr=1e-4", "student.rank=8", "gates.evidence.alpha=1", "dtype=bf16"])
    recipe = Recipe.load(None, **files, settings=given)
    assert (recipe.optimizer.lr, recipe.student.rank, recipe.dtype) == (1e-4, 8, "bf16")
    assert recipe.gates.evidence is not None and recipe.gates.evidence.alpha == 1
    written = {**files, "student": {"rank": 4, "init": "base"}, "gates": {"evidence": True}}
    Path("r.yaml").write_text(json.dumps(written))
    recipe = Recipe.load("r.yaml", settings=given)
    assert (recipe.student.rank, recipe.student.init) == (8, "base")
    assert recipe.gates.evidence is not None and recipe.gates.evidence.alpha == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.learning_rat=1", "unknown key 'optimizer.learning_rat' in the command line with --set"),
        ("steps", "write a name and what it stands for"),
        ("steps=[1", "not valid YAML"),
        ("base.x=1", "base is no mapping"),
        ("steps.x=1", "steps is"),
    ],
)
def test_a_setting_that_is_none(files: dict, text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Recipe.load(None, **files, settings=flags.settings([text]))


def test_schema_is_printed_or_written(tmp_path: Path) -> None:
    assert json.loads(RUNNER.invoke(app, ["schema"]).stdout) == schema()
    said = RUNNER.invoke(app, ["schema", "-o", str(tmp_path / "r.json")]).stdout
    assert "# yaml-language-server: $schema=r.json" in said
    assert json.loads((tmp_path / "r.json").read_text()) == schema()
    assert RUNNER.invoke(app, ["schema", "-o", str(tmp_path)]).exit_code == 2


def test_json_for_scripts(danceopd: Program, tmp_path: Path) -> None:
    folder = scenes(tmp_path / "bench", each=1)
    found = json.loads(danceopd("compare", folder, folder, "--models", "student,base", "--json").stdout)
    assert (found["a"]["model"], found["b"]["model"]) == ("student", "base")
    assert json.loads((tmp_path / "compare" / "compare.json").read_text())["verdict"] == found["verdict"]
    listed = json.loads(danceopd("suites", "--json").stdout)
    assert set(listed["gedit"]) == {"version", "about", "data"}
    assert "torch" in json.loads(danceopd("kernels", "--json").stdout)
    refused(danceopd("merge", "--set", "stepz=3"), "unknown key 'stepz'", "did you mean 'steps'")
