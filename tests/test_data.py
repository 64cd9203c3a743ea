"""Sources of work: what each kind gives, and that every fault names its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from danceopd.data import edits_from, open_image, prompts_from
from danceopd.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 80), "red").save("red.png")
    return tmp_path


def test_scenes_are_drawn_by_seed() -> None:
    prompts = prompts_from("scenes", rows=12, seed=1)
    assert len(prompts) == 12 and all(prompts)
    assert prompts == prompts_from("scenes", rows=12, seed=1) != prompts_from("scenes", rows=12, seed=2)
    pairs = edits_from("scenes", rows=6, seed=1)
    assert len(pairs) == 6 and {image.size for _, image in pairs} == {(64, 64)}  # type: ignore[union-attr]


def test_scenes_of_some_tasks_only() -> None:
    assert all("photo of" in p for p in prompts_from("scenes:counting", rows=4))
    words = [instruction for instruction, _ in edits_from("scenes:background_change", rows=6)]
    assert all("background" in w or w.startswith("put") for w in words)
    assert len(edits_from("scenes:local", rows=5)) == 5
    with pytest.raises(UserError, match="the task 'locl', which is none; did you mean 'local'"):
        edits_from("scenes:locl")


def test_text_file(here: Path) -> None:
    Path("p.txt").write_text("a fox\n  a dog \n\n", encoding="utf-8-sig")
    assert prompts_from("p.txt") == ["a fox", "a dog"]
    Path("p.txt").write_text("a fox\n\na dog\n")
    with pytest.raises(UserError, match="p.txt, line 2: prompt is empty"):
        prompts_from("p.txt")
    with pytest.raises(UserError, match="edits need a source image each"):
        edits_from("p.txt")


def test_csv(here: Path) -> None:
    Path("d.csv").write_text('instruction,image\n"make it blue, please",red.png\n')
    assert edits_from("d.csv") == [("make it blue, please", Path("red.png"))]
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
    assert [words for words, _ in edits_from("d.jsonl")] == ["make it blue", "remove it"]
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
    assert prompts_from("d.parquet") == ["a fox"]


def test_folder(here: Path) -> None:
    Path("red.txt").write_text("make it blue\n")
    assert edits_from(".") == [("make it blue", here / "red.png")]
    assert prompts_from(".") == ["make it blue"]
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
    with pytest.raises(UserError, match="p.txt is not text in UTF-8"):
        prompts_from("p.txt")


def _alpha(path: Path) -> None:
    Image.new("RGBA", (64, 64)).save(path)


def _palette_alpha(path: Path) -> None:
    Image.new("P", (64, 64)).save(path, transparency=0)


def _cut(path: Path) -> None:
    Image.effect_noise((96, 96), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("make", "words", "at_once"),
    [
        (lambda path: path.write_text("hello"), "is not an image", True),
        (lambda path: path.write_bytes(b""), "is not an image", True),
        (lambda path: path.mkdir(), "is not an image", True),
        (lambda path: None, "does not exist", True),
        (_alpha, "has an alpha channel", True),
        (_palette_alpha, "has an alpha channel", True),
        (lambda path: Image.new("RGB", (63, 200)).save(path), "is 63x200 pixels, too small", True),
        (_cut, "is a damaged image", False),
    ],
)
def test_bad_images(here: Path, make, words: str, at_once: bool) -> None:
    make(here / "bad.png")
    Path("d.csv").write_text("instruction,image\nmake it blue,bad.png\n")
    with pytest.raises(UserError, match=words):
        open_image(Path("bad.png"))
    if at_once:
        with pytest.raises(UserError, match=f"d.csv, line 2: .*{words}"):
            edits_from("d.csv")


def test_open_image_is_upright_rgb(here: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (80, 64)).save("turned.jpg", exif=exif)
    image = open_image(Path("turned.jpg"))
    assert (image.mode, image.size) == ("RGB", (64, 80))
    with pytest.raises(UserError, match="alpha"):
        open_image(Image.new("RGBA", (64, 64)))
