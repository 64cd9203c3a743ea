"""Feature similarity (`--features`): CLIP, DINO, and EfficientNet-Lite0 from a package that ships its weights.

A network is named `lite0`, `clip:MODEL` or `dino:MODEL`, where MODEL is a folder or a model in the local hub cache;
nothing is ever downloaded, and torchvision is not needed. The metrics follow Gal et al. 2022 (CLIP directions), Zhang
et al. 2023 (MagicBrush: CLIP-I, DINO) and, for Lite0, the form of Zhang et al. 2018 without its learned weights: it is
not LPIPS, and its numbers compare only with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from danceopd.bench.metrics.lite0 import Lite0, lite0
from danceopd.bench.suites.protocol import Item
from danceopd.common.files import sha256
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError


class Network(Protocol):
    """A network that adds metrics to `metrics.measure`."""

    identity: dict[str, Any]  # plain JSON: which weights

    def measure(
        self, item: Item, image: Image.Image, source: Image.Image | None, target: Image.Image | None
    ) -> dict[str, float]:
        """Metrics by name; source and target are None where there is none."""


def captions(item: Item) -> tuple[str, str] | None:
    """Captions of the source and of the edited image: `source_caption` and `target_caption` of the item's task.

    The task is a mapping or an object; None where it has no captions.
    """
    task = item.task
    found = [
        task.get(name) if isinstance(task, dict) else getattr(task, name, None)
        for name in ("source_caption", "target_caption")
    ]
    return (str(found[0]), str(found[1])) if all(found) else None


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=-1))


@dataclass
class Lite0Features:
    """EfficientNet-Lite0: `feature_source` and `feature_target`, distances from 0 (equal) to 2 (nothing in common)."""

    net: Lite0
    identity: dict[str, Any]
    device: str = "cpu"

    def distance(self, one: Image.Image, other: Image.Image) -> float:
        """Squared distance of the normalised features, averaged over positions and over five stages."""
        with torch.inference_mode():
            stages = self.net.stages(self.net.tensor([one, other]).to(self.device))
            parts = [(F.normalize(s[0], dim=0) - F.normalize(s[1], dim=0)).pow(2).sum(0).mean() for s in stages]
        return float(torch.stack(parts).mean())

    def measure(
        self, item: Item, image: Image.Image, source: Image.Image | None, target: Image.Image | None
    ) -> dict[str, float]:
        """Distance to the source and to the target."""
        others = {"feature_source": source, "feature_target": target}
        return {name: self.distance(image, other) for name, other in others.items() if other is not None}


@dataclass
class ClipFeatures:
    """CLIP: cosines from -1 to 1.

    `clip_text`: image and prompt (generation), or image and the caption of the edited image. `clip_image`: image and
    source; `clip_target`: image and target. `clip_direction`: the change of the image and that of the caption;
    `clip_direction_target`: the change of the image and that of the target. Left out where nothing changed.
    """

    model: Any
    processor: Any
    tokenizer: Any
    identity: dict[str, Any]
    device: str = "cpu"

    def image(self, image: Image.Image) -> Tensor:
        """The embedding (d,) of an image."""
        pixels = self.processor(images=image, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            return self.model.visual_projection(self.model.vision_model(**pixels).pooler_output)[0].float()

    def text(self, text: str) -> Tensor:
        """The embedding (d,) of a text, truncated to the tokens that CLIP takes."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            return self.model.text_projection(self.model.text_model(**tokens).pooler_output)[0].float()

    def measure(
        self, item: Item, image: Image.Image, source: Image.Image | None, target: Image.Image | None
    ) -> dict[str, float]:
        """The metrics that the item allows, see the class."""
        mine = self.image(image)
        caption = captions(item)
        if source is None:
            return {"clip_text": _cosine(mine, self.text(item.prompt))}
        before, found = self.image(source), {}
        found["clip_image"] = _cosine(mine, before)
        moved = mine - before
        goal = self.image(target) if target is not None else None
        if goal is not None:
            found["clip_target"] = _cosine(mine, goal)
        if caption is not None:
            wanted = self.text(caption[1])
            found["clip_text"] = _cosine(mine, wanted)
            _direction(found, "clip_direction", moved, wanted - self.text(caption[0]))
        if goal is not None:
            _direction(found, "clip_direction_target", moved, goal - before)
        return found


def _direction(found: dict[str, float], name: str, moved: Tensor, wanted: Tensor) -> None:
    """Adds the cosine of two changes; equal images or captions have no direction."""
    if float(moved.norm()) > 1e-6 and float(wanted.norm()) > 1e-6:
        found[name] = _cosine(moved, wanted)


@dataclass
class DinoFeatures:
    """A DINO vision transformer: `dino_image` and `dino_target`, cosines of class tokens with source and target."""

    model: Any
    processor: Any
    identity: dict[str, Any]
    device: str = "cpu"

    def image(self, image: Image.Image) -> Tensor:
        """The embedding (d,) of an image."""
        pixels = self.processor(images=image, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            return self.model(**pixels).last_hidden_state[0, 0].float()

    def measure(
        self, item: Item, image: Image.Image, source: Image.Image | None, target: Image.Image | None
    ) -> dict[str, float]:
        """Similarity to the source and to the target."""
        others = {"dino_image": source, "dino_target": target}
        return {name: _cosine(self.image(image), self.image(o)) for name, o in others.items() if o is not None}


def load_networks(names: Sequence[str], device: str = "cpu") -> tuple[Network, ...]:
    """The networks of `--features` (`lite0`, `clip:MODEL`, `dino:MODEL`); UserError says what is missing."""
    found: list[Network] = []
    for name in names:
        kind, _, place = name.partition(":")
        if kind not in ("lite0", "clip", "dino"):
            hint = did_you_mean(kind, ("lite0", "clip:MODEL", "dino:MODEL"))
            raise UserError(f"--features has no network {name!r}{hint}")
        if (kind == "lite0") == bool(place):
            raise UserError(f"--features {name!r} {'takes no model' if place else f'needs a model: {kind}:FOLDER'}")
        if kind == "lite0":
            net, identity = lite0()
            found.append(Lite0Features(net.to(device), identity, device))
        else:
            found.append(_clip(place, device) if kind == "clip" else _dino(place, device))
    return tuple(found)


def _load(what: str, place: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """Parts of a transformers model from a folder or the local cache."""
    folder = Path(place).expanduser()
    try:
        return {
            name: kind.from_pretrained(folder if folder.is_dir() else place, local_files_only=True, **more)
            for name, (kind, more) in kinds.items()
        }
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{what} {place!r} cannot be loaded ({reason}); give the folder of a transformers model, or "
            "download one with `hf download`"
        ) from None


def _identity(kind: str, place: str, model: Any) -> dict[str, Any]:
    """The model's name, and the hashes of its weights if they are in a folder."""
    folder = Path(place).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    about = {"network": kind, "model": place, "revision": getattr(model.config, "_commit_hash", None)}
    return about | {"sha256": {file.name: sha256(file) for file in files}}


def _clip(place: str, device: str) -> ClipFeatures:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    kinds = {
        "model": (CLIPModel, {"dtype": torch.float32}),
        "processor": (AutoImageProcessor, {"backend": "pil"}),
        "tokenizer": (AutoTokenizer, {}),
    }
    parts = _load("CLIP model", place, kinds)
    parts["model"].eval().to(device)
    return ClipFeatures(**parts, identity=_identity("clip", place, parts["model"]), device=device)


def _dino(place: str, device: str) -> DinoFeatures:
    from transformers import AutoImageProcessor, AutoModel

    kinds = {"model": (AutoModel, {"dtype": torch.float32}), "processor": (AutoImageProcessor, {"backend": "pil"})}
    parts = _load("DINO model", place, kinds)
    parts["model"].eval().to(device)
    return DinoFeatures(**parts, identity=_identity("dino", place, parts["model"]), device=device)
