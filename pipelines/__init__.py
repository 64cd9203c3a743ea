"""Stock diffusers pipelines, seen as conditions, schedules, noise and pictures.

`record` runs the real pipeline up to its first transformer call and keeps that call (a `Condition`), so
prompt encoding, image encoding and packing are never written twice. `GenerationPipeline` and
`EditingPipeline` batch that; what differs between model families is one small `Family` in `FAMILIES`.
"""

from .editing import EditingPipeline, check_image, editing_pipe, generation_pipe
from .families import FAMILIES, family_of
from .family import Family
from .generation import DenoisingState, GenerationPipeline, check_prompts
from .record import Condition, record, stack

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
