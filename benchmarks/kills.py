"""Kill a merge with SIGKILL at random moments, let it finish, and compare the student with an uninterrupted merge's.

    python benchmarks/kills.py --kills 50

The shipped teachers and small updates, real `danceopd merge` processes. Each process is killed after a random time of
up to `--life` seconds: while it starts, loads, encodes, trains or saves. Ends with status 1 when the bytes of the
students' files differ, or when the run was finished before it was killed often enough (give more --steps).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

WEIGHTS = "pytorch_lora_weights.safetensors"
RECIPE = """
base: base
generation: generation
editing: editing
steps: {steps}
batch: 4
student: {{rank: 80}}
optimizer: {{lr: 0.001, schedule: cosine}}
rollout: {{steps: 5}}
data: {{rows: 16}}
samples: {{every: 7, count: 1}}
save_every: 1
"""


def start(recipe: Path, output: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Start a merge in a process of its own, with its own cache."""
    return subprocess.Popen(
        [sys.executable, "-m", "danceopd", "merge", str(recipe), "-o", str(output)],
        env={**os.environ, "DANCEOPD_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def sha256(output: Path) -> str:
    """Of the student's exported file."""
    return hashlib.sha256((output / WEIGHTS).read_bytes()).hexdigest()


def main(
    kills: Annotated[int, typer.Option(min=1, help="Number of SIGKILLs.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the merge.")] = 400,
    life: Annotated[float, typer.Option(min=0.1, help="Longest time, in seconds, until a process is killed.")] = 12.0,
    seed: Annotated[int, typer.Option(help="Of the random times.")] = 0,
) -> None:
    """Run the uninterrupted merge, then one that is killed and continued, and compare their files."""
    times = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = work / "recipe.yaml"
        recipe.write_text(RECIPE.format(steps=steps))
        if start(recipe, work / "uninterrupted", work / "cache").wait():
            raise SystemExit("the uninterrupted merge failed")
        wanted, newest = sha256(work / "uninterrupted"), []
        for kill in range(1, kills + 1):
            process = start(recipe, work / "killed", work / "cache2")
            time.sleep(times.uniform(0, life))
            if process.poll() is not None:
                raise SystemExit(f"the merge was finished before kill {kill} of {kills}; give more --steps")
            process.send_signal(signal.SIGKILL)
            process.wait()
            saved = sorted(path.name for path in (work / "killed" / "checkpoints").glob("step-*"))
            newest.append(saved[-1] if saved else "none")
            print(f"kill {kill} of {kills}: newest checkpoint {newest[-1]}", flush=True)
        if start(recipe, work / "killed", work / "cache2").wait():
            raise SystemExit("the killed merge could not be continued")
        same = sha256(work / "killed") == wanted
        found = "the same bytes" if same else "OTHER BYTES"
        print(f"{kills} kills at {len(set(newest))} different checkpoints, {steps} steps: {found}")
        raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
