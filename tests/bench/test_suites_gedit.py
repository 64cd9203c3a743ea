"""The gedit suite: reading the benchmark as people have it, asking, and what becomes of an answer."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
from PIL import Image
from suites_data import answer, gedit_rows, gedit_tree, noise, picture, write_lines

from danceopd.bench.suites import gedit, viescore
from danceopd.bench.suites.registry import load_suite
from danceopd.data.images import picture as opened
from danceopd.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")
OFFICIAL = """
_context_no_delimit = \"\"\"CONTEXT\"\"\"
_prompts_0shot_two_image_edit_rule = "PAIR"
_prompts_0shot_tie_rule_SC = "SUCCESS of <instruction>"
_prompts_0shot_rule_PQ = "QUALITY"
"""


@pytest.fixture
def data(tmp_path):
    return gedit_tree(tmp_path / "data")


def suite(data, **options):
    return load_suite("gedit", data=data, **options)


def refused(match, call, *args, **options):
    with pytest.raises(UserError, match=match) as raised:
        found = call(*args, **options)
        _ = found.items if isinstance(found, gedit.Suite) else found
    assert "\n" not in str(raised.value)


def test_items_are_the_language_s_categories_in_turn(data):
    found = suite(data).editing_items()
    assert [item.category for item in found] == list(gedit.CATEGORIES) * 2
    assert found[0].key == "en000000" and found[0].prompt == "background_change number 0"
    assert suite(data).editing_items(3) == found[:3] and suite(data).generation_items() == []
    chinese = suite(data, language="cn").editing_items()
    assert len(chinese) == 22 and chinese[0].prompt == "第0个：换掉背景" and chinese[0].key == "cn000000"
    assert {item.group for item in found if item.category.startswith("subject")} == {"local"}
    assert [item.category for item in found if item.group == "global"][:3] == [
        "background_change",
        "style_change",
        "tone_transfer",
    ]


def test_places_are_the_official_ones(data):
    item = suite(data, language="cn").editing_items()[6]
    assert suite(data, language="cn").image_path(item) == "fullset/subject-add/cn/cn060000.png"
    assert suite(data, language="cn").source_path(item) == "fullset/subject-add/cn/cn060000_SRCIMG.png"


def test_a_key_is_its_task_s_alone(data):
    """As published: one photograph, two tasks. Both are there, with the published key, each at its own place."""
    items = {item.category: item for item in suite(data).items if item.key == "en070000"}
    assert set(items) == {"subject-remove", "subject-replace"}
    assert {item.id for item in items.values()} == {"subject-remove/en070000", "subject-replace/en070000"}
    assert {suite(data).image_path(item) for item in items.values()} == {
        f"fullset/{task}/en/en070000.png" for task in items
    }
    others = [item for item in suite(data).items if item.key != "en070000"]
    assert len(others) == 20 and all(item.id == item.key for item in others)


def test_endings_in_upper_case(tmp_path):
    rows = gedit_rows(1, ["en"])[:2]
    for row, kind in zip(rows, ("PNG", "Png")):
        picture(tmp_path / f"{row['key']}_SRCIMG.{kind}", 1)
    write_lines(tmp_path / "info.jsonl", rows)
    assert [i.source.suffix for i in suite(tmp_path).items] == [".PNG", ".Png"]


def test_subsets(data, tmp_path):
    found = suite(data)
    assert found.subsets["fullset"] == tuple(gedit.CATEGORIES)
    assert set(found.subsets["paper"]) <= set(gedit.CATEGORIES) and len(found.subsets["paper"]) == 6
    assert found.subsets["intersection"] == ("tag:intersection",)
    tags = {item.key: item.tags for item in found.editing_items()}
    assert tags["en060000"] == ("en", "paper", "intersection") and tags["en040001"] == ("en",)
    unmarked = [{k: v for k, v in row.items() if k != "Intersection_exist"} for row in gedit_rows()]
    assert set(suite(gedit_tree(tmp_path / "unmarked", unmarked)).subsets) == {"fullset", "paper"}


def test_questions(data):
    """Text, source, edit; the edit at the source's size; PQ sees neither the source nor the instruction."""
    found = suite(data)
    item = found.editing_items()[0]
    edit = noise(7, (200, 100))
    sc, pq = found.questions(item, edit)
    assert (sc.aspect, pq.aspect) == ("SC", "PQ")
    text, source, seen = sc.parts
    assert item.prompt in text and "<instruction>" not in text
    assert source.tobytes() == opened(item.source).tobytes()
    assert seen.size == source.size == (96, 64)
    assert seen.tobytes() == edit.resize((96, 64), Image.Resampling.BICUBIC).tobytes()
    assert pq.parts[0] == viescore.PQ_PROMPT and pq.parts[1].tobytes() == seen.tobytes() and len(pq.parts) == 2
    assert (sc.reads.count, sc.reads.low, sc.reads.high) == (2, 0, 10)
    assert sc.facts["place"] == found.image_path(item) and len({sc.key, pq.key}) == 2


def test_a_verdict_is_the_root_of_the_lower_ones(data):
    found, item = suite(data), None
    score = found.verdict(item, {"SC": answer(8, 6), "PQ": answer(7, 9)})
    assert score.value == math.sqrt(42) and (score.sc, score.pq) == (6, 7) and not score.correct
    assert (score.success, score.over_editing, score.naturalness, score.artifacts) == (8, 6, 7, 9)
    assert found.verdict(item, {"SC": answer(10, 10), "PQ": answer(10, 10)}).correct
    assert found.verdict(item, {"SC": answer(0, 10), "PQ": answer(9, 9)}).value == 0
    recorded = found.verdict(item, {"SC": answer(4), "PQ": answer(9)})  # official files keep the lower one alone
    assert recorded.value == 6 and recorded.success is None


@pytest.mark.parametrize("status", ("unparsable", "refused", "failed", "missing"))
def test_a_lost_answer_is_no_number(data, status):
    found = suite(data).verdict(None, {"SC": answer(9, 9), "PQ": answer(status=status, reasoning="why")})
    assert found.value is None and found.status == status and "why" in found.reason
    assert suite(data).verdict(None, {"SC": answer(9, 9)}).status == "missing"
    assert suite(data).verdict(None, {"SC": answer(9, 9), "PQ": answer()}).status == "unparsable"


# -- the data as people have it ------------------------------------------------------------------------------


def encoded(seed, kind="PNG"):
    """What `datasets` keeps of a picture."""
    out = io.BytesIO()
    noise(seed).save(out, format=kind)
    return {"bytes": out.getvalue(), "path": None}


def sharded(folder, rows, kind="arrow", parts=2, pictures="PNG"):
    """`datasets.save_to_disk` (arrow) or a hub dataset's parquet, with both pictures of every row."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    both = [{"input_image": encoded(n, pictures), "input_image_raw": encoded(n + 500)} for n in range(len(rows))]
    held = [row | pair for row, pair in zip(rows, both)]
    home = folder / ("train" if kind == "arrow" else "data")
    home.mkdir(parents=True)
    names = []
    for part in range(parts):
        table = pa.Table.from_pylist(held[part::parts])
        names.append(f"{'data' if kind == 'arrow' else 'train'}-{part:05}-of-{parts:05}.{kind}")
        if kind == "arrow":
            with pa.OSFile(str(home / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table, max_chunksize=5)
        else:
            parquet.write_table(table, home / names[-1], row_group_size=5)
    if kind == "arrow":
        (home / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
        (home / "cache-0123.arrow").write_bytes(b"what a map left behind")
    return folder


@pytest.mark.parametrize("kind", ("arrow", "parquet"))
def test_shards_hold_the_same_benchmark(tmp_path, data, kind):
    rows = gedit_rows()
    found = suite(sharded(tmp_path / kind, rows, kind))
    table = suite(data)
    assert {i.id: (i.prompt, i.category, i.tags) for i in found.editing_items()} == {
        i.id: (i.prompt, i.category, i.tags) for i in table.editing_items()
    }
    for number, row in enumerate(rows):
        place = (row["task_type"], row["key"])
        item = next((i for i in found.editing_items() if (i.category, i.key) == place), None)
        if row["instruction_language"] == "en":
            assert item is not None and item.source.read_bytes() == encoded(number)["bytes"]
    again = suite(tmp_path / kind)
    before = {i.id: i.source.stat().st_mtime_ns for i in found.editing_items()}
    assert before == {i.id: i.source.stat().st_mtime_ns for i in again.editing_items()}  # written once
    assert again.rules["data"] == found.rules["data"] and again.rules["data"]["complete"] is False


def test_what_lies_beside_the_shards_is_no_data(tmp_path):
    """The hub's files without a list are all taken, but for what `datasets` cached; with a list, what it names."""
    folder = sharded(tmp_path / "data", gedit_rows(1), parts=1)
    (folder / "train/state.json").unlink()
    assert len(suite(folder).items) == 11
    shutil.copy(folder / "train/data-00000-of-00001.arrow", folder / "train/old.arrow")
    refused("repeats the key", suite, folder)
    (folder / "train/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert len(suite(folder).items) == 11
    (folder / "train/state.json").write_text("{}")
    refused("state.json does not list its shards", suite, folder)


def test_pictures_of_another_codec_become_png(tmp_path):
    found = suite(sharded(tmp_path / "jpeg", gedit_rows(1), pictures="JPEG")).editing_items()
    with Image.open(found[0].source) as image:
        assert image.format == "PNG" and image.size == (96, 64)


def test_broken_shards(tmp_path):
    whole = sharded(tmp_path / "whole", gedit_rows(1))
    lacking = shutil.copytree(whole, tmp_path / "lacking")
    (lacking / "train/data-00001-of-00002.arrow").unlink()
    refused("data-00001-of-00002.arrow is missing.*download it again", suite, lacking)
    pointer = shutil.copytree(whole, tmp_path / "pointer")
    (pointer / "train/data-00000-of-00002.arrow").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("not a readable arrow file", suite, pointer)
    hub = sharded(tmp_path / "hub", gedit_rows(1), "parquet", 3)
    (hub / "data/train-00001-of-00003.parquet").unlink()
    refused("train-00001-of-00003.parquet is missing", suite, hub)


def test_shards_whose_rows_are_faulty(tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = gedit_rows(1)
    for name, change, match in (
        ("text", {"input_image": {"bytes": b"no picture", "path": None}}, "row 3: 'input_image' is not an image"),
        ("none", {"input_image": None}, "row 3 has no image in 'input_image'"),
        ("field", {"key": None, "input_image": encoded(1)}, "row 3 has no field 'key'"),
    ):
        held = [row | {"input_image": encoded(n)} for n, row in enumerate(rows)]
        held[2] |= change
        table = pa.Table.from_pylist(held)
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
        refused(match, suite, tmp_path / f"{name}.arrow")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "file"))
    refused("cannot write .*; set DANCEOPD_CACHE", suite, sharded(tmp_path / "data", gedit_rows(1)))


def test_the_table_that_uniworld_made(tmp_path):
    """Another naming, with the language in the path."""
    held = {}
    for seed, row in enumerate(gedit_rows(1)):
        row = row | {"key": f"en{seed:06}"}  # its table has one entry for each key
        place = f"fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}"
        picture(tmp_path / f"{place}_SRCIMG.png", seed)
        held[row["key"]] = {"prompt": row["instruction"], "id": f"{place}.png", "edit_type": row["task_type"]}
    (tmp_path / "gedit_edit.json").write_text(json.dumps(held))
    found = suite(tmp_path).editing_items()
    assert [item.category for item in found] == list(gedit.CATEGORIES)
    assert found[0].source == tmp_path / "fullset/background_change/en/en000000_SRCIMG.png"


def test_a_table_may_name_its_pictures(tmp_path):
    picture(tmp_path / "photos/one.png", 1)
    rows = [gedit_rows(1)[0] | {"input_image": "photos/one.png"}]
    table = write_lines(tmp_path / "mine.jsonl", rows)
    assert suite(table).editing_items()[0].source == tmp_path / "photos/one.png"
    assert suite(tmp_path).editing_items() == suite(table).editing_items()


# -- what is wrong -------------------------------------------------------------------------------------------


def test_missing_data(tmp_path, monkeypatch):
    import huggingface_hub

    refused("nowhere does not exist; run `hf download stepfun-ai/GEdit-Bench", suite, tmp_path / "nowhere")
    refused("holds no .arrow or .parquet shards and no", suite, tmp_path)

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    advice = "hf download stepfun-ai/GEdit-Bench.*--data GEdit-Bench"
    refused(f"could not be downloaded from the hub .*{advice}", suite, None)
    assert gedit.Suite.here() is None and gedit.Suite.here(tmp_path) == tmp_path


def test_the_hub_s_copy(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "58159f3de6689982b1df7f1a6c557ded16548a24"
    snapshot = sharded(tmp_path / "snapshots" / commit, gedit_rows(1))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(snapshot))
    found = suite(None)
    assert len(found.editing_items()) == 11 and found.rules["data"]["revision"] == commit
    assert gedit.Suite.here() == snapshot


@pytest.mark.parametrize(
    "language, match", (("zh", "calls Chinese cn"), ("EN", "did you mean 'en'"), ("fr", "known: en, cn"))
)
def test_unknown_language(data, language, match):
    refused(match, suite, data, language=language)


@pytest.mark.parametrize(
    "change, match",
    (
        ({"instruction": None}, "line 3 has no field 'instruction'"),
        ({"instruction": "  "}, "line 3 holds '  ', which is not text, in 'instruction'"),
        ({"key": 7}, "line 3 holds 7, which is not text, in 'key'"),
        ({"key": "../../etc"}, "line 3: key is '../../etc', which cannot be a file name"),
        ({"task_type": "subject_add"}, "line 3 has the task_type 'subject_add'; did you mean 'subject-add'"),
        ({"instruction_language": "zh"}, "line 3 is in language 'zh'"),
        ({"Intersection_exist": "False"}, "line 3 holds 'False' in 'Intersection_exist'"),
        ({"Intersection_exist": None}, "line 3 has no field 'Intersection_exist'"),
        ({"key": "en000000"}, "line 3 repeats the key 'background_change/en000000' of .*line 1"),
        ({"key": "absent"}, "line 3: image .*absent_SRCIMG.png does not exist"),
    ),
)
def test_faulty_rows(data, change, match):
    rows = gedit_rows()
    assert rows[2]["instruction_language"] == "en"
    rows[2] |= change
    write_lines(data / "info.jsonl", rows)
    refused(match, suite, data)


def test_faulty_pictures_and_tables(data, tmp_path):
    (data / "en000001_SRCIMG.png").write_text("no picture")
    refused("line 3: .*en000001_SRCIMG.png is not an image", suite, data)
    (data / "info.jsonl").write_text('{"key": \n')
    refused("line 1 is not valid JSON", suite, data)
    (data / "info.jsonl").unlink()
    (data / "a.json").write_text('{"x": {"key": "1"}, "x": {"key": "2"}}')
    refused("a.json is not readable JSON .*'x' is there twice", suite, data)
    (data / "b.jsonl").write_text("")
    refused("holds several tables .b.jsonl, a.json.; give the path of one", suite, data)
    refused("has no row in language 'en'", suite, data / "b.jsonl")
    (data / "b.csv").write_text("")
    refused("b.csv is of an unknown kind", suite, data / "b.csv")


# -- the protocol --------------------------------------------------------------------------------------------


def test_protocol(data, tmp_path):
    """The same wherever the data lies; another for other words, another language, or another instruction."""
    moved = gedit_tree(tmp_path / "moved")
    assert suite(data).protocol == suite(moved).protocol
    (tmp_path / "vie_prompts.py").write_text(OFFICIAL)
    others = [suite(data, language="cn").protocol, suite(data, official_prompts=tmp_path).protocol]
    rows = gedit_rows()
    rows[0]["instruction"] += "!"
    others.append(suite(gedit_tree(tmp_path / "other", rows)).protocol)
    assert len({suite(data).protocol, *others}) == 4
    json.dumps(suite(data).rules)
    assert [suite(data, language=each).rules["language"] for each in gedit.LANGUAGES] == list(gedit.LANGUAGES)
    assert suite(data).rules["data"]["pictures_sha256"] == suite(moved).rules["data"]["pictures_sha256"]
    picture(moved / "en000000_SRCIMG.png", 99)
    assert suite(data).rules["data"]["pictures_sha256"] != suite(moved).rules["data"]["pictures_sha256"]


def test_official_words(data, tmp_path):
    home = tmp_path / "GEdit-Bench" / "viescore"
    home.mkdir(parents=True)
    (home / "vie_prompts.py").write_text(OFFICIAL + "raise SystemExit('this file is never run')\n")
    found = suite(data, official_prompts=tmp_path)
    item = found.editing_items()[0]
    sc, pq = found.questions(item, opened(item.source))
    assert sc.parts[0] == "CONTEXT\nPAIR\nSUCCESS of background_change number 0" and pq.parts[0] == "CONTEXT\nQUALITY"
    assert sc.max_tokens == 1400 and found.rules["prompts"]["source"] == "official"
    refused("has no vie_prompts.py; give the folder GEdit-Bench/viescore", suite, data, official_prompts=data)
    (home / "vie_prompts.py").write_text("_context_no_delimit = 'x'\n")
    refused("does not hold '_prompts_0shot_two_image_edit_rule'", suite, data, official_prompts=tmp_path)
    (home / "vie_prompts.py").write_text("def (\n")
    refused("cannot be read", suite, data, official_prompts=tmp_path)
