"""The imgedit suite: its data out of the benchmark's tar, nine rubrics, three numbers."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest
from suites_data import answer, imgedit_tree, noise, write_lines

from danceopd.bench.suites import imgedit, imgedit_rubrics
from danceopd.bench.suites.registry import load_suite
from danceopd.data.images import picture
from danceopd.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def data(tmp_path):
    return imgedit_tree(tmp_path / "data")


def suite(data, **options):
    return load_suite("imgedit", data=data, **options)


def refused(match, data, **options):
    with pytest.raises(UserError, match=match) as raised:
        _ = suite(data, **options).items
    assert "\n" not in str(raised.value)


def test_items(data):
    found = suite(data)
    items = found.editing_items()
    assert [item.category for item in items] == list(imgedit.CATEGORIES) * 2
    assert items[0].prompt == "add the animal" and found.image_path(items[1]) == "10.png"
    assert items[1].source == data / "Benchmark/singleturn/animal/000000010.jpg"
    assert found.source_path(items[0]) is None and found.scale == {"editing": (1.0, 5.0)}
    assert found.rules["data"]["items"] == 18 and found.rules["data"]["complete"] is False


def test_the_first_published_table_says_alter(data, tmp_path):
    older = imgedit_tree(tmp_path / "older", adjust="alter")
    assert suite(older).protocol == suite(data).protocol and suite(older).items[2].category == "adjust"
    words = {("alter" if kind == "adjust" else kind): f"grade {kind}" for kind in imgedit.CATEGORIES}
    (tmp_path / "prompts.json").write_text(json.dumps(words))
    assert suite(older, official_prompts=tmp_path).official["adjust"] == "grade adjust"


def test_endings_in_upper_case(data):
    home = data / "Benchmark" / "singleturn"
    for file in sorted((home / "animal").iterdir()):
        file.rename(file.with_suffix(".JPG"))
    assert suite(data).items[0].source == home / "animal/000000000.JPG"
    (home / "singleturn.json").rename(data / "basic_edit.json")
    assert suite(data).items[0].source == home / "animal/000000000.JPG"


def test_the_table_may_lie_elsewhere(data, tmp_path):
    """`basic_edit.json` of the official code beside the unpacked pictures, or named itself."""
    home = data / "Benchmark" / "singleturn"
    moved = (home / "singleturn.json").rename(data / "basic_edit.json")
    found = suite(data).editing_items()
    assert found == suite(moved).editing_items() == suite(data).editing_items(18)
    assert found[0].source == home / "animal/000000000.jpg"
    moved.rename(home / "singleturn.json")
    assert suite(home).protocol == suite(data).protocol


def test_the_hub_s_tar_is_unpacked_once(data, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (data / "Benchmark" / "hard").mkdir()
    shutil.copy(data / "Benchmark/singleturn/animal/000000000.jpg", data / "Benchmark/hard/1.jpg")
    with tarfile.open(snapshot / "Benchmark.tar", "w") as tar:
        tar.add(data / "Benchmark", "Benchmark")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(snapshot))
    found = suite(None)
    assert len(found.editing_items()) == 18 and found.rules["data"]["revision"] == "abc"
    assert found.rules["data"]["pictures_sha256"] == suite(data).rules["data"]["pictures_sha256"]
    assert not list((tmp_path / "cache").rglob("hard"))
    (unpacked,) = (tmp_path / "cache/suites/imgedit").iterdir()  # and no half of one beside it
    (unpacked / "mark").touch()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert suite(None).editing_items() == found.editing_items() and (unpacked / "mark").exists()
    (snapshot / "Benchmark.tar").write_bytes(b"no tar")
    refused("Benchmark.tar cannot be unpacked", None)


def test_every_kind_has_its_rubric(data):
    found = suite(data)
    texts = {}
    for item in found.editing_items(9):
        (question,) = found.questions(item, noise(1, (70, 64)))
        text, source, edit = question.parts
        texts[item.category] = text
        assert item.prompt in text and "<edit_prompt>" not in text
        assert source.tobytes() == picture(item.source).tobytes() and edit.size == (70, 64)  # nothing is resized
        assert (question.reads.count, question.reads.low, question.reads.high) == (3, 1, 5)
        for name in (scale.name for scale in imgedit_rubrics.RUBRICS[item.category].scales):
            assert name in text
    assert len(set(texts.values())) == 9 == len(imgedit_rubrics.RUBRICS)


def test_verdict(data):
    found = suite(data)
    score = found.verdict(None, {"score": answer(5, 4, 4)})
    assert score.value == 4.33 and (score.adherence, score.quality, score.preservation) == (5, 4, 4)
    assert found.verdict(None, {"score": answer(1, 5, 5)}).value == 3.67  # as answered: nothing is clamped
    assert found.verdict(None, {"score": answer(5, 5, 5)}).correct and not score.correct
    lost = found.verdict(None, {"score": answer(status="refused")})
    assert lost.value is None and lost.status == "refused" and lost.adherence is None


def test_official_words(data, tmp_path):
    words = {kind: f"grade this {kind}: <edit_prompt>." for kind in imgedit.CATEGORIES}
    (tmp_path / "prompts.json").write_text(json.dumps(words))
    found = suite(data, official_prompts=tmp_path)
    (question,) = found.questions(found.editing_items()[2], noise(1))
    assert question.parts[0] == "grade this extract: extract the animal."
    assert found.rules["prompts"]["source"] == "official" and found.protocol != suite(data).protocol
    refused("has no prompts.json; give the folder Benchmark/Basic", data, official_prompts=data)
    (tmp_path / "prompts.json").write_text(json.dumps({"add": "x"}))
    refused("has no prompt for 'adjust'", data, official_prompts=tmp_path)
    (tmp_path / "prompts.json").write_text("[")
    refused("prompts.json cannot be read", data, official_prompts=tmp_path)


def test_missing_data(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("could not be downloaded .*hf download sysuyy/ImgEdit Benchmark.tar", None)
    refused("nowhere does not exist; run `hf download", tmp_path / "nowhere")
    refused("holds neither basic_edit.json nor singleturn.json; run `hf download", tmp_path)


@pytest.mark.parametrize(
    "change, match",
    (
        ({"prompt": None}, "entry 0 has no field 'prompt'"),
        ({"id": None}, "entry 0 has no field 'id'"),
        ({"edit_type": "adding"}, "entry 0 has the edit_type 'adding'; did you mean 'add'"),
        ({"id": "animal/absent.jpg"}, "source image animal/absent.jpg is not below"),
        ({"id": "broken.jpg"}, "broken.jpg is not an image"),
    ),
)
def test_faulty_records(data, change, match):
    table = data / "Benchmark/singleturn/singleturn.json"
    (table.parent / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    rows = json.loads(table.read_text())
    rows["0"] |= change
    table.write_text(json.dumps(rows))
    refused(match, data)


def test_keys_that_stand_twice(data):
    table = data / "Benchmark/singleturn/singleturn.json"
    text = table.read_text()
    table.write_text(text[:-1] + ", " + text[1:])
    refused("'0' is there twice", data)
    rows = [{"key": "1", "id": "animal/000000000.jpg", "prompt": "p", "edit_type": "add"}] * 2
    refused("line 2 repeats the key '1' of .*line 1", write_lines(table.with_suffix(".jsonl"), rows))
    table.write_text("{}")
    refused("has no entries", data)
