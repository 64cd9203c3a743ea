"""The folder suite: a user's own edits, in a table or a folder."""

from __future__ import annotations

import csv

import pytest
from suites_data import answer, noise, picture, write_lines

from danceopd.bench.generate import _ItemEdits
from danceopd.bench.suites.registry import load_suite
from danceopd.errors import UserError


def suite(data, **options):
    return load_suite("folder", data=data, **options)


def refused(match, data):
    with pytest.raises(UserError, match=match) as raised:
        _ = suite(data).items
    assert "\n" not in str(raised.value)


@pytest.fixture
def table(tmp_path):
    """Two rows with everything, one with what is needed."""
    for seed, name in enumerate(("a", "b", "a_made", "b_made", "mask")):
        picture(tmp_path / f"photos/{name}.png", seed)
    rows = [
        ("photos/a.png", "make it blue", "photos/a_made.png", "colour", "photos/mask.png", "one"),
        ("photos/b.png", "remove the cat", "photos/b_made.png", "removal", "", "two"),
        ("photos/a.png", "remove the dog", "", "", "", "three"),
    ]
    with open(tmp_path / "edits.csv", "w", newline="") as file:
        csv.writer(file).writerows([("source", "instruction", "target", "category", "mask", "key"), *rows])
    return tmp_path / "edits.csv"


def test_a_table(table):
    found = suite(table)
    one, two, three = found.editing_items()
    assert [i.category for i in (one, two, three)] == ["colour", "removal", "edits"]
    assert [i.prompt for i in (one, two, three)] == ["make it blue", "remove the cat", "remove the dog"]
    assert one.source == table.parent / "photos/a.png" and one.target == table.parent / "photos/a_made.png"
    assert one.mask == table.parent / "photos/mask.png" and two.mask is None and three.target is None
    assert found.image_path(one) == "one.png" and found.source_path(one) is None and found.generation_items() == []
    sc, _ = found.questions(three, noise(9, (200, 64)))
    assert "remove the dog" in sc.parts[0] and sc.parts[2].size == (96, 64)
    assert found.verdict(three, {"SC": answer(9, 4), "PQ": answer(9, 9)}).value == 6
    assert found.rules["data"]["items"] == 3


def test_further_sources_are_references(table):
    rows = [{"source": ["photos/a.png", "photos/b.png"], "instruction": "join them", "key": "one"}]
    (item,) = suite(write_lines(table.parent / "edits.jsonl", rows)).items
    photos = table.parent / "photos"
    assert item.source == photos / "a.png" and item.references == (photos / "b.png",)
    read = _ItemEdits([item])
    prompt, sources = read[0]
    assert prompt == "join them" and [one.size for one in sources] == list(read.shape(0)) and len(sources) == 2


def test_rows_without_keys_are_named_by_what_they_are(table):
    rows = [{"source": "photos/a.png", "instruction": f"do {n}"} for n in range(3)]
    plain = write_lines(table.parent / "edits.jsonl", rows)
    keys = {item.prompt: item.key for item in suite(plain).items}
    write_lines(plain, rows[::-1])
    assert keys == {item.prompt: item.key for item in suite(plain).items} and len(set(keys.values())) == 3
    absolute = [{"source": str(table.parent / "photos/a.png"), "instruction": "do"}]
    assert suite(write_lines(plain, absolute)).items[0].source == table.parent / "photos/a.png"


def test_a_folder(tmp_path):
    """Flat: the picture beside a text is its source."""
    for name in ("first", "second"):
        picture(tmp_path / f"{name}.jpg", 1)
        (tmp_path / f"{name}.txt").write_text(f"{name} edit\n")
    found = suite(tmp_path)
    one, two = found.editing_items()
    assert (one.key, one.prompt, one.category, one.target) == ("first", "first edit", "edits", None)
    assert one.source == tmp_path / "first.jpg" and found.image_path(two) == "second.png"


def test_a_folder_a_category_with_targets(tmp_path):
    for category in ("colour", "removal"):
        for name in ("x", "y"):
            picture(tmp_path / category / "control" / f"{name}.png", 1)
            picture(tmp_path / category / f"{name}.png", 2)
            (tmp_path / category / f"{name}.txt").write_text(f"{category} {name}")
    found = suite(tmp_path)
    items = found.editing_items()
    assert [i.key for i in items] == ["colour-x", "removal-x", "colour-y", "removal-y"]
    assert items[1].source == tmp_path / "removal/control/x.png" and items[1].target == tmp_path / "removal/x.png"
    assert found.image_path(items[1]) == "removal/x.png" and items[1].category == "removal"


def test_faults(table):
    refused("suite folder has no data; give --data", None)
    refused("absent.csv does not exist; give --data a .csv", table.parent / "absent.csv")
    (table.parent / "empty").mkdir()
    refused("empty holds no .txt instructions", table.parent / "empty")
    (table.parent / "list.txt").write_text("x")
    refused("list.txt is neither .csv nor .jsonl", table.parent / "list.txt")
    row = {"source": "photos/a.png", "instruction": "do"}
    jsonl = table.parent / "edits.jsonl"
    (table.parent / "photos/bad.png").write_text("no picture")
    for change, match in (
        ({"instruction": ""}, "line 1: instruction is empty"),
        ({"source": None}, "line 1: source is empty"),
        ({"source": "photos/absent.png"}, "line 1: image .*absent.png does not exist"),
        ({"source": "photos/bad.png"}, "line 1: .*bad.png is not an image"),
        ({"target": "photos/bad.png"}, "line 1: .*bad.png is not an image"),
        ({"mask": "photos/absent.png"}, "line 1: image .*absent.png does not exist"),
        ({"key": "a/b"}, "line 1: key is 'a/b', which cannot be a file name"),
        ({"category": "../up"}, "line 1: category is '../up'"),
    ):
        refused(match, write_lines(jsonl, [row | change]))
    refused("line 2 repeats the edit '.*' of .*line 1", write_lines(jsonl, [row, row]))
    named = [row | {"key": "k"}, row | {"key": "k", "source": "photos/b.png"}]
    refused("line 2 repeats the edit 'k'", write_lines(jsonl, named))
