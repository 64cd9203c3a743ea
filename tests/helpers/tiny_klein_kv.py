"""A tiny FLUX.2-klein KV pipeline of the real classes: the tiny klein under the class that keeps a source's keys."""

from __future__ import annotations

from pathlib import Path

from diffusers import Flux2KleinKVPipeline
from tiny import CALL, tiny_klein
from tiny_parts import Tiny, finish


def tiny_klein_kv(folder: str | Path | None = None, seed: int = 0) -> Flux2KleinKVPipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    return finish(Flux2KleinKVPipeline(**tiny_klein(seed=seed).components), folder)


TINY = Tiny("flux2-klein-kv", tiny_klein_kv, lambda pipe: pipe, {**CALL, "steps": 4})
