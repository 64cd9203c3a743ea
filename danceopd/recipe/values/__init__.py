"""Types of single values of a recipe whose checks pydantic does not have: what exists on disk (`places.py`), the
names of parts, which may be plug-ins (`names.py`), and trackers (`trackers.py`)."""

from danceopd.recipe.values.names import (
    BLENDS,
    LAWS,
    OBJECTIVES,
    BlendMethod,
    BlendName,
    Callbacks,
    FamilyName,
    FieldName,
    LawName,
    LawWord,
    ObjectiveName,
    ObjectiveWord,
    part_name,
)
from danceopd.recipe.values.places import BaseName, EditingBase, GgufFile, MicroBatch, Output, existing
from danceopd.recipe.values.trackers import Trackers

__all__ = [
    "BLENDS", "LAWS", "OBJECTIVES", "BaseName", "BlendMethod", "BlendName", "Callbacks", "EditingBase", "FamilyName",
    "FieldName", "GgufFile", "LawName", "LawWord", "MicroBatch", "ObjectiveName", "ObjectiveWord", "Output", "Trackers",
    "existing", "part_name",
]  # fmt: skip
