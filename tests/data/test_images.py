"""Pictures are read as a viewer shows them; what is damaged or cannot be shown is refused by file and row."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from danceopd.data import images
from danceopd.data.images import image_size, open_image, picture
from danceopd.data.sources import edits_from
from danceopd.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_warned", set())
    return tmp_path


def _alpha(path: Path) -> None:
    Image.new("RGBA", (64, 64)).save(path)


def _palette_alpha(path: Path) -> None:
    Image.new("P", (64, 64)).save(path, transparency=0)


def _cut(path: Path) -> None:
    Image.effect_noise((96, 96), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("hello"), "is not an image"),
        (lambda path: path.write_bytes(b""), "is not an image"),
        (lambda path: path.mkdir(), "is not an image"),
        (lambda path: None, "does not exist"),
        (_alpha, "has an alpha channel"),
        (_palette_alpha, "has an alpha channel"),
        (lambda path: Image.new("RGB", (63, 200)).save(path), "is 63x200 pixels, too small"),
        (_cut, "is a damaged image"),
    ],
)
def test_bad_images(here: Path, make, message: str) -> None:
    make(here / "bad.png")
    Path("d.csv").write_text("instruction,image\nmake it blue,bad.png\n")
    with pytest.raises(UserError, match=message):
        open_image(Path("bad.png"))
    with pytest.raises(UserError, match=f"d.csv, line 2: .*{message}"):
        edits_from("d.csv")


def test_open_image_is_upright_rgb(here: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (80, 64)).save("turned.jpg", exif=exif)
    image = open_image(Path("turned.jpg"))
    assert (image.mode, image.size) == ("RGB", (64, 80))
    assert picture(Path("turned.jpg")).tobytes() == image.tobytes()
    assert image_size(Path("turned.jpg")) == (64, 80)
    with pytest.raises(UserError, match="alpha"):
        open_image(Image.new("RGBA", (64, 64)))


def test_pictures_of_a_benchmark_may_be_small_and_have_alpha(here: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save("small.png")
    for source in (Path("small.png"), Image.open("small.png")):
        assert picture(source).getpixel((0, 0)) == (10, 20, 30)
    Path("bad.png").write_text("hello")
    with pytest.raises(UserError, match="bad.png is not an image"):
        picture(Path("bad.png"))


def noise(path: str, size: tuple[int, int] = (96, 64), **how: object) -> bytes:
    Image.effect_noise(size, 60).convert("RGB").save(path, **how)
    return Path(path).read_bytes()


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("16.png", RAMP.astype(np.uint16)),
        ("16.tiff", RAMP.astype(np.uint16)),
        ("motorola.tiff", RAMP.astype(">u2")),
        ("32.tiff", RAMP.astype(np.int32)),
        ("unit.tiff", (RAMP / 65535).astype(np.float32)),
        ("whole.tiff", (RAMP / 257).round().astype(np.float32)),
    ],
)
def test_more_than_eight_bits(name: str, numbers: np.ndarray) -> None:
    Image.fromarray(numbers).save(name)
    for read in (open_image(Path(name)), picture(Path(name)), open_image(Path(name).read_bytes())):
        grey = np.asarray(read)
        assert grey.shape == (64, 64, 3) and np.abs(grey[..., 0] - RAMP / 257).max() <= 1


@pytest.mark.parametrize("numbers", [RAMP.astype(np.float32), RAMP / 6553.5, np.full((64, 64), np.nan), -RAMP / 65535])
def test_numbers_whose_white_is_not_known(numbers: np.ndarray) -> None:
    Image.fromarray(numbers.astype(np.float32)).save("f.tiff")
    with pytest.raises(UserError, match="f.tiff has grey values from .* save it with 8 bits"):
        open_image(Path("f.tiff"))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("lost", [20, 300])
def test_a_file_cut_off_is_found_without_training_on_it(kind: str, lost: int) -> None:
    content = noise(f"a.{kind}")
    assert image_size(Path(f"a.{kind}")) == (96, 64)
    Path(f"b.{kind}").write_bytes(content[:-lost])
    Path("e.csv").write_text(f"instruction,image\nmake it red,b.{kind}\n")
    with pytest.raises(UserError, match=f"e.csv, line 2: b.{kind} is a damaged image"):
        edits_from("e.csv")
    Path(f"c.{kind}").write_bytes(content + b"something behind it")
    assert image_size(Path(f"c.{kind}")) == (96, 64) == open_image(Path(f"c.{kind}")).size


def test_sizes_come_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "a.jpg"):
        noise(name)
        with monkeypatch.context() as inside:
            inside.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were read"))
            assert image_size(Path(name)) == (96, 64)


def test_exif_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = noise("a.png", exif=exif)
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + struct.unpack(">I", content[at : at + 4])[0]]
    rest = content.replace(chunk, b"")
    Path("late.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    for name in ("a.png", "late.png"):
        assert image_size(Path(name)) == (64, 96) == open_image(Path(name)).size
    assert open_image(Image.open("a.png")).size == (64, 96) == image_size(Image.open("a.png"))


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_png(20000, 20000), "e.csv, line 2: x.png has 400 megapixels, more than can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n", "line 2: x.png is not an image"),
        (b"RIFF\x24\0\0\0WEBPVP8 " + b"\xff" * 40, "line 2: x.png is a damaged image"),
    ],
)
def test_files_that_are_no_training_data(content: bytes, says: str) -> None:
    Path("x.png").write_bytes(content)
    Path("e.csv").write_text("instruction,image\nmake it red,x.png\n")
    with pytest.raises(UserError, match=says):
        edits_from("e.csv")
    with pytest.raises(UserError, match=says.rpartition(": ")[2]):
        open_image(Path("x.png"))


def test_pipes_devices_and_loops_are_not_opened() -> None:
    os.mkfifo("pipe.png")
    os.symlink("loop.png", "loop.png")
    for name, says in (("pipe.png", "is not an image"), ("/dev/zero", "is not an image"), ("loop.png", "not exist")):
        with pytest.raises(UserError, match=says):
            image_size(Path(name))


def test_an_opaque_alpha_channel_is_none() -> None:
    for name, image in (
        ("rgba.png", Image.new("RGBA", (64, 64), (200, 10, 10, 255))),
        ("la.png", Image.new("LA", (64, 64), (200, 255))),
    ):
        image.save(name)
        assert image_size(Path(name)) == (64, 64) and open_image(Path(name)).getpixel((0, 0))[0] == 200
    Image.new("L", (64, 64), 7).save("unused.png", transparency=5)
    assert open_image(Path("unused.png")).getpixel((0, 0)) == (7, 7, 7)
    almost = Image.new("RGBA", (64, 64), (200, 10, 10, 255))
    almost.putpixel((5, 5), (200, 10, 10, 254))
    almost.save("almost.png")
    for read in (image_size, open_image):
        with pytest.raises(UserError, match="almost.png has an alpha channel"):
            read(Path("almost.png"))


def test_what_is_assumed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (64, 64), (i * 40, 9, 9)) for i in range(3)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(name, save_all=True, append_images=frames[1:])
    Image.new("CMYK", (64, 64)).save("c.jpg")
    rows = "".join(f"make it red,{name}\n" for name in ("a.gif", "b.gif", "c.jpg"))
    Path("e.csv").write_text(f"instruction,image\n{rows}")
    with caplog.at_level(logging.WARNING, "danceopd"):
        edits_from("e.csv")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "line 2: a.gif has several frames" in said[0] and "line 4: c.jpg is CMYK" in said[1]


def test_a_source_that_no_family_edits_is_named_by_its_row() -> None:
    noise("long.png", (1024, 64))
    Path("e.csv").write_text("instruction,image\nmake it red,long.png\n")
    with pytest.raises(UserError, match="e.csv, line 2: long.png is 1024x64 pixels; crop it to at most 8 times"):
        edits_from("e.csv")
