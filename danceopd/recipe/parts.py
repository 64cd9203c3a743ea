"""The parts of a recipe: teachers, the student, its optimizer, rollouts, queries, routing, and the data.

Each is a frozen pydantic model whose fields are a recipe's keys. `recipe.py` puts them together and `checks.py` refuses
what does not agree. Gates and the monitor are in `labelfree.py`, validation in `validation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from danceopd.common.messages import shown
from danceopd.recipe.values import BLENDS, BlendName, FieldName, LawName, existing

Unit = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(ge=-1e4, le=1e4)]
Weight = Annotated[float, Field(gt=0, le=1e6)]
Steps = Annotated[int, Field(gt=0, le=1000)]  # of a rollout: no scheduler has more noise levels
Rows = Annotated[int, Field(gt=0, le=2**14)]  # at a time
Rank = Annotated[int, Field(gt=0, le=2**14)]  # no layer is wider


def _adapter(value: Any) -> Any:
    return value if value == "base" else existing(value, "adapter")


PROMPT = "{prompt}"
"""Where a trigger has the prompt."""


def trigger_words(trigger: str) -> list[str]:
    """What a trigger adds to a prompt: the parts around it, without commas and spaces at their ends."""
    return [words for part in trigger.split(PROMPT) if (words := part.strip(" ,.;:"))]


def _trigger(value: str | None) -> str | None:
    if value is None:
        return None
    if not trigger_words(value):
        raise ValueError(f"the trigger is {value!r}, without a word; write the words, or leave it out")
    if value.count(PROMPT) > 1:
        raise ValueError(f"the trigger {value!r} has {PROMPT} twice; write it once, where the prompt stands")
    return value.strip() if PROMPT in value else f"{PROMPT}, {value.strip()}"


def _listed(value: Any) -> Any:
    """A word as a list of one."""
    return [value] if isinstance(value, str) else value


def _data(value: Any) -> Any:
    if value is None or str(value).partition(":")[0] in ("auto", "scenes", "hub"):
        return value
    return existing(value, "data source", shipped_names=False)


DataSource = Annotated[str, BeforeValidator(_data)]
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]

TWO_TEACHERS = [
    {"name": "draws", "adapter": "./a.safetensors", "capability": "generation"},
    {"name": "edits", "adapter": "./b.safetensors", "capability": "editing"},
]
"""The example of `teachers`."""


class Part(BaseModel):
    """What all parts of a recipe share: frozen, no unknown keys, finite numbers, no YAML booleans."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

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
    """What a table calls its columns, where it uses none of the names that are known (docs/data.md)."""

    source: ColumnName | None = Field(None, examples=["before_photo"])
    """Column of the picture that is edited."""
    target: ColumnName | None = Field(None, examples=["after_photo"])
    """Column of the finished picture; only objectives that learn from finished pictures read it."""
    instruction: ColumnName | None = Field(None, examples=["what_to_do"])
    """Column of the text of an edit."""
    prompt: ColumnName | None = Field(None, examples=["description"])
    """Column of the text of a picture; of an edit without `instruction`, too."""

    @model_validator(mode="after")
    def _check(self) -> Columns:
        named = [name for name in (self.source, self.target, self.instruction or self.prompt) if name is not None]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"{name!r} is named twice; one column cannot be two things")
        return self


class Teacher(Part):
    """A frozen model whose velocity the student learns.

    A whole model is kept as its difference from the base, of rank `rank`, when that loses at most `residual` of the
    change, else it is streamed from disk.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", examples=["portraits"])
    """What logs, reports and other keys call this teacher: letters, digits, - and _."""
    adapter: Annotated[str, BeforeValidator(_adapter)] = Field("base", examples=["./my-lora.safetensors"])
    """A LoRA (a file or a folder), a whole model trained from the base, the name of a shipped teacher, or `base`: the
    base itself."""
    capability: Literal["generation", "editing"]
    """What it teaches: drawing from prompts, or editing a picture."""
    weight: Weight = 1.0
    """Its share of the rows, beside the weights of the others."""
    scale: Strength = 1.0
    """Strength of its LoRA, or of a whole model's difference from the base."""
    rank: Rank = 128
    """Of a whole model: the rank that its difference from the base is stored with."""
    residual: float = Field(0.05, ge=0, le=1)
    """Of a whole model: the share of its change that the low-rank form may lose; above it the model is streamed from
    disk. 0: always streamed, 1: never."""
    guidance: Annotated[float, Field(gt=0, le=1e4)] | None = Field(None, examples=[3.5])
    """Scale of classifier-free guidance, which the student learns to do without; null: none."""
    negative: str | None = Field(None, examples=["blurry, low quality"])
    """Prompt that guidance leads away from; null: the family's own, most often the empty one."""
    trigger: Annotated[str | None, AfterValidator(_trigger)] = Field(None, examples=["in the style of sketch"])
    """Words that ask for this teacher: they join each of its prompts, or instructions, that has them not yet. Words
    alone come after a comma, "{prompt}, WORDS"; with {prompt} in it, it says itself where they stand. The teacher reads
    them, too: give the words it was trained with. null: none."""
    accept: Annotated[tuple[Literal["base", "scheduler", "components"], ...], BeforeValidator(_listed)] = Field(
        (), examples=[["base"]]
    )
    """Refusals that you have looked into: a LoRA that was trained on another base, a whole pipeline with another
    scheduler or other components."""
    data: Annotated[str | None, BeforeValidator(_data)] = Field(None, examples=["posters.txt"])
    """Data of its own, in any form that `data.generation` takes; null: that of its capability."""
    columns: Columns | None = Field(None, examples=[{"prompt": "description"}])
    """What the columns of its data are called; null: `data.columns`, or the known names where it has data of its own.
    """
    field: FieldName | None = Field(None, examples=["my_module:smoothed"])
    """A plug-in that changes what this teacher answers, or answers in its place (docs/plugins.md); null: none."""
    field_options: dict[str, Any] = Field({}, examples=[{"strength": 0.5}])
    """Keyword arguments of `field`."""


    def worded(self, prompt: str) -> str:
        """A prompt with the teacher's trigger, unless it has the words already."""
        there = (rf"(?<!\w){re.escape(words)}(?!\w)" for words in trigger_words(self.trigger or ""))
        if self.trigger is None or all(re.search(words, prompt, re.IGNORECASE) for words in there):
            return prompt
        return self.trigger.replace(PROMPT, prompt)


class Student(Part):
    """The LoRA that learns."""

    rank: Rank = 64
    """Rank of the LoRA that is learnt."""
    init: str = "blend"
    """Where it starts: `base` (a LoRA of zeros), `blend` (the teachers' LoRAs merged in weight space), the name of a
    blend's method, such as `regmean`, a teacher's name, or a LoRA's path."""
    init_weights: dict[str, Strength] = Field({}, examples=[{"draws": 0.7, "edits": 0.9}])
    """Of `blend`: strength of each teacher by name; empty: 1/N each, or 1 where a method adds them up."""
    init_method: BlendName = Field("linear", examples=["ties"])
    """Of `blend`: how the LoRAs are merged, as in `danceopd blend --method`."""

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """`init: regmean` stands for `init: blend, init_method: regmean`."""
        if not isinstance(data, Mapping) or data.get("init") not in BLENDS:
            return data
        init, method = data["init"], data.get("init_method", data["init"])
        if init != method:
            raise ValueError(f"init names {init} and init_method {method}; keep one of the two")
        return {**data, "init": "blend", "init_method": init}


class Optimizer(Part):
    """AdamW on the LoRA's weights, in fp32."""

    name: Literal["adamw"] = "adamw"
    """AdamW is the only one."""
    lr: float = Field(2e-4, gt=0, le=10)
    """Learning rate after the warm-up."""
    betas: tuple[Unit, Unit] = (0.9, 0.99)
    """Decay of AdamW's two moments."""
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    """AdamW's weight decay of the LoRA."""
    warmup: int = Field(10, ge=0, le=10**7)
    """Updates over which the learning rate rises to `lr`."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", examples=["cosine"])
    """Course of the learning rate after the warm-up: as it is, or down to 0 in a line or a half cosine."""


class Rollout(Part):
    """How the student rolls out, to the state at which it is compared with its teacher."""

    steps: Steps = 16
    """Denoising steps of a whole rollout. Use as many as you will generate with, or about 16; of a distilled base 4."""
    solver: Literal["euler", "ab2"] = "euler"
    """How a step is taken: Euler as in the stock pipelines, or two-step Adams-Bashforth, which is nearer from 8 steps
    on."""
    noise: float = Field(0.0, ge=0, le=1e3)
    """Strength of the noise of a stochastic rollout, the `a` of Flow-GRPO (0.7 there); 0: none."""
    guidance: float = Field(1.0, gt=0, le=1e4)
    """Classifier-free guidance of the student's rollout; 1: none. It does not touch what is learnt."""
    merged: Literal["auto", True, False] = "auto"
    """Roll out on W + BA, a second copy of the adapted weights; false: through the LoRA layers. `auto`: where the card
    has room."""
    cache_source: bool = False
    """Compute the keys and values of a source picture once a rollout; flux2-klein-kv only."""
    cuda_graphs: Literal["auto", True, False] = "auto"
    """Run the rollout's forwards as CUDA graphs (docs/kernels.md). `auto`: where the trial of `kernels: auto` finds
    them right and faster."""


class Query(Part):
    """At which noise level the teacher is queried."""

    law: LawName = Field("paper", examples=["high-noise"])
    """At which noise levels teachers are queried: `paper` is over the step's index, the others are over the noise level
    (docs/method.md); or a plug-in (docs/plugins.md)."""
    law_options: dict[str, Any] = Field({}, examples=[{"peak": 0.6}])
    """Keyword arguments of a law that is a plug-in."""
    beta: tuple[Weight, Weight] | None = Field(None, examples=[[5, 2]])
    """Parameters a and b of a Beta distribution in place of the law's own; null: the law's."""
    count: Steps = 1
    """States of one trajectory that are queried; a rollout costs as much as its deepest one."""
    jitter: bool = False
    """Query at the drawn level itself, not at the next step's above it."""
    weight: Literal["even", "dt2"] = "even"
    """Weight of a query: all alike, or by the squared length of the step that leaves its level."""


class Routing(Part):
    """Which row is learnt from which teacher."""

    per: Literal["row", "step", "turn", "need"] = "row"
    """Each row has its own teacher, all rows of a step have one, or the teachers take turns. `need`: as `row`, with
    more rows for teachers whose validation error still is large, after every check."""
    groups: PositiveInt = 1
    """Steps of a turn, with `per: turn`."""
    weights: dict[str, Weight] = Field({}, examples=[{"draws": 1.0, "edits": 2.0}])
    """Share of the rows by teacher's name; wins over the teachers' own `weight`."""


class Guidance(Part):
    """Rows without a prompt, as in the training of classifier-free guidance."""

    unconditional: Unit = 0.0
    """Share of rows that get the null prompt and learn the teacher's unguided velocity, so that the student can still
    be guided."""


class FlowOPD(Part):
    """Of objective flowopd."""

    group: int = Field(8, ge=2, le=2**14)
    """Rollouts of one sample that share a baseline."""
    clip: PositiveFloat = 1e-4
    """How far the likelihood ratio may leave 1."""


class OffPolicy(Part):
    """Of objective offpolicy."""

    clean: Literal["targets", "teacher"] = "targets"
    """The clean pictures: the data's finished ones, or what the routed teacher draws."""


class Data(Part):
    """Where prompts and edit pairs are (docs/data.md)."""

    generation: DataSource = Field("auto", examples=["prompts.txt"])
    """Prompts for teachers that draw: a .txt, .csv, .jsonl or .parquet file, a folder, `hub:owner/name`, `auto`, the
    prompts that ship with danceopd, or `scenes`, which suits the shipped model only. For that `auto` is `scenes`."""
    editing: DataSource = Field("auto", examples=["edits.jsonl"])
    """Instructions and source pictures for teachers that edit, in the same forms (docs/data.md); of `auto` the sources
    are drawn before training. `data: auto` stands for both."""
    columns: Columns = Columns()
    """What the columns of both tables are called, where they are not among the names that are known."""
    rows: int = Field(1024, gt=0, le=10**5)
    """Rows that are made of `scenes`, for each capability, and edits that are taken of `auto`."""

    @model_validator(mode="before")
    @classmethod
    def _for_both(cls, data: Any) -> Any:
        """`data: auto` stands for both; of other texts nobody would know which is meant."""
        if not isinstance(data, str):
            return data
        if data.partition(":")[0] not in ("auto", "scenes"):
            raise ValueError(f"data is {shown(data)}; name data.generation and data.editing, or write data: auto")
        return {"generation": data, "editing": data}


class Samples(Part):
    """Grids of sample pictures, of the same prompts and noise every time."""

    every: int = Field(200, ge=0)
    """Steps between grids of sample pictures; 0: only at the first and the last step."""
    count: int = Field(6, gt=0, le=1024)
    """Pictures in a grid."""
