"""What to merge, and how: one frozen pydantic model that YAML files, flags and Python share.

Every default of a merge stands here and in its parts and nowhere else, and is the paper's; what `danceopd merge` does
with nothing given is the shipped recipe `checkpoints/demo.yaml`. A `Recipe` that exists is a valid one: unknown keys,
impossible numbers, missing files and misspelt names are refused when it is made, with a `UserError` that names the key,
the file and the nearest valid name. Shipped checkpoints ("base", "generation", ...) go by their bare names; a folder
is written "./generation".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from danceopd.common.messages import did_you_mean, explain_validation_error, read_yaml
from danceopd.common.shipped import demo, portable
from danceopd.errors import UserError
from danceopd.plugins import load
from danceopd.recipe.aliases import modernise, with_settings
from danceopd.recipe.auto import settled_data
from danceopd.recipe.checks import CALL_MOST, check, check_call
from danceopd.recipe.fast import Fast, with_fast_steps
from danceopd.recipe.labelfree import Contrast, Gates, Monitor
from danceopd.recipe.nft import NFT
from danceopd.recipe.parts import (
    TWO_TEACHERS,
    Columns,
    Data,
    FlowOPD,
    Guidance,
    OffPolicy,
    Optimizer,
    Part,
    Query,
    Rollout,
    Routing,
    Rows,
    Samples,
    Student,
    Teacher,
    Unit,
)
from danceopd.recipe.sampling import Sampling
from danceopd.recipe.validation import Validation
from danceopd.recipe.values import (
    BLENDS,
    OBJECTIVES,
    BaseName,
    Callbacks,
    EditingBase,
    FamilyName,
    GgufFile,
    MicroBatch,
    ObjectiveName,
    Output,
    Trackers,
    existing,
)

CAPABILITIES = ("generation", "editing")
AUTO = ("dtype", "micro_batch", "gradient_checkpointing", "rollout.merged")
"""Keys whose default `auto` a merge settles before it loads anything (planning/settings.py): then none says auto."""
CONTINUES = (
    "steps",
    "output",
    "device",
    "samples",
    "save_every",
    "keep_last",
    "time_limit",
    "micro_batch",
    "gradient_checkpointing",
    "compile",
    "kernels",
    "parallel",
    "offload",
    "validation",
    "monitor",
    "callbacks",
    "trackers",
)
"""Fields that may differ between a run and its continuation: but for rounding they change nothing a step computes."""

_log = logging.getLogger("danceopd")

Seed = Annotated[int, Field(ge=0, lt=2**63)]


@cache
def _warn(sentence: str) -> None:
    """Once a process: a run folder's recipe is read more than once."""
    _log.warning(sentence)


def _shipped_teachers() -> tuple[dict[str, str], ...]:
    return tuple({"name": c, "adapter": c, "capability": c} for c in CAPABILITIES)


class Recipe(Part):
    """Everything a merge needs. Without teachers it takes the shipped ones, on the shipped base."""

    base: BaseName = Field("base", examples=["black-forest-labs/FLUX.2-klein-base-4B"])
    """The base model: a folder that `save_pretrained` wrote, owner/name on the hub, or `base`, the small one that is
    shipped."""
    teachers: tuple[Teacher, ...] = Field(
        default_factory=_shipped_teachers, validate_default=True, examples=[TWO_TEACHERS]
    )
    """Two or more teachers. `generation: X` and `editing: Y` at the top level stand for two teachers with these
    adapters."""
    output: Output = Path("student")
    """Run folder; the student is in it."""
    steps: int = Field(2000, gt=0, le=10**7)
    """Optimizer steps."""
    batch: Rows = 8
    """Rows of an update."""
    seed: Seed = 0
    """Same seed, same machine: the same bytes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; `auto`: a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", examples=["bf16"])
    """Of the frozen models; the student and AdamW are fp32. `auto`: bf16 where the card has it and the base is not
    stored in fp32."""
    base_dtype: Literal["nf4", "int8", "fp8", "gguf"] | None = None
    """How the frozen base's Linears are quantised; null: not. `gguf`: as the file that `gguf` names."""
    gguf: GgufFile | None = Field(None, examples=["flux1-dev-Q4_K_S.gguf"])
    """The file of `base_dtype: gguf`, in place of the base's transformer."""
    offload: Literal["none", "blocks"] = "none"
    """`blocks`: all of the base but one block waits in the computer's memory."""
    micro_batch: MicroBatch = Field("auto", examples=[2])
    """Rows of the batch at a time; null: all. `auto`: as many as fit."""
    gradient_checkpointing: Literal["auto", True, False] = "auto"
    """Compute activations again in the backward pass instead of keeping them. `auto`: where they do not fit."""
    compile: bool = False
    """Compile the transformer's repeated blocks with torch.compile."""
    kernels: Literal["auto", True, False] = "auto"
    """Fused kernels around attention. `auto`: on a GPU, where a trial finds them right and faster."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: each has the whole base, or a share of it."""
    student: Student = Student()
    """The LoRA that learns."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    ema: Unit = 0.99
    """Decay of the average of the LoRA's weights, which is what is exported."""
    rollout: Rollout = Rollout()
    """How the student rolls out."""
    fast: Fast | None = Field(None, examples=[{"steps": 8, "adapter": "lightning-8steps.safetensors"}])
    """A student of few steps (docs/many-teachers.md); null: it draws with as many as its base."""
    query: Query = Query()
    """Where the teachers are queried."""
    routing: Routing = Routing()
    """Which row has which teacher."""
    objective: ObjectiveName = "danceopd"
    """What is learnt: `danceopd` is the method, `nft` learns from ranked samples of the student's own, the others are
    for comparison (docs/method.md); or a plug-in (docs/plugins.md)."""
    objective_options: dict[str, Any] = Field({}, examples=[{"delta": 0.5}])
    """Keyword arguments of an objective that is a plug-in."""
    flowopd: FlowOPD = FlowOPD()
    """Of objective flowopd."""
    offpolicy: OffPolicy = OffPolicy()
    """Of objective offpolicy."""
    nft: NFT = NFT()
    """Of objective nft: the student's own samples, ranked by frozen rewards (docs/labelfree.md)."""
    guidance: Guidance = Guidance()
    """Rows without a prompt."""
    gates: Gates = Gates()
    """Weights of rows and tokens, off unless given (docs/gates.md)."""
    contrast: dict[str, Contrast] = Field({}, examples=[{"generation": {"reference": "others"}}])
    """Targets that go past a teacher, by the teacher's name or capability (docs/labelfree.md)."""
    data: Data = Data()
    """Prompts and edit pairs."""
    samples: Samples = Samples()
    """Grids of sample pictures during the run."""
    validation: Validation = Validation()
    """Velocity error on held-out rows during the run."""
    monitor: Monitor = Monitor()
    """Checks for confident mistakes during the run."""
    save_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept."""
    time_limit: PositiveFloat | None = Field(None, examples=[120])
    """Minutes after which the run stops, with a student; null: none."""
    call: Annotated[dict[str, Any], AfterValidator(check_call)] = Field({}, examples=[{"height": 1024, "width": 1024}])
    """Settings of the pipeline's call that you will generate with, over the base's own."""
    family: FamilyName | None = Field(None, examples=["flux1"])
    """Pipeline family (docs/bring-your-own-model.md), or a plug-in; null: by the base's pipeline class."""
    callbacks: Callbacks = Field({}, examples=[{"my_module:Notes": {"every": 100}}])
    """Plug-ins that watch the run, by name, with their options (docs/plugins.md)."""
    trackers: Trackers = Field({"tensorboard": {}}, examples=[{"wandb": {"project": "my-loras"}}])
    """Where figures and sample pictures go besides the run folder (docs/trackers.md); `none`: nowhere."""
    editing_base: EditingBase = Field(None, examples=["Qwen/Qwen-Image-Edit"])
    """A pipeline that has what the base lacks for editing, such as an image processor; null: none."""

    def __init__(self, /, _where: str = "the recipe", **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UserError(explain_validation_error(error, type(self), _where)) from None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        """Old keys under their new names; `generation: X` and `editing: Y` stand for the two teachers of those names.
        """
        if not isinstance(data, Mapping):
            return data
        data, warnings = modernise(data)
        for sentence in warnings:
            _warn(sentence)
        if not any(c in data for c in CAPABILITIES):
            return data
        short = {c: data.pop(c) for c in CAPABILITIES if c in data}
        if "teachers" in data:
            raise ValueError(f"`teachers` and `{next(iter(short))}` both name teachers; keep one of the two")
        data["teachers"] = [t | {"adapter": short.get(t["name"], t["adapter"])} for t in _shipped_teachers()]
        return data

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.fast is not None:
            found = with_fast_steps(self.fast, portable(self.base), self.rollout, self.call)
            for key, value in zip(("rollout", "call"), found):
                object.__setattr__(self, key, value)
        for key, value in settled_data(self).items():
            object.__setattr__(self, key, value)
        check(self)
        for key in self.call:
            if key not in CALL_MOST:
                raise ValueError(f"unknown key call.{key}{did_you_mean(key, CALL_MOST)}")
        known = ["base", "blend", *(teacher.name for teacher in self.teachers)]
        if self.student.init not in known:
            hint = did_you_mean(self.student.init, [*known, *BLENDS])
            init = existing(self.student.init, "student.init", hint=hint, shipped_names=False)
            object.__setattr__(self, "student", self.student.model_copy(update={"init": init}))
        return self

    # -- reading --------------------------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, path: str | Path, **flags: Any) -> Recipe:
        """The recipe in a YAML file; fields given in `flags` (and not None) win over the file's."""
        fields = read_yaml(Path(path), "recipe")
        if not fields:
            raise UserError(f"recipe {path} is empty; write what to merge, or name no recipe for the shipped models")
        return cls._with_flags(fields, flags, str(path))

    @classmethod
    def load(cls, path: str | Path | None = None, **flags: Any) -> Recipe:
        """What the command line uses: a file, then flags (None: not given), `settings` by dotted key among them.

        Without a file and without a model among the flags: the shipped demo.
        """
        if path is None and all(flags.get(model) is None for model in ("base", *CAPABILITIES)):
            return cls._with_flags(read_yaml(demo(), "recipe"), flags, "the command line")
        return cls._with_flags({}, flags, "the command line") if path is None else cls.from_yaml(path, **flags)

    @classmethod
    def _with_flags(cls, fields: dict[str, Any], flags: Mapping[str, Any], where: str) -> Recipe:
        given = {key: value for key, value in flags.items() if value is not None and key != "settings"}
        if isinstance(fields.get("teachers"), list):
            for capability in [c for c in CAPABILITIES if c in given]:
                teachers = [t for t in fields["teachers"] if isinstance(t, dict)]
                ours = [t for t in teachers if t.get("capability") == capability]
                if len(ours) != 1:
                    count = f"{len(ours)} {capability} teachers"
                    raise UserError(f"--{capability} is ambiguous: {where} has {count}; edit the file")
                ours[0]["adapter"] = given.pop(capability)
        settings = flags.get("settings") or {}
        return cls(f"{where} with --set" if settings else where, **with_settings({**fields, **given}, settings))

    # -- writing --------------------------------------------------------------------------------------

    def resolved(self) -> dict[str, Any]:
        """Plain data that makes the same recipe again; shipped checkpoints by name, other paths absolute."""
        data = self.model_dump(mode="json")
        data["base"] = portable(self.base)
        data["editing_base"] = None if self.editing_base is None else portable(self.editing_base)
        for teacher in data["teachers"]:
            teacher["adapter"] = portable(teacher["adapter"])
        return data

    def identity(self) -> dict[str, Any]:
        """`resolved()` without what may change when a run is continued."""
        free = set(CONTINUES) - ({"validation"} if self.routing.per == "need" else set())
        kept = {key: value for key, value in self.resolved().items() if key not in free}
        for key in ("cuda_graphs", "merged"):
            kept["rollout"].pop(key)
        return kept

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `Recipe.from_yaml` reads it back to an equal one."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=110)

    def replaced(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, by key: `{"dtype": "bf16", "rollout.merged": False, "call.height": 512}`."""
        changed: dict[str, Any] = {}
        for key, value in values.items():
            part, _, name = key.partition(".")
            held = changed.get(part, getattr(self, part))
            if name:
                value = {**held, name: value} if isinstance(held, dict) else held.model_copy(update={name: value})
            changed[part] = value
        return self.model_copy(update=changed)

    # -- asking ---------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        """The value of a key such as `rollout.merged`."""
        part, _, name = key.partition(".")
        return getattr(getattr(self, part), name) if name else getattr(self, part)

    @property
    def rows_at_once(self) -> int:
        """Rows of the batch that are rolled out and learnt together (`micro_batch`)."""
        return self.micro_batch if isinstance(self.micro_batch, int) else self.batch

    @property
    def group_size(self) -> int:
        """Rows of an update that are rollouts of one sample and stay in one batch."""
        return {"flowopd": self.flowopd.group, "nft": self.nft.group}.get(self.objective, self.gates.group)

    @property
    def small_steps(self) -> int:
        """Steps of a teacher within one step of the student."""
        return 1 if self.fast is None else self.fast.teacher_steps

    @property
    def one_level(self) -> bool:
        """Whether the rows of a group are queried at one noise level, for they are compared."""
        return self.objective == "nft" or self.gates.group > 1

    @property
    def monitored_every(self) -> int:
        """Steps between the monitor's checks, 0: none; without a word of the recipe, where it goes beyond plain
        distillation: gates, moved targets, rewards."""
        return self.monitor.interval(self.gates.on or self.objective == "nft" or self.moves_targets)

    @property
    def moves_targets(self) -> bool:
        """Whether `contrast` moves the target of any teacher."""
        return any(map(self.contrast_of, self.teachers))

    @property
    def sampling(self) -> Sampling:
        """Which teachers and rows the updates sample."""
        shares = tuple(self.shares()[teacher.name] for teacher in self.teachers)
        rounds = (self.nft.round, self.nft.distinct) if self.objective == "nft" else (1, 1)
        return Sampling(self.seed, self.steps, self.batch // self.group_size, shares, self.routing, *rounds)

    @property
    def objective_arguments(self) -> dict[str, Any]:
        """What the objective is called with besides a batch and velocities."""
        if self.objective not in OBJECTIVES:
            return self.objective_options
        if self.objective == "nft":
            return self.nft.model_dump(include={"beta", "share", "anchor"})
        options = {"flowopd": self.flowopd, "offpolicy": self.offpolicy}.get(self.objective)
        return {} if options is None else options.model_dump()

    @property
    def needs_targets(self) -> bool:
        """Whether the objective learns from finished pictures of the data; a plug-in says so itself."""
        if self.objective not in OBJECTIVES:
            return bool(getattr(load("objective", self.objective), "needs_targets", False))
        return self.objective == "supervised" or (self.objective == "offpolicy" and self.offpolicy.clean == "targets")

    def has(self, capability: str) -> bool:
        """Whether a teacher has this capability."""
        return any(teacher.capability == capability for teacher in self.teachers)

    def shares(self) -> dict[str, float]:
        """The share of the rows that is routed to each teacher, by name; sums to 1."""
        raw = {t.name: self.routing.weights.get(t.name, t.weight) for t in self.teachers}
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def contrast_of(self, teacher: Teacher) -> Contrast | None:
        """How a teacher's target is moved: as its name says, else its capability; None where it is not."""
        found = self.contrast.get(teacher.name, self.contrast.get(teacher.capability))
        return found if found is not None and found.weight else None

    def data_source(self, teacher: Teacher) -> str:
        """Where the prompts, or edit pairs, of a teacher come from."""
        return teacher.data or getattr(self.data, teacher.capability)

    def columns(self, teacher: Teacher) -> Columns:
        """What the columns of a teacher's data are called."""
        return teacher.columns or (self.data.columns if teacher.data is None else Columns())
