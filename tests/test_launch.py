"""The ways to start several processes, each really taken, with gloo: all make the student of one process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import program
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, check_student, three_rows

from danceopd.common.distributed import Processes
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
ONE = "accelerate launch --multi_gpu --num_processes 2 -m danceopd merge recipe.yaml"
TWO = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 2 --machine_rank 0 "
    "--main_process_ip 10.0.0.1 --main_process_port 29500 -m danceopd merge recipe.yaml"
)
"""As docs/method.md has them."""


def begin(command: str, folder: Path, **environment: object) -> program.Running:
    """A command of the documents, in `folder`: the launcher itself, forked where torch is imported already."""
    _, _, *words = shlex.split(command)
    code = "from accelerate.commands import launch\nlaunch.main()"
    return program.python(code, *words, cwd=folder, HF_HOME=folder / "hf", **environment)


def ends(process: program.Running) -> tuple[int, str]:
    return process.wait(), process.stdout + process.stderr


def two_of(folders: Sequence[Path]) -> list[program.Running]:
    """`danceopd merge recipe.yaml` as two processes of one run, each in its folder."""
    port, begun = program.free_port(), []
    for rank, folder in enumerate(folders):
        where = {**program.environment_of(rank, 2, port), "HF_HOME": folder / "hf"}
        begun.append(program.start("merge", "recipe.yaml", cwd=folder, **where))
    return begun


def written(models: Path, folder: Path, **fields: object) -> Recipe:
    folder.mkdir()
    recipe = three_rows(models, Path("run"), **{"steps": 2, "validation": {"every": 0}, **fields})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe


def of_two(folder: Path) -> bool:
    """Whether the checkpoint has the random states of two processes."""
    facts = json.loads((folder / "run" / "checkpoints" / "step-000002" / "meta.json").read_text())
    return len(facts["others"]) == 1


@pytest.fixture(scope="module")
def wanted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The student of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    merge(three_rows(models, output, steps=2, validation={"every": 0}), lambda metrics, steps: None)
    return load_file(output / WEIGHTS)


def test_the_documents_have_these_commands() -> None:
    method = (ROOT / "docs" / "method.md").read_text()
    assert ONE in method and TWO in method and ONE in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_accelerate_launch(models: Path, wanted: dict, tmp_path: Path) -> None:
    here = tmp_path / "here"
    written(models, here)
    status, said = ends(begin(ONE.replace("launch", f"launch --main_process_port {program.free_port()}"), here))
    assert status == 0 and said.count("student:") == 1, said
    check_student(here / "run", wanted)
    assert of_two(here)


@pytest.mark.slow
def test_accelerate_launch_on_two_machines_that_share_no_disk(models: Path, wanted: dict, tmp_path: Path) -> None:
    """Two launchers, each with a folder and a cache of its own; only the first writes a run."""
    command = TWO.replace("10.0.0.1", "127.0.0.1").replace("29500", str(program.free_port()))
    machines = []
    for rank in (0, 1):
        here = tmp_path / str(rank)
        written(models, here)
        mine = command.replace("machine_rank 0", f"machine_rank {rank}")
        machines.append(begin(mine, here, DANCEOPD_CACHE=here / "cache"))
    for process in machines:
        status, said = ends(process)
        assert status == 0, said
    check_student(tmp_path / "0" / "run", wanted)
    assert of_two(tmp_path / "0") and not (tmp_path / "1" / "run").exists()


def test_mpi_on_cpus(tmp_path: Path) -> None:
    """By what Open MPI tells its processes, as `accelerate launch --cpu --mpirun_hostfile` starts them."""
    code = (
        "import torch\nfrom danceopd.common.distributed import Processes\nhere = Processes('cpu')\n"
        "rank = torch.tensor(float(here.rank + 1))\nhere.all_reduce(rank)\n"
        "print(here.rank, here.world_size, rank.item())\n"
    )
    names, port, both = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"), program.free_port(), []
    for rank in (0, 1):
        mine = {f"OMPI_COMM_WORLD_{name}": 2 if "SIZE" in name else rank for name in names}
        both.append(program.python(code, cwd=tmp_path, **mine, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    for rank, process in enumerate(both):
        status, said = ends(process)
        assert status == 0 and said.splitlines()[-1] == f"{rank} 2 3.0", said


def test_a_launch_that_quietly_starts_one_process_is_refused(models: Path, tmp_path: Path) -> None:
    """With --cpu accelerate starts one process, whatever it was asked for."""
    here = tmp_path / "here"
    written(models, here)
    status, said = ends(begin(ONE.replace("--multi_gpu", "--cpu"), here))
    assert status != 0 and "started only one; start them with --multi_gpu" in said, said
    assert not (here / "run").exists()


ALONE = {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "10.0.0.1"}
LOST = {"PMI_SIZE": "2", "PMI_RANK": "1"}


@pytest.mark.parametrize(
    ("said", "device", "says"),
    [
        (ALONE, "cpu", "accelerate launch was asked for several processes and started only one"),
        (LOST, "cpu", "2 processes were started and do not find each other .*MASTER_ADDR"),
        (LOST, "cuda", "2 processes were started, and each would run alone"),
    ],
)
def test_processes_that_would_each_run_alone(monkeypatch, said: dict, device: str, says: str) -> None:
    monkeypatch.setattr("danceopd.common.distributed.resolve_device", torch.device)
    monkeypatch.setattr(os, "environ", {**os.environ, **said})  # accelerate writes to it
    with pytest.raises(UserError, match=says):
        Processes(device)
    PartialState._reset_state()


def test_one_process_of_a_launcher_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Processes("cpu").world_size == 1


@pytest.mark.slow
def test_processes_with_different_recipes_are_refused(models: Path, tmp_path: Path) -> None:
    """Another recipe would never end; another teacher would spoil the student in silence."""
    for rank, steps in enumerate((2, 3)):
        written(models, tmp_path / str(rank), steps=steps)
    first, second = two_of([tmp_path / "0", tmp_path / "1"])
    assert first.wait() == second.wait() == 2 and "error:" not in second.stderr
    assert "error: process 1 was given another recipe than the first (steps is 3, not 2)" in first.stderr
    assert not (tmp_path / "0" / "run").exists()


@pytest.mark.slow
def test_ctrl_c_stops_both_and_is_said_once(models: Path, tmp_path: Path) -> None:
    """It reaches one process alone: both end the update at hand, the first saves it and says how to go on."""
    here = tmp_path / "here"
    written(models, here, steps=5000, save_every=1)
    first, second = two_of([here, here])
    while not list((here / "run" / "checkpoints").glob("step-*")):
        assert first.poll() is None, first.stderr
        time.sleep(0.01)
    second.send_signal(signal.SIGINT)
    assert first.wait() == second.wait() == 130
    assert "is saved in" in first.stderr and first.stderr.count("run the same command again to continue") == 1
    assert "again" not in second.stderr
