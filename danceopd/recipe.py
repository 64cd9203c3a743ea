"""What to merge, and how: one frozen pydantic model that YAML files, flags and Python share.

Every default of a merge stands here and in its parts (`recipe_parts`, `recipe_gates`, …) and nowhere else, and is the
paper's; what `danceopd merge` does with nothing given is the shipped recipe `checkpoints/demo.yaml`. A `Recipe` that
exists is a valid one: unknown keys, impossible numbers, missing files and misspelt names are refused when it is made,
with a `UserError` that names the key, the file and the nearest thing that would have been right.
Shipped checkpoints ("base", "generation", ...) go by their bare names; a folder is written "./generation".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from .errors import UserError
from .recipe_gap import Gap
from .recipe_gates import Gates
from .recipe_parts import (
    BlendMethod,
    Data,
    FlowOPD,
    Guidance,
    OffPolicy,
    Optimizer,
    Part,
    Query,
    Rollout,
    Routing,
    Samples,
    Student,
    Teacher,
    Unit,
    Work,
    existing,
)
from .recipe_watch import Watch
from .sentences import explain, nearest, read_yaml
from .shipped import SHIPPED, demo, portable, shipped

__all__ = ["CAPABILITIES", "SHIPPED", "BlendMethod", "Gates", "Recipe", "Student", "Teacher", "Work", "shipped"]

CAPABILITIES = ("generation", "editing")
CALL_KEYS = ("height", "width", "steps", "max_sequence_length", "guidance_scale")
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
    "gap",
    "watch",
)
"""Fields that may differ between a run and its continuation: but for rounding they change nothing a step computes."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _editing_base(value: Any) -> Any:
    return None if value is None else existing(value, "editing base", hub=True, shipped_names=False)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    for key, value in call.items():
        kinds, kind = ((int, float), "a number") if key == "guidance_scale" else ((int,), "a whole number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
            raise ValueError(f"{key} is {value!r}; it must be {kind} greater than 0")
    return call


def _base(value: Any) -> Any:
    return existing(value, "base model", hub=True)


def _shipped_teachers() -> tuple[dict[str, str], ...]:
    return tuple({"name": c, "adapter": c, "capability": c} for c in CAPABILITIES)


class Recipe(Part):
    """Everything a merge needs. Without teachers it takes the shipped ones, on the shipped base."""

    base: Annotated[str, BeforeValidator(_base)] = "base"
    teachers: tuple[Teacher, ...] = Field(default_factory=_shipped_teachers, validate_default=True)
    output: Path = Path("student")
    steps: PositiveInt = 2000
    batch: PositiveInt = 8
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the frozen models; the student and Adam are fp32
    micro_batch: PositiveInt | None = None  # rows of the batch at a time; None: all
    gradient_checkpointing: bool = False
    compile: bool = False  # the transformer's repeated blocks, by torch.compile
    kernels: Literal["auto", True, False] = "auto"  # fused around attention; auto: on a GPU, where a trial says so
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes, each has the whole base, or a share of it
    student: Student = Student()
    optimizer: Optimizer = Optimizer()
    ema: Unit = 0.99
    rollout: Rollout = Rollout()
    query: Query = Query()
    routing: Routing = Routing()
    objective: Literal["danceopd", "diffusionopd", "flowopd", "offpolicy", "supervised"] = "danceopd"
    flowopd: FlowOPD = FlowOPD()
    offpolicy: OffPolicy = OffPolicy()
    guidance: Guidance = Guidance()
    gates: Gates = Gates()
    data: Data = Data()
    samples: Samples = Samples()
    gap: Gap = Gap()
    watch: Watch = Watch()
    save_every: PositiveInt = 100
    keep_last: PositiveInt = 2  # checkpoints
    time_limit: PositiveFloat | None = None  # minutes
    call: Annotated[dict[str, Any], AfterValidator(_call)] = {}  # over the base's own: CALL_KEYS
    family: str | None = None  # a key of pipelines.FAMILIES; None: by the base's pipeline class
    editing_base: Annotated[str | None, BeforeValidator(_editing_base)] = None  # has what the base lacks for editing

    def __init__(self, /, _where: str = "the recipe", **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UserError(explain(error, type(self), _where)) from None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        """`generation: X` and `editing: Y` stand for the two teachers of those names."""
        if not isinstance(data, Mapping) or not any(c in data for c in CAPABILITIES):
            return data
        data = dict(data)
        short = {c: data.pop(c) for c in CAPABILITIES if c in data}
        if "teachers" in data:
            raise ValueError(f"`teachers` and `{next(iter(short))}` both name teachers; keep one of the two")
        data["teachers"] = [t | {"adapter": short.get(t["name"], t["adapter"])} for t in _shipped_teachers()]
        return data

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two teachers are named {twice!r}; give each its own name")
        if len(names) < 2:
            raise ValueError(f"a merge needs at least two teachers and here is {len(names)}; add another")
        taken = next((name for name in names if name in ("student", "base", "blend")), None)
        if taken:
            raise ValueError(f"a teacher may not be named {taken!r}, which means something else; rename it")
        odd = next((t.name for t in self.teachers if t.negative is not None and t.guidance is None), None)
        if odd:
            raise ValueError(f"teacher {odd!r} has a negative prompt and no guidance; give it guidance, such as 3.5")
        if all(teacher.adapter == "base" and teacher.guidance is None for teacher in self.teachers):
            raise ValueError("every teacher is the bare base, so there is nothing to merge; give one an adapter")
        for key, weights in {
            "routing.weights": self.routing.weights,
            "student.init_weights": self.student.init_weights,
        }.items():
            for name in weights:
                if name not in names:
                    raise ValueError(f"{key} names {name!r}, which is no teacher{nearest(name, names)}")
        self._learns()
        for key in self.call:
            if key not in CALL_KEYS:
                raise ValueError(f"unknown key call.{key}{nearest(key, CALL_KEYS)}")
        if self.family is not None:
            from .pipelines.families import FAMILIES  # late: it imports torch

            if self.family not in FAMILIES:
                raise ValueError(f"family is {self.family!r}, which is unknown{nearest(self.family, FAMILIES)}")
        words = ["base", "blend", *names]
        if self.student.init not in words:
            hint = nearest(self.student.init, words)
            init = existing(self.student.init, "student.init", hint=hint, shipped_names=False)
            object.__setattr__(self, "student", self.student.model_copy(update={"init": init}))
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output {self.output} is a file; name a folder")
        return self

    def _learns(self) -> None:
        """Refuses what the objective would ignore, or cannot do."""
        objective, walk = self.objective, self.rollout
        if walk.noise and walk.solver != "euler":
            raise ValueError(f"rollout.solver {walk.solver} cannot take random steps; leave it out, or rollout.noise")
        if objective == "flowopd":
            if not walk.noise:
                raise ValueError("objective flowopd learns from random walks; set rollout.noise (its paper: 0.7)")
            if self.batch % self.flowopd.group:
                raise ValueError(f"batch {self.batch} is no multiple of flowopd.group, {self.flowopd.group}")
        if objective in ("diffusionopd", "flowopd") and self.query != Query():
            raise ValueError(f"objective {objective} asks at every step, so query has no meaning; leave it out")
        if objective != "flowopd" and self.flowopd != FlowOPD():
            raise ValueError(f"flowopd is set, and the objective is {objective}; leave it out")
        if objective != "offpolicy" and self.offpolicy != OffPolicy():
            raise ValueError(f"offpolicy is set, and the objective is {objective}; leave it out")
        walks = objective not in ("offpolicy", "supervised")
        if not walks and self.rollout != Rollout(steps=walk.steps):
            raise ValueError(f"objective {objective} has no student walk; of rollout, keep steps only")
        if walk.keep_source and self.parallel == "fsdp":
            raise ValueError("rollout.keep_source needs the whole base in each process; leave it out, or parallel fsdp")
        self._gated()
        self.gap.agree()
        self.watch.agree(self.gates.on)
        if (self.micro_batch or self.batch) < self.unit:
            group = "flowopd.group" if objective == "flowopd" else "gates.group"
            raise ValueError(f"micro_batch {self.micro_batch} splits the walks of one question, {group} {self.unit}")
        if self.routing.per == "turn" and len(set(self.shares().values())) > 1:
            raise ValueError("routing.per turn gives each teacher equal turns; leave out the weights")

    def _gated(self) -> None:
        """Refuses gates where they would be ignored, or cannot do what they are asked."""
        gates = self.gates
        if not gates.on:
            return
        if self.objective != "danceopd":
            raise ValueError(f"gates weigh what objective danceopd learns, and the objective is {self.objective}")
        if self.batch % gates.group:
            raise ValueError(f"batch {self.batch} is no multiple of gates.group, {gates.group}")
        capabilities = {teacher.capability for teacher in self.teachers}
        if gates.evidence is not None and gates.evidence.contrast == "source" and "editing" not in capabilities:
            raise ValueError("gates.evidence.contrast is source, and no teacher edits; choose prompt or null")
        if gates.skills is not None and gates.skills.critical and self.rollout.steps < 2:
            raise ValueError("gates.skills.critical compares steps and needs walks of two steps or more, rollout.steps")

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
        """What the command line uses: a file, then flags (None: not given).

        Without a file and without a model among the flags: the shipped demo.
        """
        if path is None and all(flags.get(model) is None for model in ("base", *CAPABILITIES)):
            return cls._with_flags(read_yaml(demo(), "recipe"), flags, "the command line")
        return cls._with_flags({}, flags, "the command line") if path is None else cls.from_yaml(path, **flags)

    @classmethod
    def _with_flags(cls, fields: dict[str, Any], flags: Mapping[str, Any], where: str) -> Recipe:
        given = {key: value for key, value in flags.items() if value is not None}
        if isinstance(fields.get("teachers"), list):
            for capability in [c for c in CAPABILITIES if c in given]:
                teachers = [t for t in fields["teachers"] if isinstance(t, dict)]
                ours = [t for t in teachers if t.get("capability") == capability]
                if len(ours) != 1:
                    count = f"{len(ours)} {capability} teachers"
                    raise UserError(f"--{capability} is ambiguous: {where} has {count}; edit the file")
                ours[0]["adapter"] = given.pop(capability)
        return cls(where, **{**fields, **given})

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
        kept = {key: value for key, value in self.resolved().items() if key not in CONTINUES}
        kept["rollout"].pop("captured")
        return kept

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `Recipe.from_yaml` reads it back to an equal one."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=110)

    # -- asking ---------------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Rows of an update that are walks of one question, and are learnt together."""
        return self.flowopd.group if self.objective == "flowopd" else self.gates.group

    def shares(self) -> dict[str, float]:
        """How often each teacher is asked, by name; sums to 1."""
        raw = {t.name: self.routing.weights.get(t.name, t.weight) for t in self.teachers}
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def work(self, teacher: Teacher) -> str:
        """The data source that a teacher is asked about."""
        return teacher.data or getattr(self.data, teacher.capability)
