"""How a command ends: one sentence, its exit status, and nothing that moves a terminal's cursor."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import program
import pytest
from conftest import Program

from danceopd.cli.boundary import shortened
from danceopd.common.console import printable

FAULTS = {
    "memory": ("raise MemoryError", 2, "memory does not suffice for this; lower micro_batch or batch"),
    "the CPU's memory": (
        "raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate "
        "12000000000 bytes. Error code 12')", 2, r"memory does not suffice for this \(12 GB more were needed\); lower",
    ),
    "the GPU's memory": (
        "raise RuntimeError('CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has')", 2,
        r"the GPU's memory does not suffice for this \(2.50 GiB more were needed\); lower",
    ),
    "a full disk": ("raise OSError(28, 'No space left', 'student/x')", 2, "the disk is full at student/x; free"),
    "a read-only place": ("raise OSError(30, 'Read-only file system', 'x/y')", 2, "x/y cannot be used: Read-only file"),
    "a long sentence": ("raise UserError('wrong ' * 999)", 2, "wrong .* … .*wrong"),
    "control characters": (
        "raise UserError('a\\x1b[31mb\\x00c\\u202ed')", 2, re.escape(r"a\x1b[31mb\x00c\u202ed"),
    ),
    "a fault of ours": (
        "raise KeyError('ours')", 1, r"danceopd failed in danceopd.cli.app.merge \(KeyError: 'ours'\); the traceback "
        r"is in .*danceopd-error-\S+.log: report it with that file",
    ),
    "recursion": ("return merge(recipe)", 1, "danceopd failed in .*RecursionError"),
}  # fmt: skip


def flags(files: dict[str, str]) -> list[str]:
    return [part for key, value in files.items() for part in (f"--{key}", value)]


@pytest.mark.parametrize("name", FAULTS)
def test_what_ends_a_command_is_one_sentence(files: dict[str, str], name: str) -> None:
    body, status, words = FAULTS[name]
    done = program.run("merge", *flags(files), code=program.with_merge(body))
    assert done.returncode == status, done.stderr
    assert re.match(f"error: {words}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 410


def test_the_traceback_is_in_the_run_folder_else_in_the_temporary_one(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    environment = {"TMPDIR": str(tmp_path / "temporary")}
    for folder in ("temporary", "run"):
        code = program.with_merge("raise KeyError('ours')")
        done = program.run("merge", *flags(files), "-o", "run", code=code, **environment)
        file = Path(re.findall(r"in (\S+\.log):", done.stderr)[0])
        assert file.parent.name == folder, done.stderr
        assert "Traceback" in file.read_text() and "KeyError: 'ours'" in file.read_text()
        (tmp_path / "run").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "--stepz", "3"], "No such option.*--stepz.*run danceopd merge --help"),
        (["merge", "--steps", "1e3"], ".*--steps.*integer.*run danceopd merge --help"),
        (["merge", "a", "b"], "unexpected extra argument"),
        (["murge"], "No such command.*murge.*run danceopd --help"),
        (["sample"], "Missing argument.*run danceopd sample --help"),
        (["openmoji", "fetsh"], "No such command.*fetsh.*run danceopd openmoji --help"),
    ],
)
def test_a_wrong_flag_is_one_sentence(danceopd: Program, arguments: list[str], words: str) -> None:
    done = danceopd(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(f"error: .*{words}", done.stderr), done.stderr


def test_no_argument_is_help(danceopd: Program) -> None:
    done = danceopd()
    assert done.returncode == 2 and "merge" in done.stdout + done.stderr and "error:" not in done.stderr


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m danceopd"
    command = command.replace("danceopd", program)
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_closed_and_full_outputs_end_quietly(tmp_path: Path) -> None:
    for command in ("suites", "version"):  # rich and our own print; the reader is gone before either does
        done = shell(f"(sleep 0.3; danceopd {command}) | true; echo ${{PIPESTATUS[0]}}", tmp_path)
        assert done.stderr == "" and done.stdout == "141\n"
    done = shell("danceopd version > /dev/full", tmp_path)
    assert done.returncode == 2 and re.fullmatch("error: what this prints cannot be written .*\n", done.stderr)
    assert shell("danceopd --help >&-", tmp_path).stderr == ""
    assert shell("danceopd merge lost.yaml 2>&-", tmp_path).returncode == 2
    assert shell("danceopd merge lost.yaml 2>/dev/full", tmp_path).returncode == 2


def test_surroundings_in_which_nothing_works(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell("cd gone && rmdir ../gone && PYTHONPATH=$OLDPWD danceopd version", tmp_path)
    assert done.returncode == 2 and "no longer exists" in done.stderr
    done = shell("PYTHONOPTIMIZE=2 danceopd version", tmp_path)
    assert done.returncode == 2 and "unset PYTHONOPTIMIZE" in done.stderr


def test_a_sentence_keeps_both_ends() -> None:
    text = f"adapter {'x' * 5000} does not exist; give an existing file"
    assert shortened(text, 400) == f"adapter {'x' * 60}…{'x' * 30} does not exist; give an existing file"
    assert shortened("a b " * 300, 400).startswith("a b a b") and len(shortened("a b " * 300, 400)) <= 400
    assert printable("a\tb\n\x1b[0m\x9b\ud800") == "a\tb\n\\x1b[0m\\x9b\\ud800"
