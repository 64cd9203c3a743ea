"""What the judge-free metrics are called in a report: code name -> plain words, which way is better, what it means.

A metric that is neither better high nor low has no arrow. A name that is not here is printed as it is.
"""

from __future__ import annotations

from typing import NamedTuple

UP, DOWN, NEITHER = "↑", "↓", ""


class Words(NamedTuple):
    """The plain name of a metric, the arrow of the better direction, and its meaning."""

    name: str
    better: str = NEITHER
    meaning: str = ""


_OWN = "the region is the output's own change, which flatters a model that changes too much"
_REGION = "the edited region is that of the mask, else of the target, else of a teacher's edit"
METRICS = {
    "psnr_outside": Words("PSNR outside the edit, dB", UP, f"likeness to the source; {_REGION}"),
    "psnr_outside_own": Words("PSNR outside the own change, dB", UP, f"likeness to the source; {_OWN}"),
    "ssim_outside": Words("SSIM outside the edit", UP, f"likeness to the source; {_REGION}"),
    "ssim_outside_own": Words("SSIM outside the own change", UP, f"likeness to the source; {_OWN}"),
    "changed_outside": Words("changed outside the edit, share", DOWN, f"share of the pixels there; {_REGION}"),
    "changed_outside_own": Words("changed outside the own change, share", DOWN, f"share of the pixels there; {_OWN}"),
    "edited": Words("edited region, share", NEITHER, "size of the region that the edit may change"),
    "changed": Words("changed pixels, share", NEITHER, "of the whole image"),
    "unchanged": Words("nothing changed, share", DOWN, "share of the edits that returned the source"),
    "psnr_target": Words("PSNR against the target, dB", UP, "likeness to a known right result"),
    "ssim_target": Words("SSIM against the target", UP, "likeness to a known right result"),
    "sharpness": Words("sharpness", NEITHER, "variance of the Laplacian"),
    "sharpness_drift": Words("sharpness against the source, octaves", NEITHER, "below 0 is blurred"),
    "saturation": Words("colourfulness", NEITHER, "mean chroma, 0 is gray, 1 the most"),
    "saturation_drift": Words("colourfulness against the source", NEITHER, "above 0 is oversaturated"),
    "aspect_changed": Words("another shape than the source, share", DOWN, "aspect ratios that differ by over 4 %"),
    "constant": Words("one colour only, share", DOWN, "images that show nothing"),
    "near_duplicates": Words("near-duplicates, share", DOWN, "images that repeat another item's"),
    "feature_source": Words("distance from the source", NEITHER, "EfficientNet-Lite0, 0 is equal, 2 the most"),
    "feature_target": Words("distance from the target", DOWN, "EfficientNet-Lite0, 0 is equal, 2 the most"),
    "clip_text": Words("CLIP: image and words", UP, "cosine"),
    "clip_image": Words("CLIP: image and source", NEITHER, "cosine"),
    "clip_target": Words("CLIP: image and target", UP, "cosine"),
    "clip_direction": Words("CLIP: change of image and of words", UP, "cosine of the two changes"),
    "clip_direction_target": Words("CLIP: change of image and of target", UP, "cosine of the two changes"),
    "dino_image": Words("DINO: image and source", NEITHER, "cosine"),
    "dino_target": Words("DINO: image and target", UP, "cosine"),
}


def words_of(name: str) -> Words:
    """The words of a metric."""
    return METRICS.get(name, Words(name))
