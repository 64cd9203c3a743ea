"""Finished pictures of the data, from the table to the clean latents that `supervised` and `offpolicy` learn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CALL, random_image, tiny_klein

import danceopd
from danceopd.data.dataset import HasTargets
from danceopd.data.encode import Encoder
from danceopd.data.images import open_image
from danceopd.data.sources import edits_from, prompts_from
from danceopd.errors import UserError
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.worlds.scenes.edits import edits
from danceopd.worlds.scenes.render import render


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Three source pictures and three finished ones, a table of edits and one of prompts."""
    for i in range(6):
        random_image(i).save(tmp_path / f"{i}.png")
    pairs = [{"instruction": f"edit {i}", "source": f"{i}.png", "target": f"{i + 3}.png"} for i in range(3)]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "prompts.csv").write_text("prompt,image\nred,3.png\nblue,4.png\ngreen,5.png\n")
    return tmp_path


def same(source, image) -> bool:
    return np.array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_targets_of_tables_folders_and_the_exact_world(here: Path) -> None:
    found = edits_from(here / "edits.jsonl", targets=True)
    assert same(found.target(1), random_image(4)) and same(found[1][1], random_image(1))
    assert same(prompts_from(here / "prompts.csv", targets=True).target(2), random_image(5))
    both = here / "both.jsonl"  # `image` is the result where something else is the source
    both.write_text(json.dumps({"prompt": "x", "control": "0.png", "image": "5.png"}))
    assert same(edits_from(both, targets=True).target(0), random_image(5))
    pairs = here / "pairs"
    (pairs / "control").mkdir(parents=True)
    (pairs / "a.txt").write_text("make it red")
    random_image(1).save(pairs / "control" / "a.png")
    random_image(2).save(pairs / "a.png")
    found = edits_from(pairs, targets=True)
    assert same(found[0][1], random_image(1)) and same(found.target(0), random_image(2))
    assert same(prompts_from(pairs, targets=True).target(0), random_image(2))
    made, drawn = edits_from("scenes", 4, 7), edits("train", 4, 7)
    assert all(same(made.target(i), Image.fromarray(render(drawn[i].target))) for i in range(4))


def test_a_source_is_no_target(here: Path) -> None:
    (here / "lone.jsonl").write_text(json.dumps({"prompt": "x", "image": "0.png"}))
    with pytest.raises(UserError, match="lone.jsonl, line 1 has no column 'target'"):
        edits_from(here / "lone.jsonl", targets=True).target(0)


def test_clean_latents_are_encoded_once_in_the_rows_order(here: Path, monkeypatch) -> None:
    tiny_klein(here / "base")
    pipe = tiny_klein()
    draw = {
        "generation": GenerationPipeline(pipe, family_of(pipe), CALL),
        "editing": EditingPipeline(pipe, family_of(pipe), CALL),
    }
    for capability, data in (
        ("editing", edits_from(here / "edits.jsonl", targets=True)),
        ("generation", prompts_from(here / "prompts.csv", targets=True)),
    ):
        dataset = Encoder(here / "base", family_of(pipe), draw, cache=here / "cache").encode(
            capability, data, [0, 1, 2], 4, targets=True
        )
        assert isinstance(dataset, HasTargets)
        expected = draw[capability].encode_images([random_image(i) for i in (5, 3)])
        torch.testing.assert_close(dataset.targets([2, 0]), expected)
        assert dataset.targets([2, 0]).shape == (2, *dataset.rows([2, 0]).shape)
    monkeypatch.setattr(GenerationPipeline, "encode_images", None)  # now in the store
    again = Encoder(here / "base", family_of(pipe), draw, cache=here / "cache")
    assert torch.equal(again.encode(capability, data, [2], 4, targets=True).targets([2]), expected[:1])


def files(here: Path) -> dict:
    """A recipe's base, teachers and data."""
    from tiny import random_adapter

    from danceopd.adapters.write import write_adapter

    pipe = tiny_klein(here / "base")
    for i, name in enumerate(("draws", "edits")):
        write_adapter(random_adapter(pipe.transformer, seed=i, size=0.1), here / name)
    return {
        "base": str(here / "base"),
        "generation": str(here / "draws"),
        "editing": str(here / "edits"),
        "data": {"generation": str(here / "prompts.csv"), "editing": str(here / "edits.jsonl")},
        "output": here / "student",
        "call": {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 24},
        "device": "cpu",
        "batch": 4,
        "samples": {"every": 0, "count": 1},
        "validation": {"rows": 2},
        "rollout": {"steps": 4},
    }


@pytest.mark.parametrize("objective", ["supervised", "offpolicy"])
def test_a_merge_learns_from_finished_pictures(here: Path, objective: str) -> None:
    losses = []
    options = {"student": {"rank": 8, "init": "base"}, "optimizer": {"lr": 0.01, "warmup": 1}, "steps": 12}
    fields = {**files(here), **options, "objective": objective}
    danceopd.merge(danceopd.Recipe(**fields), report=lambda metrics, steps: losses.append(metrics.loss))
    assert len(losses) == 12 and 0 < np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize(
    "row, sentence",
    [
        ('{"instruction": "x", "source": "0.png"}', "line 1 has no column 'target'"),
        ('{"instruction": "x", "source": "0.png", "target": ""}', "line 1: target is empty"),
        ('{"instruction": "x", "source": "0.png", "target": "9.png"}', "9.png does not exist"),
        ('{"instruction": "x", "source": "0.png", "target": "edits.jsonl"}', "edits.jsonl is not an image"),
        ('{"instruction": "x", "source": "0.png", "target": "wide.png"}', "128x64 pixels and would be squeezed"),
    ],
)
def test_a_faulty_target_is_refused_before_training(here: Path, row: str, sentence: str) -> None:
    random_image(0, 128, 64).save(here / "wide.png")
    fields = files(here)
    (here / "edits.jsonl").write_text(row)
    with pytest.raises(UserError, match=sentence):
        danceopd.merge(danceopd.Recipe(**fields, objective="supervised", steps=2))
    assert not (here / "student" / "pytorch_lora_weights.safetensors").exists()
