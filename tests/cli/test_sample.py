"""`danceopd sample` gives bit for bit what the stock pipeline gives, and never replaces a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Program
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import random_adapter, random_image, tiny_klein

from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.base import call_defaults
from danceopd.sample import sample

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and a student on it."""
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny_klein(folder / "base")
    (folder / "base" / "danceopd.json").write_text(json.dumps(CALL | {"trained": "no"}))
    write_adapter(random_adapter(pipe.transformer), folder / "student")
    random_image(3).save(folder / "source.png")
    return folder


@pytest.fixture(scope="module")
def stock(made: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(made / "base")
    pipe.load_lora_weights(made / "student")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("edit", [False, True])
def test_bit_for_bit_the_stock_pipeline(made: Path, stock, tmp_path: Path, edit: bool) -> None:
    source = made / "source.png" if edit else None
    options = {"base": made / "base", "device": "cpu", "output": tmp_path}
    paths = sample(made / "student", "a red circle", image=source, seed=5, count=2, **options)
    for i, path in enumerate(paths):
        more = {"image": Image.open(source)} if source else {}
        generator = torch.Generator("cpu").manual_seed(5 + i)
        expected = stock(prompt="a red circle", generator=generator, **CALL, **more).images[0]
        assert np.array_equal(np.array(Image.open(path)), np.array(expected))
    pictures = [np.array(Image.open(path)) for path in paths]
    assert not np.array_equal(*pictures)


def test_the_program_says_where_the_pictures_are_and_replaces_none(danceopd: Program, made: Path, tmp_path) -> None:
    command = ("sample", made / "student", "a red circle!", "--base", made / "base", "-o", "out", "--seed", 7)
    assert danceopd(*command).stdout == "out/a-red-circle-seed7.png\n"
    first = (tmp_path / "out/a-red-circle-seed7.png").read_bytes()
    options = {"base": made / "base", "device": "cpu", "output": tmp_path / "out"}
    second = sample(made / "student", "a red circle!", seed=7, **options)
    assert second == [tmp_path / "out/a-red-circle-seed7-2.png"]
    assert (tmp_path / "out/a-red-circle-seed7.png").read_bytes() == first == second[0].read_bytes()


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    assert call_defaults(tmp_path) == {}
    (tmp_path / "danceopd.json").write_text("[64")
    with pytest.raises(UserError, match="danceopd.json is not a JSON object"):
        call_defaults(tmp_path)


def test_each_picture_is_kept_before_the_next_is_drawn(made: Path, tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(made / "student", "a fox", count=50, base=made / "base", device="cpu", output=tmp_path, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a-fox-seed0.png"]


@pytest.mark.parametrize(
    ("bad", "says"), [({"device": "gpu"}, "device is 'gpu'"), ({"seed": 2**63}, "below 2[*][*]63")]
)
def test_what_torch_would_refuse(made: Path, tmp_path: Path, bad: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        sample(made / "student", "a fox", base=made / "base", output=tmp_path, **bad)


def test_a_prompt_that_the_pipeline_cuts(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "fox " * 40
    sample(made / "student", words, count=2, base=made / "base", device="cpu", output=tmp_path)
    said = [record.getMessage() for record in caplog.records if "the pipeline cuts it at 24" in record.getMessage()]
    assert len(said) == 1
