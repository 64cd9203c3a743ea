"""Everybody on one stage: the loaded base with every LoRA of a line-up, and whole models one at a time.

All LoRAs ride on ONE backbone. A whole model's transformer is loaded when its turn comes and leaves after it. A guided
teacher is asked with its guidance in its own capability, as its recipe asks it; in the other it is asked plainly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from danceopd.backbone import Backbone
from danceopd.base_model import load_base, stored_dtype
from danceopd.bench.models import Lineup, Model, sha256_of
from danceopd.checkpoint import open_checkpoint
from danceopd.errors import UserError
from danceopd.fields import VelocityField
from danceopd.forming import small
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.pipelines.record import Condition
from danceopd.teachers import null_prompt
from danceopd.work import Encoder, drawers


class Stage:
    """The loaded pipeline with every LoRA of a lineup on one backbone; `acting(model)` gives its velocity field."""

    def __init__(self, lineup: Lineup, device: str) -> None:
        assert lineup.folder is not None
        self.folder = lineup.folder
        dtype = torch.float32 if device == "cpu" else stored_dtype(lineup.folder)
        self.pipe = load_base(lineup.folder, dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of(self.pipe, lineup.family)
        self.device, self._lineup = device, lineup
        self.backbone = Backbone(self.pipe.transformer, self.family)
        for model in lineup.models:
            if model.adapter is not None:
                self.backbone.add_adapter(model.name, model.adapter)

    def encoder(self, capabilities: Iterable[str], call: Mapping[str, Any], chunk: int) -> Encoder:
        """Conditions of prompts and edits by the stock pipelines, `chunk` at once; kept in runs' shared store."""
        made = drawers(self.pipe, self.family, dict(call), capabilities, self._lineup.editing_base)
        for drawer in made.values():
            drawer.chunk = chunk
        return Encoder(self.folder, self.family, made, self._lineup.editing_base)

    @torch.no_grad()
    def round_trip(self, images: list[Any], batch: int = 64) -> list[Any]:
        """Pictures through the autoencoder and back: what is lost before any model draws."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        found: list[Any] = []
        for at in range(0, len(images), batch):
            pixels = processor.preprocess(images[at : at + batch]).to(self.device, vae.dtype)
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
            found += processor.postprocess(decoded, output_type="pil")
        return found

    def null(self, model: Model, drawer: GenerationPipeline) -> Condition:
        """The prompt a guided model gets away from, as a condition of one row."""
        return null_prompt(drawer, model.name, model.negative).to(self.device)

    @contextmanager
    def acting(self, model: Model) -> Iterator[VelocityField]:
        """Inside, the yielded field is the model's velocity, unguided and without gradients.

        A whole model is loaded here, so one is entered once, not for every batch.
        """
        backbone, how = self.backbone, cast("AbstractContextManager", nullcontext())
        if model.whole is not None:
            backbone = self._own(model, model.whole)
        elif model.adapter is not None:
            how = backbone.merged(model.name) if small(backbone.transformer) else backbone.acting_as(model.name)
        with torch.no_grad(), how:
            yield backbone.velocity

    def _own(self, model: Model, whole: Path) -> Backbone:
        """A backbone of a whole model's own transformer."""
        folder = self.folder
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "vae", "scheduler"):
            ours, theirs = folder / part, whole / part
            if ours.is_dir() and theirs.is_dir() and weights_of(ours) != weights_of(theirs):
                raise UserError(
                    f"{whole} has another {part} than the base {folder}, so the two cannot share prompts and "
                    "pictures; bench it as a base of its own"
                )
        checkpoint = open_checkpoint(whole, open_checkpoint(folder))
        like = self.pipe.transformer
        transformer = type(like).from_config(like.config).to(like.dtype)
        transformer.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.shapes})
        return Backbone(transformer.to(self.device), self.family)


def weights_of(part: Path) -> list[str]:
    """Hashes of the weights of one component of a pipeline."""
    return [sha256_of(file) for file in sorted(part.rglob("*.safetensors"))] if part.is_dir() else []
