"""The loaded models of a bench: one base with the LoRAs of all models attached, and full models one at a time.

A `Lineup` goes in, the velocity field of each of its models comes out. All LoRAs share ONE backbone. The transformer of
a full model is loaded when its turn comes, and freed after it. A teacher with classifier-free guidance uses it in its
own capability only, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from danceopd.bench.lineup import Lineup, Model, sha256_of
from danceopd.data.encode import Encoder, open_pipelines
from danceopd.data.null_prompt import null_prompt
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone, may_copy_weights
from danceopd.models.base import load_base, stored_dtype
from danceopd.models.checkpoint import open_checkpoint
from danceopd.models.fields import VelocityField
from danceopd.models.storage import computes_in, kept_as
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.family import image_processor


class ModelHost:
    """The loaded pipeline with every LoRA of a lineup on one backbone; `velocity(model)` yields a velocity field."""

    def __init__(self, lineup: Lineup, device: str) -> None:
        assert lineup.folder is not None
        self.folder = lineup.folder
        dtype = torch.float32 if device == "cpu" else stored_dtype(lineup.folder)
        self.pipe = load_base(lineup.folder, dtype).to(device)
        computes_in(self.pipe.transformer, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of(self.pipe, lineup.family)
        self.device, self._lineup = device, lineup
        self.backbone = Backbone(self.pipe.transformer, self.family)
        for model in lineup.models:
            if model.adapter is not None:
                self.backbone.add_adapter(model.name, model.adapter)

    def encoder(self, capabilities: Iterable[str], call: Mapping[str, Any], chunk: int) -> Encoder:
        """An encoder of prompts and edits by the stock pipelines, `chunk` at once, with the cache that runs share."""
        made = open_pipelines(self.pipe, self.family, dict(call), capabilities, self._lineup.editing_base)
        for drawer in made.values():
            drawer.chunk = chunk
        return Encoder(self.folder, self.family, made, self._lineup.editing_base)

    @torch.no_grad()
    def round_trip(self, images: list[Any], batch: int = 64) -> list[Any]:
        """Images through the autoencoder and back: the loss of quality that no model can avoid."""
        found: list[Any] = []
        for at in range(0, len(images), batch):
            pixels = image_processor(self.pipe).preprocess(images[at : at + batch]).to(self.device, self.pipe.vae.dtype)
            latents = self.family.encode_images(self.pipe, pixels)
            found += self.family.decode(self.pipe, latents, *pixels.shape[-2:])
        return found

    def null_condition(self, model: Model, drawer: GenerationPipeline) -> Condition:
        """The null condition of a model with guidance (its negative prompt), one row."""
        return null_prompt(drawer, model.name, model.negative).to(self.device)

    @contextmanager
    def velocity(self, model: Model) -> Iterator[VelocityField]:
        """Yields the model's velocity field, without guidance and gradients.

        A full model is loaded here, so enter this once for a model, not for every batch.
        """
        backbone, how = self.backbone, cast("AbstractContextManager", nullcontext())
        if model.checkpoint is not None:
            backbone = self._backbone_of(model.checkpoint)
        elif model.adapter is not None:
            packed = any(map(kept_as, backbone.transformer.modules()))
            copies = may_copy_weights(backbone.transformer) and not packed
            how = backbone.merged(model.name) if copies else backbone.acting_as(model.name)
        with torch.no_grad(), how:
            yield backbone.velocity

    def _backbone_of(self, folder: Path) -> Backbone:
        """The transformer of a full model, which must share the base's other components."""
        base = self.folder
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "vae", "scheduler"):
            ours, theirs = base / part, folder / part
            if ours.is_dir() and theirs.is_dir() and weight_hashes(ours) != weight_hashes(theirs):
                raise UserError(
                    f"{folder} has another {part} than the base {base}, so the two cannot share encoded prompts and "
                    "images; run a bench of its own for it"
                )
        checkpoint = open_checkpoint(folder, open_checkpoint(base))
        like = self.pipe.transformer
        transformer = type(like).from_config(like.config).to(like.dtype)
        transformer.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.shapes})
        return Backbone(transformer.to(self.device), self.family)


def weight_hashes(part: Path) -> list[str]:
    """sha256 of each weight file of one component of a pipeline."""
    return [sha256_of(file) for file in sorted(part.rglob("*.safetensors"))] if part.is_dir() else []
