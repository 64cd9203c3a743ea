"""How long a million rows of work take to open, to check and to draw from.

    python benchmarks/data.py [--rows 1000000]

Makes a table of edits in each format (an instruction, and the path of one of 10,000 images), opens it cold (no index
kept) and warm, checks every row and path, and draws 10,000 rows at random. Writes benchmarks/results/data.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd.data import edits_from
from danceopd.machine import describe

IMAGES = 10_000
DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data.md")
    given, load = parser.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DANCEOPD_CACHE"] = f"{folder}/cache"
        make(Path(folder), given.rows)
        lines = [line for kind in ("csv", "jsonl", "parquet") if (line := measure(Path(folder), kind))]
    machine = f"{describe()}, Python {platform.python_version()}"
    text = REPORT.format(rows=given.rows, machine=machine, load=load, table="\n".join(lines))
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(text)
    print(text)


REPORT = """# {rows:,} rows of edits

`python benchmarks/data.py` on {machine}; load {load:.1f} when it began.

Seconds, except a draw. Cold: the first time the file is seen. Warm: its index is kept. Check: every row's text and
every path. A draw is one random row: its instruction and its image's path.

| format | MB | open, cold | open, warm | check | draw |
|---|---|---|---|---|---|
{table}
"""


def make(folder: Path, rows: int) -> None:
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "images/0.png")
    for i in range(1, IMAGES):
        os.link(folder / "images/0.png", folder / f"images/{i}.png")
    with open(folder / "edits.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("instruction", "image"))
        out.writerows(work(rows))
    with open(folder / "edits.jsonl", "w") as file:
        file.writelines(json.dumps({"instruction": words, "image": path}) + "\n" for words, path in work(rows))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        print("pyarrow is not installed: no parquet")
        return
    words, paths = zip(*work(rows))
    table = pyarrow.table({"instruction": words, "image": paths})
    parquet.write_table(table, folder / "edits.parquet", row_group_size=rows // 10)


def work(rows: int) -> Iterator[tuple[str, str]]:
    for i in range(rows):
        words = f'make number {i} blue, and write "done"' if i % 3 else f"remove the red star number {i}\nand the ring"
        yield words, f"images/{i % IMAGES}.png"


def measure(folder: Path, kind: str) -> str:
    path = folder / f"edits.{kind}"
    if not path.exists():
        return ""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        edits = edits_from(path, check=False)
        edits[len(edits) // 2]
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    edits.check()
    seconds.append(time.perf_counter() - began)
    picks = np.random.default_rng(0).integers(len(edits), size=DRAWS).tolist()
    began = time.perf_counter()
    for pick in picks:
        edits[pick]
    draw = (time.perf_counter() - began) / DRAWS * 1e6
    cells = [f"{path.stat().st_size / 1e6:.0f}", *(f"{s:.2f}" for s in seconds), f"{draw:.0f} µs"]
    return f"| {kind} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
