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
from tinies import TINYS
from tiny import random_adapter, random_image, tiny_klein
from tiny_parts import Tiny

from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, call_defaults
from danceopd.pipelines import editing_pipe, family_of
from danceopd.pipelines.family import source_size
from danceopd.sample import generate, sample

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


def test_an_edit_has_the_shape_of_its_source(made: Path, stock, tmp_path: Path) -> None:
    """As in a merge, in the area of the settings; a size that is given wins."""
    random_image(4, 128, 64).save(tmp_path / "wide.png")
    options = {"image": tmp_path / "wide.png", "base": made / "base", "device": "cpu", "output": tmp_path}
    (path,) = sample(made / "student", "a red circle", **options)
    size = source_size(stock, Image.open(tmp_path / "wide.png"), CALL)
    assert Image.open(path).size == (size[1], size[0]) == (80, 32)
    call = {**CALL, "height": size[0], "width": size[1], "image": Image.open(tmp_path / "wide.png")}
    expected = stock(prompt="a red circle", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert np.array_equal(np.array(Image.open(path)), np.array(expected))
    (path,) = sample(made / "student", "a red circle", size=(64, 96), **options)
    assert Image.open(path).size == (96, 64)
    (path,) = sample(made / "student", "a red circle", size=(96, 64), **{**options, "image": None})
    assert Image.open(path).size == (64, 96)
    random_image(4, 1024, 64).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="wide.png is 1024x64 pixels; crop it"):
        sample(made / "student", "a red circle", **options)


def test_several_sources_are_the_stock_pipelines_references(made: Path, stock, tmp_path: Path) -> None:
    """In the order in which they are given; the first gives the shape."""
    random_image(4, 128, 64).save(tmp_path / "wide.png")
    sources = [tmp_path / "wide.png", made / "source.png"]
    options = {"base": made / "base", "device": "cpu", "output": tmp_path}
    (path,) = sample(made / "student", "a red circle", image=sources, **options)
    assert Image.open(path).size == (80, 32)
    call = {**CALL, "height": 32, "width": 80, "image": [Image.open(source) for source in sources]}
    expected = stock(prompt="a red circle", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert np.array_equal(np.array(Image.open(path)), np.array(expected))
    (turned,) = sample(made / "student", "a red circle", image=sources[::-1], size=(32, 80), **options)
    assert not np.array_equal(np.array(Image.open(turned)), np.array(expected))
    with pytest.raises(UserError, match="the edit has 11 pictures, and Flux2KleinPipeline takes at most 10 pictures"):
        sample(made / "student", "a red circle", image=[sources[1]] * 11, **options)
    Image.new("RGBA", (64, 64), (9, 9, 9, 9)).save(tmp_path / "clear.png")
    with pytest.raises(UserError, match="clear.png has an alpha channel, which this model does not read"):
        sample(made / "student", "a red circle", image=[*sources, tmp_path / "clear.png"], **options)


@pytest.mark.parametrize("tiny", [t for t in TINYS if t.editing is not None], ids=lambda tiny: tiny.family)
def test_every_family_edits_in_the_source_s_shape(tiny: Tiny, tmp_path: Path) -> None:
    """At the size that a merge encodes the edit at, and never in the square of the settings."""
    pipe, components = tiny.build(), None
    pipe.set_progress_bar_config(disable=True)
    if tiny.components is not None:
        components = str(tmp_path / "components")
        tiny.components(tmp_path / "components")
    call = {key: value for key, value in tiny.call.items() if key != "steps"} | {"num_inference_steps": 2}
    family, wide = family_of(pipe), random_image(4, 128, 64)
    (made,) = generate(pipe, "a red circle", wide, 0, 1, components, call, None)
    assert made.size[::-1] == family.size_of(editing_pipe(pipe, components, family), wide, call)
    assert made.width > 1.8 * made.height


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
    with pytest.raises(UserError, match="danceopd.json is not valid JSON"):
        call_defaults(tmp_path)


def test_a_student_on_another_base_of_the_same_layers(made: Path, tmp_path: Path) -> None:
    """As a LoRA that was trained on an undistilled model and runs on the distilled one."""
    tiny_klein(tmp_path / "turbo", seed=5)
    (tmp_path / "turbo" / "danceopd.json").write_text(json.dumps(CALL))
    facts = {"base_sha256": base_fingerprint(made / "base"), "base": str(made / "base")}
    write_adapter(read_adapter(made / "student"), tmp_path / "mine", metadata=facts)
    options = {"base": tmp_path / "turbo", "device": "cpu", "output": tmp_path / "out"}
    with pytest.raises(UserError, match="was trained on another base .* accept base$"):
        sample(tmp_path / "mine", "a red circle", **options)
    with pytest.raises(UserError, match="accept is 'scheduler'; it can be base"):
        sample(tmp_path / "mine", "a red circle", accept="scheduler", **options)
    (path,) = sample(tmp_path / "mine", "a red circle", accept="base", **options)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "turbo")
    stock.load_lora_weights(tmp_path / "mine")
    expected = stock(prompt="a red circle", generator=torch.Generator().manual_seed(0), **CALL).images[0]
    assert np.array_equal(np.array(Image.open(path)), np.array(expected))


def test_each_picture_is_kept_before_the_next_is_drawn(made: Path, tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(made / "student", "a fox", count=50, base=made / "base", device="cpu", output=tmp_path, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a-fox-seed0.png"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"device": "gpu"}, "device is 'gpu'"), ({"seed": 2**63}, "below 2[*][*]63"), ({"size": (64, 8)}, "is 8x64")],
)
def test_what_torch_would_refuse(made: Path, tmp_path: Path, bad: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        sample(made / "student", "a fox", base=made / "base", output=tmp_path, **bad)


def test_a_prompt_that_the_pipeline_cuts(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "fox " * 40
    sample(made / "student", words, count=2, base=made / "base", device="cpu", output=tmp_path)
    said = [record.getMessage() for record in caplog.records if "the pipeline cuts it at 24" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("count", [0, 10**20])
def test_a_number_of_images_that_nobody_wants_is_refused_by_its_flag(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} images were asked for; ask for one to a million with -n"):
        sample("generation", "a red circle", count=count)
