"""Kill a merge at random moments, let it end, and compare the student's bytes with those of a merge left alone.

    python benchmarks/kills.py --kills 50

The shipped teachers and small updates, real `danceopd merge` processes. Each life ends by SIGKILL at a moment drawn
evenly from `--life` seconds: while it starts, loads, encodes, learns or saves. Ends with status 1 when the bytes
differ, or when the run was done before it was killed often enough (give more --steps).
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
    """A merge, with a cache of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "danceopd", "merge", str(recipe), "-o", str(output)],
        env={**os.environ, "DANCEOPD_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def sha256(output: Path) -> str:
    return hashlib.sha256((output / WEIGHTS).read_bytes()).hexdigest()


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many SIGKILLs.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the merge.")] = 400,
    life: Annotated[float, typer.Option(min=0.1, help="Seconds that a process lives at most.")] = 12.0,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = work / "recipe.yaml"
        recipe.write_text(RECIPE.format(steps=steps))
        if start(recipe, work / "whole", work / "cache").wait():
            raise SystemExit("the undisturbed merge failed")
        wanted, where = sha256(work / "whole"), []
        for kill in range(1, kills + 1):
            process = start(recipe, work / "killed", work / "cache2")
            time.sleep(moments.uniform(0, life))
            if process.poll() is not None:
                raise SystemExit(f"the merge was done before kill {kill} of {kills}; give more --steps")
            process.send_signal(signal.SIGKILL)
            process.wait()
            saved = sorted(path.name for path in (work / "killed" / "checkpoints").glob("step-*"))
            where.append(saved[-1] if saved else "none")
            print(f"kill {kill} of {kills}: newest checkpoint {where[-1]}", flush=True)
        if start(recipe, work / "killed", work / "cache2").wait():
            raise SystemExit("the killed merge does not go on")
        same = sha256(work / "killed") == wanted
        print(f"{kills} kills, {len(set(where))} places, {steps} steps: {'the same bytes' if same else 'OTHER BYTES'}")
        raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
