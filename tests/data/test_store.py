"""The store of encoded rows, and the encoder that fills it: rows are found by content, shared, and checked."""

from __future__ import annotations

import csv
import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from safetensors.torch import save_file
from tiny import CALL, random_image, tiny_klein

from danceopd.common.cache import cache_key, check_cache
from danceopd.data.dataset import open_datasets, sampled_rows
from danceopd.data.encode import Encoder, encoders_fingerprint, free_encoders
from danceopd.data.routing import sample_batch
from danceopd.data.sources import Edits, edits_from, prompts_from
from danceopd.data.store import Store, missing
from danceopd.errors import UserError
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.sampling import Sampling

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_klein(folder)
    return folder


def encoder(base: Path, cache: Path) -> Encoder:
    pipe = tiny_klein()
    family = family_of(pipe)
    draw = {"generation": GenerationPipeline(pipe, family, CALL), "editing": EditingPipeline(pipe, family, CALL)}
    return Encoder(base, family, draw, cache=cache)


def equal(a: Any, b: Any) -> bool:
    one, other = a.state(), b.state()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def row(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(3, 5, generator=generator), "half": torch.ones(2).bfloat16(), "none": torch.zeros(0)}


def test_rows_come_back_from_another_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.add() as add:
        for seed in range(5):
            add(cache_key(seed), row(seed))
        add(cache_key(0), row(9))  # there already
    again = Store(tmp_path)
    assert len(again) == 5 and missing(again, [cache_key(i) for i in (7, 4, 7)]) == [cache_key(7)]
    for seed in range(5):
        found = again.row(cache_key(seed))
        assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in row(seed).items())
    with pytest.raises(KeyError):
        again.row(cache_key(7))


@pytest.mark.parametrize("harmed", [0, 1, 2])
def test_a_flipped_bit_costs_its_row_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, harmed: int) -> None:
    """Rows of the same shard, read before or after, by this teacher or another, stay where they are."""
    keys = [cache_key(seed) for seed in range(3)]
    with Store(tmp_path).add() as add:
        for seed, key in enumerate(keys):
            add(key, row(seed))
    (shard,) = tmp_path.iterdir()
    content = bytearray(shard.read_bytes())
    content[content.index(row(harmed)["x"].numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    store = Store(tmp_path)
    with caplog.at_level(logging.WARNING, "danceopd"):
        assert missing(store, keys) == [keys[harmed]] and missing(store, keys) == [keys[harmed]]
    assert len(caplog.records) == 1 and "its rows are encoded again" in caplog.text
    for _ in range(2):
        with store.add() as add:
            add(keys[harmed], row(harmed))
        assert not missing(store, keys)
        for seed, key in enumerate(keys):
            assert torch.equal(store.row(key)["x"], row(seed)["x"])
        store = Store(tmp_path)  # the mended row wins over the damaged one


@pytest.mark.parametrize(
    "rows", ["[]", "5", "null", "{", "[" * 9999, '{"a": null}', '{"a": "x"}', '{"a": {}}', '{"a": [1]}', '{"a": 1e999}']
)
def test_shards_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: str) -> None:
    save_file({"a/x": torch.zeros(3)}, tmp_path / "0.safetensors", metadata={"rows": rows})
    with caplog.at_level(logging.WARNING, "danceopd"):
        assert not Store(tmp_path) and not list(tmp_path.iterdir())
    assert len(caplog.records) == 1


def test_rows_of_another_version_are_encoded_again(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sound by their checksums, and no conditions: other names of tensors."""
    (tmp_path / "p.txt").write_text("a red circle\na blue star\n")
    data = prompts_from(tmp_path / "p.txt")
    coder = encoder(base, tmp_path / "cache")
    first = coder.encode("generation", data, [0, 1], STEPS)
    for file in coder.store.folder.iterdir():
        file.unlink()
    foreign = Store(coder.store.folder)
    with foreign.add() as add:
        for key in first._keys.values():
            add(key, {"prompt": torch.zeros(3)})
    with caplog.at_level(logging.WARNING, "danceopd"):
        again = encoder(base, tmp_path / "cache").encode("generation", data, [0, 1], STEPS)
    assert equal(again.rows([0, 1]), first.rows([0, 1])) and len(caplog.records) == 1


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign"])
def test_damage_is_found_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    for seed in range(2):  # a shard each
        with Store(tmp_path).add() as add:
            add(cache_key(seed), row(seed))
    shard = next(p for p in tmp_path.iterdir() if cache_key(1)[:8] in p.name)
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    harms = {"cut": bytes(content[:-8]), "flip": bytes(content), "empty": b"", "foreign": b"text" * 99}
    shard.write_bytes(harms[harm])
    with caplog.at_level(logging.WARNING, "danceopd"):
        store = Store(tmp_path)
        assert missing(store, [cache_key(0), cache_key(1)]) == [cache_key(1)]
    assert f"{shard} is damaged" in caplog.text and not shard.exists()
    with store.add() as add:
        add(cache_key(1), row(1))
    assert torch.equal(store.row(cache_key(1))["x"], row(1)["x"])


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Three write overlapping rows at the same time; all rows are there and whole."""
    code = (
        "import sys, torch; from pathlib import Path; from danceopd.data.store import Store\n"
        "from danceopd.common.cache import cache_key\n"
        "store, mine = Store(Path(sys.argv[1])), int(sys.argv[2])\n"
        "for seed in range(mine, mine + 20):\n"
        "    with store.add() as add: add(cache_key(seed), {'x': torch.full((4,), float(seed))})\n"
    )
    workers = [program.python(code, tmp_path, n) for n in (0, 10, 20)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0], [worker.stderr for worker in workers]
    store = Store(tmp_path)
    assert len(store) == 40 and not missing(store, map(cache_key, range(40)))
    assert all(store.row(cache_key(seed))["x"].tolist() == [seed] * 4 for seed in range(40))
    assert not list(tmp_path.glob(".*"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    add = Store(tmp_path / "file" / "cache").add()
    add(cache_key(0), row(0))
    with pytest.raises(UserError, match="cannot be written .*set DANCEOPD_CACHE to another folder"):
        add.flush()


def test_a_read_only_cache_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are found, and new ones are kept for as long as the process lives."""
    with Store(tmp_path).add() as add:
        add(cache_key(0), row(0))
    touch = Path.touch

    def read_only(self: Path, *how: object) -> None:
        if self.parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        touch(self)

    monkeypatch.setattr(Path, "touch", read_only)
    store = Store(tmp_path)
    with caplog.at_level(logging.WARNING, "danceopd"):
        for seed in range(3):
            with store.add() as add:
                add(cache_key(seed), row(seed))
    assert not missing(store, map(cache_key, range(3))) and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(store.row(cache_key(2))["x"], row(2)["x"])
    assert len(caplog.records) == 1 and f"the cache {tmp_path} is read-only" in caplog.text


def test_a_cache_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="DANCEOPD_CACHE .* cannot be used: Not a directory"):
        check_cache()
    monkeypatch.setenv("DANCEOPD_CACHE", "~nosuchuser/cache")
    with pytest.raises(UserError, match="DANCEOPD_CACHE .* is not known"):
        check_cache()


def test_the_dataset_holds_the_pipelines_own_conditions(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue star\nthe green ring on the left\n")
    data, coder = prompts_from(tmp_path / "p.txt"), encoder(base, tmp_path / "cache")
    dataset = coder.encode("generation", data, [0, 2], STEPS)
    direct = coder.pipelines["generation"].conditions(data[:])
    assert len(dataset) == 3 and equal(dataset.rows([2, 0, 2]), direct.rows([2, 0, 2]))
    assert dataset.layout(0) == direct.layout and dataset.layout(1) is None  # never used, never encoded
    stock = GenerationPipeline(tiny_klein(), coder.family, {**CALL, "steps": STEPS})
    assert torch.equal(dataset.sigmas(0), stock.sigmas())
    with pytest.raises(KeyError):
        dataset.rows([1])


def test_edits_keep_their_shape_and_share_a_batch_by_size(base: Path, tmp_path: Path) -> None:
    """Each source at the stock pipeline's own size for it, with the schedule of that size."""
    sizes = [(64, 64), (96, 64), (64, 64), (80, 144)]
    with open(tmp_path / "e.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "image"), *(("make it red", f"{i}.png") for i in range(4))])
    for i, (width, height) in enumerate(sizes):
        random_image(i, width, height).save(tmp_path / f"{i}.png")
    data, coder = edits_from(tmp_path / "e.csv"), encoder(base, tmp_path / "cache")
    larger = {**CALL, "height": 128, "width": 128}
    coder.pipelines = {k: type(p)(p.pipe, p.family, larger) for k, p in coder.pipelines.items()}
    dataset = coder.encode("editing", data, range(4), STEPS)
    assert [dataset.size(i) for i in range(4)] == [(64, 64), (64, 96), (64, 64), (144, 80)]
    assert dataset.layout(0) == dataset.layout(2) and len({dataset.layout(i) for i in range(4)}) == 3
    assert isinstance(data, Edits)
    for i, (height, width) in ((1, (64, 96)), (3, (144, 80))):
        stock = EditingPipeline(tiny_klein(), coder.family, {**CALL, "height": height, "width": width, "steps": STEPS})
        assert equal(dataset.rows([i]), stock.conditions(["make it red"], [random_image(i, *sizes[i])]))
        assert torch.equal(dataset.sigmas(i), stock.sigmas())
    assert dataset.sigmas(0).tolist() != dataset.sigmas(3).tolist()  # the shift depends on the size
    assert len(dataset.rows([0, 2])) == 2


def test_equal_rows_are_encoded_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run, table, order and encoder object: equal content is found; another prompt or setting is not."""
    (tmp_path / "p.txt").write_text("a red circle\na blue star\n")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a green ring"}\n{"caption": "a blue star"}\n')
    first = encoder(base, tmp_path).encode("generation", prompts_from(tmp_path / "p.txt"), [0, 1], STEPS)
    coder, asked = encoder(base, tmp_path), []
    real = GenerationPipeline.conditions
    monkeypatch.setattr(GenerationPipeline, "conditions", lambda self, p: asked.append(list(p)) or real(self, p))
    second = coder.encode("generation", prompts_from(tmp_path / "q.jsonl"), [0, 1], 9)
    assert asked == [["a green ring"]] and equal(second.rows([1]), first.rows([1]))
    longer = {**CALL, "max_sequence_length": 30}
    coder.pipelines["generation"] = GenerationPipeline(coder.pipelines["generation"].pipe, coder.family, longer)
    coder.encode("generation", prompts_from(tmp_path / "q.jsonl"), [1], 9)
    assert asked[1:] == [["a blue star"]]


def test_fingerprint_is_of_what_encodes(base: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert encoders_fingerprint(other) == encoders_fingerprint(base)
    for name, changes in (("transformer", False), ("text_encoder", True), ("vae", True)):
        weights = next((other / name).glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        assert (encoders_fingerprint(other) != encoders_fingerprint(base)) == changes, name
        shutil.copy(next((base / name).glob("*.safetensors")), weights)


def test_without_text_encoders_the_rest_still_generates(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    coder = encoder(base, tmp_path)
    pipe = coder.pipelines["generation"].pipe
    dataset = coder.encode("generation", prompts_from(tmp_path / "p.txt"), [0], STEPS)
    before = coder.pipelines["generation"].noise([3])
    free_encoders(coder, pipe)
    assert all(d.pipe.text_encoder is None for d in coder.pipelines.values()) and pipe.text_encoder is None
    pipeline = coder.sized("generation", (64, 64))
    assert torch.equal(pipeline.noise([3]), before)
    assert torch.equal(pipeline.sigmas(), coder.pipelines["editing"].sigmas())
    velocity = lambda x, s, c: coder.family.velocity(pipe.transformer, x, s, c)  # noqa: E731
    with torch.no_grad():
        *_, last = pipeline.denoise(dataset.rows([0]), before, velocity)
    assert pipeline.images(last.x)[0].size == (64, 64)


def test_the_sampled_rows_are_those_of_the_steps(files: dict[str, str], tmp_path: Path) -> None:
    Path("p.txt").write_text("".join(f"a red circle {i}\n" for i in range(200)))
    recipe = Recipe(**files, steps=7, batch=6, seed=3, data={"generation": "p.txt", "editing": "scenes"})
    asked = open_datasets(recipe)
    lengths = [len(asked[t.name].data) for t in recipe.teachers]
    seen: list[set[int]] = [set(range(4)), set(range(4))]
    for step in range(7):
        for teacher, sampled in zip(*sample_batch(Sampling(3, 7, 6, (0.5, 0.5)), step, lengths)):
            seen[teacher].add(sampled)
    assert [set(asked[t.name].rows) for t in recipe.teachers] == seen == sampled_rows(recipe.sampling, lengths)
    assert lengths == [200, 1024] and 4 < len(seen[0]) < 30
    Path("p.txt").write_text("a red circle\n\na blue star\n")
    with pytest.raises(UserError, match="p.txt, line 2: prompt is empty"):
        open_datasets(recipe)


def test_all_rows_are_wanted_where_updates_draw_them_many_times_over() -> None:
    """However many updates there are, nothing is counted then; and it is what counting them would find."""
    began = time.monotonic()
    assert sampled_rows(Sampling(0, 10**7, 8, (0.5, 0.5)), [1000, 2000]) == [set(range(1000)), set(range(2000))]
    assert time.monotonic() - began < 1
    few = Sampling(0, 200, 8, (0.5, 0.5))
    counted = [set(range(4)), set(range(4))]
    for step in range(few.steps):
        for teacher, row in zip(*sample_batch(few, step, [20, 5000])):
            counted[teacher].add(row)
    assert sampled_rows(few, [20, 5000]) == counted
