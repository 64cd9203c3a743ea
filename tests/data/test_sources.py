"""Data sources: what each kind gives, and that every error names its file and line."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from danceopd.data import tables
from danceopd.data.images import open_image
from danceopd.data.sources import Edits, edits_from, prompts_from
from danceopd.data.tables import CsvTable, JsonTable
from danceopd.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 80), "red").save("red.png")
    return tmp_path


def test_scenes_depend_on_the_seed() -> None:
    prompts = prompts_from("scenes", rows=12, seed=1)
    assert len(prompts) == 12 and all(prompts)
    assert prompts[:] == prompts_from("scenes", rows=12, seed=1)[:] != prompts_from("scenes", rows=12, seed=2)[:]
    pairs = edits_from("scenes", rows=6, seed=1)
    assert len(pairs) == 6 and {image.size for _, image in pairs} == {(64, 64)}  # type: ignore[union-attr]


def test_scenes_of_some_tasks_only() -> None:
    assert all("photo of" in p for p in prompts_from("scenes:counting", rows=4))
    instructions = [instruction for instruction, _ in edits_from("scenes:background_change", rows=6)]
    assert all("background" in text or text.startswith("put") for text in instructions)
    assert len(edits_from("scenes:local", rows=5)) == 5
    assert all("sky" in text for text, _ in edits_from("scenes:background_change=sky", rows=6))
    assert {"night", "outline"} == {
        word for text, _ in edits_from("scenes:style_change=night,style_change=outline", rows=6)
        for word in ("night", "outline", "flat", "negative") if word in text
    }  # fmt: skip
    with pytest.raises(UserError, match="'style_change=nigth', which does not exist; did you mean 'style_change=n"):
        edits_from("scenes:style_change=nigth")
    with pytest.raises(UserError, match="the task 'locl', which does not exist; did you mean 'local'"):
        edits_from("scenes:locl")


def test_text_file(here: Path) -> None:
    Path("p.txt").write_text("a fox\n  a dog \n\n", encoding="utf-8-sig")
    assert prompts_from("p.txt")[:] == ["a fox", "a dog"]
    Path("p.txt").write_text("a fox\n\na dog\n")
    with pytest.raises(UserError, match="p.txt, line 2: prompt is empty"):
        prompts_from("p.txt")
    with pytest.raises(UserError, match="edits need a source image each"):
        edits_from("p.txt")


def test_csv(here: Path) -> None:
    Path("d.csv").write_text('instruction,image\n"make it blue, please",red.png\n')
    assert edits_from("d.csv")[:] == [("make it blue, please", Path("red.png"))]
    Path("d.csv").write_text("prompt,id\na fox,1\n,2\n")
    with pytest.raises(UserError, match="d.csv, line 3: prompt is empty"):
        prompts_from("d.csv")
    Path("d.csv").write_text("promt\na fox\n")
    with pytest.raises(UserError, match="d.csv, line 2 has no column 'prompt'; is it called 'promt'"):
        prompts_from("d.csv")
    Path("d.csv").write_text("prompt\na fox, a dog\n")
    with pytest.raises(UserError, match="d.csv, line 2 has more fields than the header"):
        prompts_from("d.csv")
    Path("d.csv").write_text("prompt\n")
    with pytest.raises(UserError, match="d.csv has no rows"):
        prompts_from("d.csv")


def test_jsonl(here: Path) -> None:
    rows = [{"instruction": "make it blue", "source": "red.png"}, {"prompt": "remove it", "image": "red.png"}]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [instruction for instruction, _ in edits_from("d.jsonl")] == ["make it blue", "remove it"]
    Path("d.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match="d.jsonl, line 2 is not valid JSON"):
        prompts_from("d.jsonl")
    Path("d.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": 3}\n')
    with pytest.raises(UserError, match="d.jsonl, line 3: prompt is 3, not text"):
        prompts_from("d.jsonl")
    Path("d.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="d.jsonl, line 1 is not a JSON object"):
        prompts_from("d.jsonl")


def test_parquet(here: Path) -> None:
    Path("d.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="needs pyarrow|not a readable parquet file"):
        prompts_from("d.parquet")
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; the sentence above is what a user gets")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"prompt": ["a fox"]}), "d.parquet")
    assert prompts_from("d.parquet")[:] == ["a fox"]


def test_folder(here: Path) -> None:
    Path("red.txt").write_text("make it blue\n")
    assert edits_from(".")[:] == [("make it blue", here / "red.png")]
    assert prompts_from(".")[:] == ["make it blue"]
    Path("green.txt").write_text("x")
    with pytest.raises(UserError, match="green.txt has no image of the same name"):
        edits_from(".")
    Path("green.txt").unlink()
    Path("red.txt").unlink()
    with pytest.raises(UserError, match="red.png has no instruction; write it into red.txt"):
        edits_from(".")


def test_sources_that_are_none(here: Path) -> None:
    with pytest.raises(UserError, match="'none.csv' does not exist"):
        prompts_from("none.csv")
    with pytest.raises(UserError, match="red.png is of an unknown kind"):
        prompts_from("red.png")
    Path("p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="p.txt, line 1 is not text in UTF-8"):
        prompts_from("p.txt")
    os.mkfifo("pipe.txt")
    with pytest.raises(UserError, match="pipe.txt is a pipe or a device"):
        prompts_from("pipe.txt")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", b"prompt,x,prompt\na,b,c\n", "p.csv has the column 'prompt' twice"),
        ("p.csv", b"x,prompt\n1,a fox\n2\n", "line 3: prompt is empty"),
        ("p.txt", b"a fox\ra dog\r", "line 1 has a carriage return inside"),
        ("p.txt", b"fox " * 300_000, "line 1 has 1,200,000 bytes"),
        ("p.csv", b"prompt\n" + b"fox " * 300_000, "line 2 has 1,200,000 bytes"),
        ("p.jsonl", b'{"prompt": "' + b"fox " * 300_000 + b'"}', "line 1 has 1,200,014 bytes"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a \\ud800 fox"}\n', "line 2: prompt has half a character"),
        ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 9999 + b"]" * 9999 + b"}", "line 1 is not valid JSON"),
        ("p.jsonl", b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("p.jsonl", b'{"prompt": {"bytes": "' + b"A" * 9999 + b'"}}', "line 1: prompt is a mapping of 1, not text"),
        ("p.csv", b"a" * 9999 + b"\nfox\n", "has no column 'prompt'; it has: a"),
    ],
)
def test_hostile_tables(here: Path, name: str, content: bytes, says: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        prompts_from(name)
    assert len(str(caught.value)) <= 400


# -- lazy tables ------------------------------------------------------------------------------------------


def _wild(rows: int, seed: int) -> list[list[str]]:
    """Cells with everything that CSV has to quote, and what looks like it."""
    pieces = ["a fox", '"', ",", "\n", "\r\n", "ü", " ", '""', "5' by 3"]
    drawn = random.Random(seed)
    return [["x" + "".join(drawn.choices(pieces, k=drawn.randrange(6))), str(i)] for i in range(rows)]


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_csv_rows_are_those_of_the_csv_module(here: Path, monkeypatch, block: int, ends: str) -> None:
    """Quoted newlines, quotes and commas, wherever the blocks that are indexed at once are cut."""
    monkeypatch.setattr(tables, "BLOCK", block)
    monkeypatch.setattr(CsvTable, "_by_reader", lambda self: pytest.fail("a tidy file is indexed by its quotes"))
    rows = _wild(300, block)
    with open("d.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, lineterminator=ends).writerows([["prompt", "id"], *rows])
    table = CsvTable(Path("d.csv"))
    assert [list(table[i].values()) for i in range(len(table))] == rows
    assert [list(row.values()) for row in table.scan()] == rows  # type: ignore[union-attr]


def test_csv_with_quotes_that_are_letters(here: Path) -> None:
    """A quote inside an unquoted cell opens nothing, so the next newline ends the row."""
    Path("d.csv").write_text('prompt,id\na 5" pipe,1\n"two\nlines",2\n\nlast "one",3')
    table = CsvTable(Path("d.csv"))
    assert [row["prompt"] for row in table.scan()] == ['a 5" pipe', "two\nlines", 'last "one"']  # type: ignore[index]
    assert (table[2]["id"], table.where(1), table.where(2)) == ("3", "d.csv, line 3", "d.csv, line 6")
    Path("d.csv").write_text('prompt\na\n"never closed\n')
    with pytest.raises(UserError, match="d.csv, line 3 is not valid CSV"):
        prompts_from("d.csv")


def test_jsonl_is_parsed_a_line_at_a_time(here: Path) -> None:
    """Lines that only together are valid JSON are faults, each in its own line."""
    Path("d.jsonl").write_text('{"prompt": "a"}, {"prompt": "b"}\n{"prompt": [{"x": 1}\n{"y": 2}]}\n')
    with pytest.raises(UserError, match=r"d.jsonl, line 1 is not valid JSON.*and 2 more rows are faulty"):
        prompts_from("d.jsonl")
    Path("d.jsonl").write_text('\ufeff{"prompt": "a"}\n   \n\n{"prompt": "b"}', encoding="utf-8")
    table = JsonTable(Path("d.jsonl"))
    assert [row["prompt"] for row in table.scan()] == ["a", "b"]  # type: ignore[index]
    assert table.where(1) == "d.jsonl, line 4"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_first_missing_image_and_how_many_more(here: Path, kind: str) -> None:
    paths = ["red.png"] * 3000
    paths[1234] = paths[2000] = "gone.png"
    paths[2999] = "nowhere/red.png"
    rows = [{"caption": f"row {i}", "control_path": path, "image": "no result"} for i, path in enumerate(paths)]
    if kind == "csv":
        with open("d.csv", "w", newline="") as file:
            csv.DictWriter(file, list(rows[0])).writerows([dict(zip(rows[0], rows[0])), *rows])
    elif kind == "jsonl":
        Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), "d.parquet", row_group_size=700)
    line = {"csv": "line 1236", "jsonl": "line 1235", "parquet": "row 1235"}[kind]
    with pytest.raises(UserError, match=rf"{line}: image gone.png does not exist.*\(and 2 more rows are faulty\)"):
        edits_from(f"d.{kind}")
    edits = edits_from(f"d.{kind}", check=False)
    assert edits[2998] == ("row 2998", Path("red.png")) and edits.sizes(0) == [(64, 80)]
    assert isinstance(edits, Edits) and len(edits) == 3000


def test_headers_of_the_rows_that_will_be_used_are_checked(here: Path) -> None:
    """In a large table not every image's header is opened, but those of the rows that will be used are."""
    Path("d.jsonl").write_text("".join(json.dumps({"prompt": "p", "source": f"{i % 2}.png"}) + "\n" for i in range(4)))
    Image.new("RGB", (64, 64)).save("0.png")
    Path("1.png").write_text("no picture")
    edits = edits_from("d.jsonl", check=False)
    edits.check([0, 2])
    with pytest.raises(UserError, match="d.jsonl, line 2: 1.png is not an image.*and 1 more"):
        edits.check([0, 1, 3])


def test_folder_with_a_control_folder(here: Path) -> None:
    """`control/name` is the source, `name.png` the result, as trainers lay it out."""
    Path("edits/control").mkdir(parents=True)
    Path("edits/a.txt").write_text("make it blue")
    Image.new("RGB", (64, 64), "blue").save("edits/a.png")
    with pytest.raises(UserError, match="a.txt has no source image edits/control/a.png"):
        edits_from("edits")
    Image.new("RGB", (64, 96), "red").save("edits/control/a.jpg")
    edits = edits_from("edits")
    assert edits[0] == ("make it blue", here / "edits/control/a.jpg") and edits.sizes(0) == [(64, 96)]
    Path("edits/a.txt").write_text("  ")
    with pytest.raises(UserError, match="a.txt: prompt is empty"):
        edits_from("edits")


def _files(*names: str) -> None:
    """Pictures, texts and folders, by their suffix."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (64, 64)).save(path)
        elif path.suffix:
            listed = '{"file_name": "a.png", "edited_file_name": "b.png", "text": "x"}\n'
            path.write_text(listed if path.suffix == ".jsonl" else "x")
        else:
            path.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("names", "source", "target"),
    [
        (["s/control/a.png", "s/target/a.jpg", "s/target/a.txt"], "s/control/a.png", "s/target/a.jpg"),
        (["s/source/a.png", "s/edited/a.png", "s/a.txt"], "s/source/a.png", "s/edited/a.png"),
        (["s/input/a.png", "s/output/a.png", "s/input/a.txt"], "s/input/a.png", "s/output/a.png"),
        (["s/x/a.png", "s/x/a.txt", "s/masks/a.png", "s/.hidden/a.png", "s/._a.png"], "s/x/a.png", None),
        (["s/x/control/a.png", "s/x/a.png", "s/x/a.TXT"], "s/x/control/a.png", "s/x/a.png"),
        (["s/control/x/a.png", "s/x/a.png", "s/x/a.txt"], "s/control/x/a.png", "s/x/a.png"),
        (["s/metadata.jsonl", "s/a.png", "s/b.png"], "s/a.png", "s/b.png"),
    ],
)
def test_layouts_of_folders(here: Path, names: list[str], source: str, target: str | None) -> None:
    _files(*names)
    found = edits_from("s", targets=True)
    assert found[:] == [("x", Path(found[0][1]))] and found[0][1].samefile(source)
    if target:
        assert found.target(0).samefile(target)  # type: ignore[union-attr]
    assert prompts_from("s")[:] == ["x"]


def test_a_folder_with_several_sources_of_an_edit(here: Path) -> None:
    """`control/a_1.png`, `control/a_2.png`; a text of its own name keeps its own."""
    _files("s/a.txt", "s/a.png", "s/b_2.txt", "s/c.txt", *(f"s/control/{n}.png" for n in ("a_2", "a_10", "a_1", "b_2")))
    _files("s/control/c.png", "s/control/c_1.png")
    found = edits_from("s", targets=True)
    held = [["a_1", "a_2", "a_10"], ["b_2"], ["c", "c_1"]]
    files = [[Path(here, "s/control", f"{name}.png") for name in names] for names in held]
    assert [source for _, source in found] == [files[0], files[1][0], files[2]]
    assert found.target(0) == here / "s/a.png"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["s/a.png", "s/a.jpg", "s/a.txt"], "s/a.jpg and s/a.png are two files for one row"),
        (["s/control/a.png", "s/target/a.png", "s/a.png", "s/a.txt"], "s/target/a.png and s/a.png are two files"),
        (["s/control/a.png", "s/control/a.txt", "s/target/a.png", "s/target/a.txt"], "are two files for one row"),
        (["s/control/a_1.png", "s/control/a_01.png", "s/a.png", "s/a.txt"], "are two files for one row"),
        (["s/control/a_1.png", "s/control/b_1.png", "s/a.png", "s/a.txt"], "b_1.png has no instruction"),
        (["s/metadata.jsonl", "s/a.png", "s/a.txt"], "has metadata.jsonl and .txt files"),
        (["s/metadata.jsonl", "s/metadata.csv"], "has metadata.csv and metadata.jsonl"),
        (["s/train/metadata.jsonl", "s/train/a.png"], "give s/train$"),
        (["s/data.jsonl"], "has no rows: no .txt beside a picture, and no metadata.jsonl; give s/data.jsonl itself"),
        (["s/a.png"], "a.png has no instruction; write it into s/a.txt"),
        (["s/a.png", "control/a.png", "s/a.txt"], None),
    ],
)
def test_folders_that_are_refused(here: Path, names: list[str], says: str | None) -> None:
    _files(*names)
    if says is None:  # a folder of finished pictures, named without the one of their sources
        Path("s").rename("target")
        with pytest.raises(UserError, match="holds finished pictures, and their sources are in .*/control"):
            edits_from("target")
        return
    with pytest.raises(UserError, match=says):
        edits_from("s")


@pytest.mark.parametrize(("name", "texts"), [("d.txt", ("ab\nc\n", "a\nbc\n")), ("d.jsonl", ('{"prompt": "ab"}\n' * 2,
    '{"prompt": "a"}\n{"prompt": "abc"}\n'))])  # fmt: skip
def test_a_file_of_the_same_size_and_time_has_its_own_rows(here: Path, name: str, texts: tuple[str, str]) -> None:
    found = []
    for text in texts:
        Path(name).write_text(text)
        os.utime(name, (1, 1))
        found.append(prompts_from(name)[:])
    assert len(texts[0]) == len(texts[1]) and found[0] != found[1] and found[1] in (["a", "bc"], ["a", "abc"])


def test_parquet_rows_across_groups(here: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(1000)]
    parquet.write_table(arrow.table({"n": list(range(1000)), "text": texts}), "d.parquet", row_group_size=90)
    prompts = prompts_from("d.parquet")
    assert prompts[:] == texts and prompts[-1] == "row 999" and prompts.table[5] == {"n": 5, "text": "row 5"}
    with pytest.raises(IndexError):
        prompts[1000]


@pytest.mark.parametrize("cell", ["struct", "bytes", "list", "path", "no bytes"])
def test_pictures_inside_a_parquet_file(here: Path, cell: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for i in range(5):
        Image.new("RGB", (64 + i, 64), (i, 0, 0)).save(f"{i}.png")
        held = Path(f"{i}.png").read_bytes()
        kinds = {"struct": {"bytes": held, "path": "x"}, "bytes": held, "list": [held], "path": {"path": f"{i}.png"}}
        kinds["no bytes"] = {"bytes": None, "path": f"{i}.png"}  # as Hugging Face's datasets write a path
        rows.append({"image": b"finished", "input_image": kinds[cell], "instruction": f"row {i}", "noise": [0.5]})
    parquet.write_table(arrow.Table.from_pylist(rows), "d.parquet", row_group_size=2)
    found = edits_from("d.parquet")
    assert [found.sizes(i) for i in range(5)] == [[(64 + i, 64)] for i in range(5)]
    assert open_image(found[3][1]).getpixel((0, 0)) == (3, 0, 0) and found[3][0] == "row 3"
    rows[4]["input_image"] = None if cell != "list" else [held, held]
    parquet.write_table(arrow.Table.from_pylist(rows), "d.parquet", row_group_size=2)
    if cell == "list":
        assert edits_from("d.parquet")[4][1] == [held, held]
    else:
        with pytest.raises(UserError, match="row 5: input_image is empty"):
            edits_from("d.parquet")
    assert "noise" not in found.table[0]


def test_a_dataset_on_the_hub(here: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets; `pip install \"danceopd\[data\]\"`"):
        prompts_from("hub:owner/name")
    fake = ModuleType("datasets")
    fake.get_dataset_config_names = lambda name: ["small"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match="is not hub:owner/name"):
        prompts_from("hub:owner")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> None:
        asked.append((name, config, split))
        raise ConnectionError("no network")

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    for spec in ("hub:o/n", "hub:o/n:small", "hub:o/n:test", "hub:o/n:big:test[:9]"):
        with pytest.raises(UserError, match="does not load"):
            prompts_from(spec)
    assert asked[:3] == [("o/n", None, "train"), ("o/n", "small", "train"), ("o/n", None, "test")]
