"""The geneval suite: the official records, its result tree, and three kinds of checkers."""

from __future__ import annotations

import json

import pytest
from suites_data import answer, geneval_records, noise, write_lines

from danceopd.bench.suites import geneval
from danceopd.bench.suites.registry import load_suite
from danceopd.errors import UserError


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "geneval/prompts/evaluation_metadata.jsonl", geneval_records(2)).parents[1]


def refused(match, data):
    with pytest.raises(UserError, match=match) as raised:
        _ = load_suite("geneval", data=data).items
    assert "\n" not in str(raised.value)


def test_items_are_every_prompt_s_first_sample_then_the_second(data):
    found = geneval.Suite(data)
    items = found.generation_items()
    assert len(items) == 12 * geneval.SAMPLES and found.editing_items() == []
    assert [item.category for item in items[:12]] == list(geneval.CATEGORIES) * 2
    assert [item.key for item in items[:2]] == ["00000-0", "00001-0"]
    assert {item.task["sample"] for item in found.generation_items(12)} == {0}
    assert {item.prompt for item in items[:12]} == {record["prompt"] for record in geneval_records(2)}
    one = geneval.Suite(data, samples=1)
    assert len(one.generation_items()) == 12 and one.protocol != found.protocol
    with pytest.raises(UserError, match="give 1 or more"):
        geneval.Suite(data, samples=0)


def test_the_official_tree(data, tmp_path):
    """Places, the record beside them, and a result tree as the source of its own prompts."""
    found = geneval.Suite(data, samples=2)
    item = next(i for i in found.items if i.key == "00011-1")
    assert found.image_path(item) == "00011/samples/0001.png"
    assert found.image_paths(item) == ("00011/samples/0001.png", "00011/samples/00001.png")
    for each in found.items:
        for path, text in found.extra_files(each).items():
            (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / path).write_text(text)
    tree = geneval.Suite(tmp_path / "tree", samples=2)
    assert tree.protocol == found.protocol and tree.generation_items() == found.generation_items()
    part = json.loads((tmp_path / "tree/00003/metadata.jsonl").read_text())
    assert part == geneval_records(2)[3]
    for number in range(12):
        if number != 3:
            (tmp_path / f"tree/{number:05}/metadata.jsonl").unlink()
    (only,) = geneval.Suite(tmp_path / "tree", samples=1).items
    assert only.key == "00003-0" and found.image_path(only) == "00003/samples/0000.png"
    write_lines(tmp_path / "tree/00003/metadata.jsonl", [part, part])
    refused("holds 2 records", tmp_path / "tree")


def test_a_question_serves_models_and_programs(data):
    found = geneval.Suite(data)
    image = noise(3, (64, 64))
    asked = {item.category: found.questions(item, image) for item in found.generation_items(6)}
    (position,) = asked["position"]
    text, seen = position.parts
    assert "The dog is left of the bench." in text and seen.tobytes() == image.tobytes()
    assert position.reads.choices == ("correct", "incorrect")
    assert position.facts["metadata"] == geneval_records(1)[4] and position.facts["place"] == "00004/samples/0000.png"
    assert "at least 2 bench" in asked["counting"][0].parts[0]
    assert "does not show 3 or more bench" in asked["counting"][0].parts[0]
    assert "at least 1 red bench" in asked["color_attr"][0].parts[0]
    assert "at least 1 blue dog" in asked["color_attr"][0].parts[0]
    json.dumps(position.facts)


def test_verdict(data):
    found = geneval.Suite(data)
    right, wrong = (found.verdict(None, {"correct": answer(choice=c)}) for c in ("correct", "incorrect"))
    assert (right.value, right.correct, wrong.value, wrong.correct) == (1.0, True, 0.0, False)
    lost = found.verdict(None, {"correct": answer(status="failed", reasoning="no detector")})
    assert lost.value is None and lost.status == "failed" and "no detector" in lost.reason
    assert found.share == {"generation": True} and found.scale == {"generation": (0.0, 1.0)}


def test_missing_data(tmp_path):
    refused("git clone https://github.com/djghosh13/geneval", None)
    refused("absent does not exist; run `git clone", tmp_path / "absent")
    refused("holds no .arrow or .parquet shards", tmp_path)
    assert geneval.Suite.here() is None and geneval.Suite.here(tmp_path) == tmp_path
    with pytest.raises(UserError, match="suite geneval takes no --language"):
        load_suite("geneval", data=tmp_path, language="en")


@pytest.mark.parametrize(
    "change, match",
    (
        ({"tag": None}, "line 5 has no field 'tag'"),
        ({"tag": "color"}, "line 5 has the tag 'color'; did you mean 'colors'"),
        ({"prompt": ""}, "line 5 holds '', which is not text, in 'prompt'"),
        ({"include": []}, "line 5 has no list 'include'"),
        ({"include": None}, "line 5 has no list 'include'"),
        ({"include": [{"class": "dog"}]}, "line 5 has a clause without 'class' and 'count'"),
        ({"include": [{"class": "dog", "count": 0}]}, "line 5 has a clause without 'class' and 'count'"),
        ({"exclude": ["dog"]}, "line 5 has a clause without 'class' and 'count'"),
        ({"include": [{"class": "dog", "count": 1, "color": "grey"}]}, "line 5 has the colour 'grey'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "line 5 has the position"),
        ({"prompt": "a photo of a bench"}, "line 5 repeats the prompt 'a photo of a bench' of .*line 1"),
    ),
)
def test_faulty_records(data, change, match):
    rows = geneval_records(2)
    rows[4] |= change
    write_lines(data / "prompts/evaluation_metadata.jsonl", rows)
    refused(match, data)
