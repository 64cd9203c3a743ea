"""The parts of a recipe: teachers, the student, its optimizer, rollouts, queries, routing, and the data.

Each is a frozen pydantic model whose fields are a recipe's keys. `recipe.py` puts them together and `checks.py` refuses
what does not agree. Gates and the monitor are in `labelfree.py`, validation in `validation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from danceopd.common.shipped import resolve
from danceopd.errors import UserError

Unit = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(ge=-1e4, le=1e4)]
Weight = Annotated[float, Field(gt=0, le=1e6)]
Steps = Annotated[int, Field(gt=0, le=1000)]  # of a rollout: no scheduler has more noise levels
Rows = Annotated[int, Field(gt=0, le=2**14)]  # at a time
Rank = Annotated[int, Field(gt=0, le=2**14)]  # no layer is wider


def _adapter(value: Any) -> Any:
    return value if value == "base" else existing(value, "adapter")


def existing(value: Any, what: str, **how: Any) -> Any:
    """`shipped.resolve` as a validator; ValueError for what does not exist."""
    try:
        return resolve(value, what, **how)
    except UserError as error:  # as a ValueError, to which pydantic adds the key
        raise ValueError(str(error)) from None


def _data(value: Any) -> Any:
    if value is None or str(value).partition(":")[0] in ("scenes", "hub"):
        return value
    return existing(value, "data source", shipped_names=False)


DataSource = Annotated[str, BeforeValidator(_data)]
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


BlendMethod = Literal[
    "linear",
    "slerp",
    "task-arithmetic",
    "ties",
    "dare-linear",
    "dare-ties",
    "magnitude-prune",
    "breadcrumbs",
    "sce",
]
"""The names of `blend_methods.METHODS`, which a recipe may say before torch is there."""


class Part(BaseModel):
    """What all parts of a recipe share: frozen, no unknown keys, finite numbers, no YAML booleans."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, data: Any) -> Any:
        for key, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(key)
            if not isinstance(value, bool) or field is None:
                continue
            if field.annotation is not bool and True not in get_args(field.annotation):
                raise PydanticCustomError("boolean", "a boolean", {"key": key, "value": value})
        return data


class Columns(Part):
    """What a table calls its columns, where it uses none of the names that are known (docs/data.md).

    `instruction` is the text of an edit, `prompt` that of a picture; of an edit without `instruction`, too.
    """

    source: ColumnName | None = None  # the picture that is edited
    target: ColumnName | None = None  # the finished picture
    instruction: ColumnName | None = None
    prompt: ColumnName | None = None

    @model_validator(mode="after")
    def _check(self) -> Columns:
        named = [name for name in (self.source, self.target, self.instruction or self.prompt) if name is not None]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"{name!r} is named twice; one column cannot be two things")
        return self


class Teacher(Part):
    """A frozen velocity field: "base", a LoRA, or a whole model trained from the base (a folder or a file).

    A whole model is kept as its rank-`rank` difference from the base when that loses at most `residual` of the
    change (0: never, 1: always), else it is streamed. `guidance` is classifier-free guidance away from the prompt
    `negative` (None: the family's own). `accept` silences a refusal: a LoRA of another base, a whole pipeline with
    another scheduler or other components (its text encoder, its autoencoder).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    adapter: Annotated[str, BeforeValidator(_adapter)] = "base"
    capability: Literal["generation", "editing"]
    weight: Weight = 1.0  # its share of the rows
    scale: Strength = 1.0  # strength: of a LoRA, or of a whole model's difference from the base
    rank: Rank = 128
    residual: float = Field(0.05, ge=0, le=1)
    guidance: Annotated[float, Field(gt=0, le=1e4)] | None = None
    negative: str | None = None
    accept: tuple[Literal["base", "scheduler", "components"], ...] = ()
    data: Annotated[str | None, BeforeValidator(_data)] = None  # its own data; None: its capability's
    columns: Columns | None = None  # of its data; None: data.columns, or known names where it has data of its own


class Student(Part):
    """The adapter that learns. `init` is "base", "blend", a teacher's name, or an adapter's path."""

    rank: Rank = 64
    init: str = "blend"
    init_weights: dict[str, Strength] = {}  # of "blend", by teacher; empty: 1/N each, or 1 where a method adds up
    init_method: BlendMethod = "linear"  # of "blend"


class Optimizer(Part):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(2e-4, gt=0, le=10)
    betas: tuple[Unit, Unit] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    warmup: int = Field(10, ge=0, le=10**7)
    clip: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, down to 0


class Rollout(Part):
    """How the student rolls out. `noise` above 0 is the `a` of Flow-GRPO's SDE; `guidance` is the student's own CFG."""

    steps: Steps = 16
    solver: Literal["euler", "ab2"] = "euler"
    noise: float = Field(0.0, ge=0, le=1e3)
    guidance: float = Field(1.0, gt=0, le=1e4)
    # roll out on W + BA; False: through the LoRA layers, without a copy of the adapted weights
    merged: Literal["auto", True, False] = "auto"
    cache_source: bool = False  # compute source keys and values once a rollout; flux2-klein-kv only
    cuda_graphs: bool = False  # its forwards as CUDA graphs (docs/kernels.md)


class Query(Part):
    """At which noise level the teacher is queried. `beta` replaces the law's own Beta(a, b)."""

    law: Literal["low-noise", "uniform", "mid", "high-noise", "paper"] = "paper"
    beta: tuple[Weight, Weight] | None = None
    count: Steps = 1  # states of one trajectory that are queried
    jitter: bool = False  # query at the drawn level itself, not at the grid point above it
    weight: Literal["even", "dt2"] = "even"  # dt2: by the squared length of the step that leaves the level


class Routing(Part):
    """One teacher a row, a step, or `groups` steps in turn. `weights` by name win over the teachers' own `weight`."""

    per: Literal["row", "step", "turn"] = "row"
    groups: PositiveInt = 1  # steps of a turn
    weights: dict[str, Weight] = {}


class Guidance(Part):
    """`unconditional`: share of rows without a prompt, as in CFG training; their teacher velocity is unguided."""

    unconditional: Unit = 0.0


class FlowOPD(Part):
    """Of objective flowopd: rollouts of one sample that share a baseline, and how far the ratio may leave 1."""

    group: int = Field(8, ge=2, le=2**14)
    clip: PositiveFloat = 1e-4


class OffPolicy(Part):
    """Of objective offpolicy: clean pictures are the data's own targets, or drawn by the routed teacher."""

    clean: Literal["targets", "teacher"] = "targets"


class Data(Part):
    """Where prompts and edit pairs are: "scenes", a .txt, .csv, .jsonl or .parquet file, a folder,
    "hub:owner/name"."""

    generation: DataSource = "scenes"
    editing: DataSource = "scenes"
    columns: Columns = Columns()  # of both, where they are tables
    rows: int = Field(1024, gt=0, le=10**5)  # drawn from "scenes", for each capability


class Samples(Part):
    every: int = Field(200, ge=0)  # 0: only at the first and the last step
    count: int = Field(6, gt=0, le=1024)
