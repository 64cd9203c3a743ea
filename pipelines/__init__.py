"""Stock diffusers pipelines taken apart: in go a loaded pipeline and prompts, out come conditions, noise and pictures.

`record` runs the real pipeline up to its first transformer call and keeps that call as a `Condition`, so prompt
encoding, image encoding and packing are never written twice. `GenerationPipeline` and `EditingPipeline` do that in
batches; what differs between model families is one `Family` each, listed in `FAMILIES`. Start with `condition.py`.
Imports in here are relative, since a type checker finds this folder under another name than danceopd.pipelines.
"""

from .condition import Condition, stack
from .editing import EditingPipeline, check_image, editing_pipe, generation_pipe
from .family import Family
from .generation import DenoisingState, GenerationPipeline, check_prompts
from .record import record
from .registry import FAMILIES, family_of

__all__ = [
    "FAMILIES",
    "Condition",
    "DenoisingState",
    "EditingPipeline",
    "Family",
    "GenerationPipeline",
    "check_image",
    "check_prompts",
    "editing_pipe",
    "family_of",
    "generation_pipe",
    "record",
    "stack",
]
