"""How long a table of a million edits takes to open, to check and to read from.

    python benchmarks/data.py [--rows 1000000]

Writes a table of edits in each format (an instruction, and the path of one of 10,000 images), opens it, checks every
row and path, and reads 10,000 rows at random. Writes benchmarks/results/data.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd.common.system import describe_machine
from danceopd.data.sources import edits_from

RESULTS = Path(__file__).parent / "results" / "data.md"
IMAGES = 10_000
READS = 10_000


def main() -> None:
    """Make the tables in a temporary folder, measure each, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the Markdown file to write")
    given, load = parser.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), given.rows)
        lines = [line for kind in ("csv", "jsonl", "parquet") if (line := measure(Path(folder), kind))]
    machine = f"{describe_machine()}, Python {platform.python_version()}"
    text = REPORT.format(rows=given.rows, machine=machine, load=load, table="\n".join(lines))
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(text)
    print(text)


REPORT = """# {rows:,} rows of edits

`python benchmarks/data.py` on {machine}; load {load:.1f} when it began.

Seconds, except a read. Check: every row's text and every path. A read is one random row: its instruction and its
image's path.

| format | MB | open | check | read |
|---|---|---|---|---|
{table}
"""


def write_tables(folder: Path, rows: int) -> None:
    """edits.csv, edits.jsonl and, where pyarrow is installed, edits.parquet; their images are links to one file."""
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "images/0.png")
    for i in range(1, IMAGES):
        os.link(folder / "images/0.png", folder / f"images/{i}.png")
    with open(folder / "edits.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("instruction", "image"))
        out.writerows(edits_of(rows))
    with open(folder / "edits.jsonl", "w") as file:
        file.writelines(json.dumps({"instruction": text, "image": path}) + "\n" for text, path in edits_of(rows))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        print("pyarrow is not installed: no parquet")
        return
    instructions, paths = zip(*edits_of(rows))
    table = pyarrow.table({"instruction": instructions, "image": paths})
    parquet.write_table(table, folder / "edits.parquet", row_group_size=max(rows // 10, 1))


def edits_of(rows: int) -> Iterator[tuple[str, str]]:
    """(instruction, image path) of each row; every third instruction has a line break, the others quotes."""
    for i in range(rows):
        text = f'make number {i} blue, and write "done"' if i % 3 else f"remove the red star number {i}\nand the ring"
        yield text, f"images/{i % IMAGES}.png"


def measure(folder: Path, kind: str) -> str:
    """The table row of one format; empty where there is no file of it."""
    path = folder / f"edits.{kind}"
    if not path.exists():
        return ""
    began = time.perf_counter()
    edits = edits_from(path, check=False)
    edits[len(edits) // 2]
    seconds = [time.perf_counter() - began]
    began = time.perf_counter()
    edits.check()
    seconds.append(time.perf_counter() - began)
    indices = np.random.default_rng(0).integers(len(edits), size=READS).tolist()
    began = time.perf_counter()
    for index in indices:
        edits[index]
    read = (time.perf_counter() - began) / READS * 1e6
    cells = [f"{path.stat().st_size / 1e6:.0f}", *(f"{s:.2f}" for s in seconds), f"{read:.0f} µs"]
    return f"| {kind} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
