"""Reading pictures back into scenes."""

import random
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

from danceopd.errors import UserError
from danceopd.worlds.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, STYLES, Scene, Thing, place
from danceopd.worlds.scenes.read import BEST_PSNR, Reading, psnr, read, read_many, tier_of
from danceopd.worlds.scenes.render import render


def draw(number, tier, seed=0, style=None):
    """Random scenes, all bindings, the styles in turn."""
    rng, found = random.Random(seed), []
    while len(found) < number:
        looks = [(rng.choice(SHAPES), rng.choice(COLOURS)) for _ in range(rng.randint(1, 5 if tier == "cells" else 4))]
        things = place(rng, looks, tier)
        if things:
            found.append(Scene(things, rng.choice(BACKGROUNDS), style or STYLES[len(found) % len(STYLES)]))
    return found


def noisy(image, sigma, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.rint(image + rng.normal(0, 255 * sigma, image.shape)), 0, 255).astype(np.uint8)


def blurred(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def share_read(scenes, images, tier):
    readings = read_many(images, tier)
    return np.mean([r.scene.key() == s.key() for r, s in zip(readings, scenes, strict=True)])


@pytest.mark.parametrize("style", STYLES)
def test_clean_cells_are_read_exactly(style):
    scenes = draw(400, "cells", style=style)
    assert share_read(scenes, [render(s) for s in scenes], "cells") >= 0.995


@pytest.mark.parametrize("style", STYLES)
def test_clean_free_scenes_are_read_exactly(style):
    scenes = draw(60, "free", style=style)
    assert share_read(scenes, [render(s) for s in scenes], "free") >= 0.995


def test_every_look_is_read_on_every_ground_in_every_style():
    scenes = [
        Scene((Thing(shape, colour, 8, 8 + 16 * (i % 4), 6),), background, style)
        for i, (shape, colour) in enumerate((s, c) for s in SHAPES for c in COLOURS)
        for background in BACKGROUNDS
        for style in STYLES
    ]
    assert share_read(scenes, [render(s) for s in scenes], "cells") == 1


@pytest.mark.parametrize("tier, number", [("cells", 200), ("free", 16)])
def test_noise_and_small_blur_do_no_harm(tier, number):
    scenes = draw(number, tier, seed=1)
    images = [render(s) for s in scenes]
    assert share_read(scenes, [noisy(image, 0.05, i) for i, image in enumerate(images)], tier) >= 0.99
    assert share_read(scenes, [blurred(image, 0.5) for image in images], tier) >= 0.99


@pytest.mark.parametrize("tier", ["cells", "free"])
def test_an_empty_scene_is_read(tier):
    for background in BACKGROUNDS:
        scene = Scene((), background, "night")
        assert read(render(scene), tier).scene == scene


def test_broken_cells_do_not_flip_the_ground():
    rng = np.random.default_rng(0)
    for scene in draw(80, "cells", seed=2):
        image = render(scene).copy()
        for row, column in rng.permutation([(r, c) for r in range(4) for c in range(4)])[:3]:
            image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = rng.integers(0, 256, (16, 16, 3))
        found = read(image)
        assert (found.scene.background, found.scene.style) == (scene.background, scene.style)
        assert found.unexplained > 0.08


def test_a_blended_thing_is_read_as_what_it_resembles_most():
    one = Scene((Thing("square", "red", 24, 24, 6),), "gray", "flat")
    two = Scene((Thing("square", "blue", 24, 24, 6),), "gray", "flat")
    none = Scene((), "gray", "flat")

    def mix(a, b, share):
        return np.rint((1 - share) * render(a).astype(float) + share * render(b)).astype(np.uint8)

    assert read(mix(one, two, 0.2)).scene.key() == one.key()
    assert read(mix(one, two, 0.8)).scene.key() == two.key()
    assert read(mix(one, none, 0.3)).scene.key() == one.key()
    assert read(mix(one, none, 0.9)).scene.key() == none.key()
    assert read(mix(one, none, 0.45)).psnr < 35 < read(mix(one, none, 0.05)).psnr


def test_doubt_is_told():
    image = render(Scene((Thing("star", "red", 24, 24, 6),), "sand", "flat"))
    clean, worse = read(image), read(noisy(image, 0.1))
    assert clean.psnr == BEST_PSNR and clean.unexplained == 0
    assert 18 < worse.psnr < 22
    static = read(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    assert static.psnr < 12 and static.unexplained > 0.5


def test_what_can_be_read():
    image = render(Scene((), "gray", "flat"))
    reading = read(image)
    assert isinstance(reading, Reading) and read(reading) is reading
    assert read(Image.fromarray(image)) == reading
    assert read(Image.fromarray(image).convert("RGBA")) == reading
    assert read_many([]) == []
    assert [r.scene for r in read_many([image, reading])] == [reading.scene] * 2
    for wrong in (image[:32], image.astype(np.float32), Image.new("RGB", (128, 128))):
        with pytest.raises(UserError, match="64x64"):
            read(wrong)
    with pytest.raises(UserError, match="no tier"):
        read(image, "cell")


def test_psnr_and_tier():
    black, gray = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 51, np.uint8)
    assert psnr(black, black) == BEST_PSNR
    assert psnr(black, gray) == pytest.approx(-20 * np.log10(0.2))
    assert psnr(black, gray, np.zeros((64, 64), bool)) == BEST_PSNR
    assert [tier_of(draw(1, tier)[0]) for tier in ("cells", "free")] == ["cells", "free"]


def test_reading_is_fast():
    images = [render(s) for s in draw(64, "cells")]
    read_many(images)
    best = min(_seconds(images) for _ in range(5))
    # About 1 ms an image on an idle core; the bound leaves room for a busy one.
    assert best / len(images) < 0.012


def _seconds(images):
    start = time.process_time()
    read_many(images)
    return time.process_time() - start
