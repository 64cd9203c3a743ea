"""Stand-ins for the packages wandb and mlflow: what accelerate calls of them, written down in a file of lines.

STUB_FAIL in the environment names calls that raise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SHARED = '''
import json, os
from pathlib import Path
def note(what, **facts):
    if what in os.environ.get("STUB_FAIL", "").split():
        raise RuntimeError(f"{what}: no such host")
    with open(os.environ["STUB_CALLS"], "a") as file:
        file.write(json.dumps({"call": what, **facts}, default=str) + "\\n")
'''
WANDB = (
    SHARED
    + '''
class Image:
    def __init__(self, picture): self.size = picture.size
    def __str__(self): return f"picture {self.size}"
class Config:
    def update(self, values, allow_val_change=False): note("wandb.config", values=values)
config = Config()
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, name, step_metric=None): note("wandb.define", name=name, over=step_metric)
    def log(self, values, step=None): note("wandb.log", values=values, step=step)
    def finish(self): note("wandb.finish")
def init(project=None, id=None, resume=None, name=None, dir=None, tags=None):
    note("wandb.init", project=project, id=id, resume=resume, name=name, dir=dir, tags=tags)
    return Run(id or "w1")
'''
)
MLFLOW = (
    SHARED
    + '''
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 500, 100
class Run:
    class info:
        run_id = "m1"
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location=None, tags=None):
    note("mlflow.experiment", name=name)
    return "7"
def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, tags=None, description=None):
    note("mlflow.start", id=run_id, name=run_name)
    return Run()
def log_params(values): note("mlflow.params", values=values)
def log_metrics(values, step=None): note("mlflow.log", values=values, step=step)
def log_artifact(local_path, artifact_path=None): note("mlflow.artifact", file=Path(local_path).name, to=artifact_path)
def end_run(): note("mlflow.end")
'''
)


class Calls:
    """What the stand-ins were told."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def of(self, name: str) -> list[dict[str, Any]]:
        """The calls of a name, in order."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [one for one in map(json.loads, lines) if one["call"] == name]


@contextmanager
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """A context in which `wandb` and `mlflow` can be imported."""
    for name, code in (("wandb", WANDB), ("mlflow", MLFLOW)):
        (folder / "stubs").mkdir(parents=True, exist_ok=True)
        (folder / "stubs" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder / "stubs")
    monkeypatch.setenv("STUB_CALLS", str(folder / "calls.jsonl"))
    for name in ("EXPERIMENT_NAME", "RUN_ID", "TAGS", "NESTED_RUN"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    yield Calls(folder / "calls.jsonl")
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)
