"""Which column is what: published layouts are read as their sets mean them, and what cannot be told is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from danceopd.data.sources import edits_from, prompts_from
from danceopd.errors import UserError
from danceopd.recipe.parts import Columns
from danceopd.recipe.recipe import Recipe

S, T, U, TEXT = "src.png", "res.png", "third.png", "make it red"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (S, T, U):
        Image.new("RGB", (64, 64)).save(name)
    return tmp_path


def table(*rows: dict) -> str:
    """A CSV file of the rows, or JSONL where a cell is no text."""
    if all(isinstance(cell, str) for row in rows for cell in row.values()):
        with open("t.csv", "w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        return "t.csv"
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "t.jsonl"


@pytest.mark.parametrize(
    "row",
    [
        {"image": T, "edit_image": S, "prompt": TEXT},  # DiffSynth-Studio
        {"image": T, "kontext_images": S, "prompt": TEXT},
        {"image": T, "edit_image": [S], "prompt": TEXT},
        {"original_image": S, "edit_prompt": TEXT, "edited_image": T},  # InstructPix2Pix
        {"original_prompt": "a", "original_image": S, "edit_prompt": TEXT, "edited_prompt": "b", "edited_image": T},
        {"input_image": S, "edit_prompt": TEXT, "edited_image": T},
        {"source_img": S, "mask_img": U, "instruction": TEXT, "target_img": T},  # MagicBrush
        {"source_image": S, "edited_image": T, "edit_prompt": TEXT, "source_caption": "a"},  # UltraEdit
        {"input": "a red cat", "input_image": S, "edit": TEXT, "output": "a dog", "output_image": T},  # HQ-Edit
        {"edit": TEXT, "input": "a red cat", "output": "a red dog", "image_file": S, "edited_file": T},  # AnyEdit
        {"instruction": TEXT, "input_images": [S], "output_image": T},  # OmniGen
        {"instruction": TEXT, "input": [S], "output": T},
        {"image_path": T, "control_path": S, "caption": TEXT},  # musubi-tuner
        {"control_path_0": S, "control_path_1": "", "image_path": T, "caption": TEXT},
        {"image": T, "conditioning_image": S, "text": TEXT},  # ControlNet in diffusers
        {"file_name": S, "output": T, "instruction": TEXT},  # a Kontext set
        {"image": S, "edited_image": T, "prompt": TEXT},
        {"before": S, "after": T, "instruction": TEXT},
        {"inputImage": S, "outputImage": T, "prompt": TEXT},
        {"Source Image": S, "Target Image": T, "Instruction": TEXT},
        {"image": {"bytes": None, "path": S}, "target": {"bytes": None, "path": T}, "prompt": TEXT},
    ],
)
def test_published_layouts(here: Path, row: dict) -> None:
    found = edits_from(table(row, row), targets=True)
    assert found[1] == (TEXT, Path(S)) and found.target(1) == Path(T)


@pytest.mark.parametrize(
    "row",
    [
        {"image": S, "prompt": TEXT, "id": "5"},
        {"file_name": S, "mask": U, "text": TEXT},
        {"image": {"path": S}, "prompt": TEXT, "name": "0001.png", "filename": "x.png"},  # with the file's old name
    ],
)
def test_one_picture_alone_is_the_source(here: Path, row: dict) -> None:
    found = edits_from(table(row), targets=True)
    assert found[0] == (TEXT, Path(S))
    with pytest.raises(UserError, match="has no column 'target'"):
        found.target(0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": T, "style_image": S, "prompt": TEXT}, r"line 2 has several columns .*\(image, style_image\)"),
        ({"image": T, "masked_image": S, "prompt": TEXT}, r"\(image, masked_image\); name it"),
        ({"control_image": S, "source_image": U, "prompt": TEXT}, r"\(control_image, source_image\); name it"),
        ({"image": S, "image_path": T, "prompt": TEXT}, r"\(image, image_path\)"),
        ({"control_1": S, "source_1": U, "prompt": TEXT}, r"\(control_1, source_1\); name it"),
        ({"prompt": TEXT, "image": [S, ""]}, "line 1: image is empty"),
        ({"prompt": TEXT, "sources": [S, "none.png"]}, "line 1: image .*none.png does not exist"),
        ({"prompt": TEXT, "control_1": S, "control_2": "none.png"}, "none.png does not exist"),
        ({"prompt": TEXT, "images": [[S]]}, "images is a list of 1, not a path"),
        ({"prompt": TEXT, "images": []}, "images is empty"),
        ({"image": T, "edit_image": "", "prompt": TEXT}, "edit_image is empty"),
        ({"prompt": TEXT, "source": None, "image": T}, "source is empty"),
        ({"a": S, "b": T, "prompt": TEXT}, "has no column 'source'; it has: a, b, prompt"),
        ({"prompt": TEXT, "image": "https://example.org/a.png"}, "web address .* download it"),
        ({"prompt": TEXT, "image": 5}, "image is 5, not a path"),
        ({"prompt": ["a", "b"], "image": S}, "prompt is a list of 2, not text"),
        ({"prompt": TEXT, "image": "SRC.png"}, "SRC.png does not exist; did you mean 'src.png'"),
    ],
)
def test_what_cannot_be_told_is_refused(here: Path, row: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        edits_from(table(row))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["x" * 5000, "a\0b.png", "\ud800.png", "data:image/png;base64," + "iVBOR" * 9000])
def test_paths_that_are_none(here: Path, value: str) -> None:
    with pytest.raises(UserError, match="line 1: image .*(does not exist|not a path)") as caught:
        edits_from(table({"image": value, "prompt": TEXT, "n": 1}))
    assert len(str(caught.value)) < 400


def test_a_row_of_a_drawing_among_edits_is_no_edit(here: Path) -> None:
    """DiffSynth-Studio mixes both: a row without `edit_image` has only its finished picture."""
    spec = table({"image": T, "edit_image": S, "prompt": TEXT, "n": 1}, {"image": U, "prompt": "a fox", "n": 2})
    with pytest.raises(UserError, match="line 2 has no source: its image is the finished picture in other rows"):
        edits_from(spec)
    assert prompts_from(spec, targets=True).target(0) == Path(T)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TEXT, "image": [S, U]},
        {"prompt": TEXT, "images": f'["{S}", "{U}"]'},
        {"instruction": TEXT, "input_images": [S, {"path": U}], "output_image": T},
        {"control_path_2": U, "control_path_1": S, "control_path_3": "", "image": T, "prompt": TEXT},
        {"source": [S, U], "target": [T], "prompt": TEXT},
    ],
)
def test_several_sources_of_one_edit_in_their_order(here: Path, row: dict, caplog) -> None:
    found = edits_from(table(row, row), targets=True)
    assert found[1] == (TEXT, [Path(S), Path(U)]) and found.sizes(0) == [(64, 64)] * 2
    assert "target" not in str(row) and "output" not in str(row) or found.target(0) == Path(T)
    if "images" in row:
        edits_from(table(row), columns=Columns(source="images"))
    several = edits_from(table({"source": S, "target": [S, T], "prompt": TEXT}), targets=True)
    with pytest.raises(UserError, match="has 2 finished pictures, where one is wanted"):
        several.target(0)
    named = edits_from(table({"a": [S, U], "b": T, "words": TEXT}), columns=Columns(source="a", instruction="words"))
    assert named[0] == (TEXT, [Path(S), Path(U)])


def test_a_short_csv_row_lacks_its_source(here: Path) -> None:
    Path("t.csv").write_text(f"image,prompt,edit_image\n{T},{TEXT}\n")
    with pytest.raises(UserError, match="line 2: edit_image is empty"):
        edits_from("t.csv")


def test_the_recipe_says_what_the_columns_are(here: Path) -> None:
    spec = table({"image": T, "style_image": S, "words": TEXT})
    found = edits_from(spec, targets=True, columns=Columns(source="style_image", instruction="words"))
    assert found[0] == (TEXT, Path(S)) and found.target(0) == Path(T)
    found = edits_from(spec, targets=True, columns=Columns(source="image", target="style_image", prompt="words"))
    assert found[0] == (TEXT, Path(T)) and found.target(0) == Path(S)
    with pytest.raises(UserError, match="t.csv has no column 'sorce', which columns.source names; it has: image"):
        edits_from(spec, columns=Columns(source="sorce"))
    lines = table({"words": "a fox", "n": 1}, {"word": "a dog", "n": 2})
    assert prompts_from(lines, check=False, columns=Columns(prompt="words"))[0] == "a fox"
    with pytest.raises(UserError, match="t.jsonl, line 2 has no column 'words', which columns.prompt names"):
        prompts_from(lines, columns=Columns(prompt="words"))


def test_columns_in_a_recipe(here: Path) -> None:
    from danceopd.data.dataset import open_datasets

    spec = table({"image": T, "style_image": S, "words": TEXT})
    Path("p.txt").write_text("a fox\n")
    data = {"generation": "p.txt", "editing": spec, "columns": {"source": "style_image", "prompt": "words"}}
    recipe = Recipe(data=data, steps=1)
    assert Recipe(**recipe.resolved()) == recipe
    assert open_datasets(recipe)["editing"].data[0] == (TEXT, Path(spec).parent.absolute() / S)
    own = {"name": "mine", "adapter": "editing", "capability": "editing", "data": spec}
    draws = {"name": "draws", "adapter": "generation", "capability": "generation"}
    named = {"columns": {"source": "image", "instruction": "words"}}
    opened = open_datasets(Recipe(teachers=[own | named, draws], data={"generation": "p.txt"}, steps=1))
    assert opened["mine"].data[0][1].name == T  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match="data.columns is set, and every teacher has its own"):
        drawn = draws | {"data": spec, "columns": {"prompt": "words"}}
        open_datasets(Recipe(teachers=[own, drawn], data=data, steps=1))
    with pytest.raises(UserError, match="none of the data is a table"):
        open_datasets(Recipe(data={"generation": "p.txt", "columns": {"prompt": "words"}}, steps=1))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"source": "a", "target": "a"}, "'a' is named twice"),
        ({"sorce": "a"}, "unknown key 'teachers.1.columns.sorce'.*did you mean 'source'"),
        ({"source": ""}, "columns.source is ''"),
        ({"source": 5}, "columns.source is 5"),
        ("image", "must be a mapping"),
    ],
)
def test_columns_that_are_refused_in_a_recipe(columns: object, says: str) -> None:
    one = {"name": "e", "adapter": "editing", "capability": "editing", "columns": columns}
    with pytest.raises(UserError, match=says):
        Recipe(teachers=[{"name": "g", "adapter": "generation", "capability": "generation"}, one])
    draws = {"name": "g", "adapter": "generation", "capability": "generation", "columns": {"source": "a"}}
    with pytest.raises(UserError, match="columns.source has no meaning"):
        Recipe(teachers=[draws, {**one, "columns": None}])
