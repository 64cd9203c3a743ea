"""The label-free parts of a recipe: gates that weigh the teachers' answers, targets that are moved away from a
reference, and the monitor of confident mistakes.

    gates: {evidence: true}                      # or with settings: {evidence: {alpha: -0.5, contrast: prompt}}
    gates: {evidence: true, consensus: true, skills: {eta: 0.5}}
    contrast: {generation: {reference: others, weight: 1.0}}
    monitor: {every: 100, judge: path/to/clip, rollback: plain}

`true` is a gate with its defaults, `false` is none. With none on, a run is plain DanceOPD. docs/labelfree.md and
docs/gates.md have the equations; a key here is a letter there. The monitor changes nothing that an update computes
until an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, WithJsonSchema, model_validator

from danceopd.recipe.parts import Part, Rows, existing

Degradation = Literal["blur", "jpeg", "noise", "downscale"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)
REFERENCES = ("base", "weaker", "others", "null", "prompt", "source")
"""References of a contrast that are no teacher's name."""
MONITOR_EVERY = 100
"""Steps between the monitor's checks where the recipe does not say."""


def _null(value: Any) -> Any:
    return "null" if value is None else value  # YAML reads a bare null as nothing


EvidenceContrast = Annotated[
    Literal["null", "prompt", "source"],
    BeforeValidator(_null),
    WithJsonSchema({"enum": ["null", "prompt", "source", None]}),
]


class Evidence(Part):
    """V-Zero's gate: the teacher is queried again under a contrast; the difference says where and how far it edits.

    Generation rows have no source, so contrast `source` gives them another row's prompt. A positive `alpha` raises rows
    that already follow the teacher, a negative one those that do not.
    """

    alpha: float = Field(0.5, ge=-2, le=2)
    """Strength of row weights, by the group's standard score; 0: all rows count alike."""
    tokens: float = Field(0.5, ge=0, le=1)
    """Strength of token weights, towards where the two answers differ; 0: all count alike."""
    contrast: EvidenceContrast = "null"
    """The other condition: the null prompt, another row's prompt, or another row's source."""
    bounds: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=1, le=4)]] = (0.25, 2.0)
    """Smallest and largest weight."""


class Consensus(Part):
    """Self-consistency: a teacher that agrees with itself over paraphrases, and not under a wrong prompt, counts more.

    Weights go up to 1 + `bound`. Paraphrases are the data's column `paraphrases`, else a rule for the built-in
    scenes' templates.
    """

    bound: float = Field(0.5, ge=0, le=0.5)
    """Weights go up to 1 plus this."""
    framings: int = Field(3, ge=2, le=7)
    """Wordings of a prompt at most, the prompt itself among them."""


class PrivilegedContext(Part):
    """What the teacher of generation rows sees and the student does not: at a critical step, and elsewhere."""

    step: Literal["guided", "caption", "none"] = "guided"
    """At a critical step."""
    episode: Literal["guided", "caption", "none"] = "caption"
    """Elsewhere."""


class PrivilegedEditContext(Part):
    """What the teacher of editing rows sees and the student does not: at a critical step, and elsewhere."""

    step: Literal["source", "guided", "caption", "none"] = "source"
    """At a critical step."""
    episode: Literal["guided", "caption", "none"] = "caption"
    """Elsewhere."""


class Skills(Part):
    """OPID's skills: some rows are queried where their own rollout decides, by a teacher with privileged context.

    `guided` is classifier-free guidance about the teacher's own answer, `caption` the data's column `expanded` (else a
    rule for the built-in scenes' templates), `source` the clean source of which the student sees a degraded copy.
    """

    eta: float = Field(1.0, ge=0, le=1)
    """Share of the shift that is taken; 0: no privileged context."""
    radius: float = Field(0.1, gt=0, le=1)
    """Trust region: the largest shift, as a share of the answer's own norm."""
    critical: float = Field(0.5, ge=0, le=1)
    """Share of rows that are queried at critical steps; the query law draws the others."""
    top: float = Field(0.25, gt=0, le=1)
    """Share of the steps that count as critical."""
    until: float = Field(1.0, gt=0, le=1)
    """Share of the rollout whose steps may be critical; it ends there."""
    scale: float = Field(3.0, gt=1)
    """Scale of `guided`."""
    generation: PrivilegedContext = PrivilegedContext()
    """What teachers of generation rows see besides."""
    editing: PrivilegedEditContext = PrivilegedEditContext()
    """What teachers of editing rows see besides."""
    degrade: tuple[Degradation, ...] = Field(DEGRADATIONS, min_length=1)
    """How the student's copy of a source is degraded; one is drawn a row."""

    def privileged(self, capability: str) -> PrivilegedContext | PrivilegedEditContext:
        """What the teachers of a capability see besides."""
        return self.editing if capability == "editing" else self.generation


class Gates(Part):
    """Which gates are on. With `group` > 1 that many rollouts of one sample are compared; 1: with running means."""

    evidence: Evidence | None = Field(None, examples=[True])
    """Weigh rows and tokens by a second query under a contrast; `true`: with its defaults."""
    consensus: Consensus | None = Field(None, examples=[True])
    """Weigh rows by how much a teacher agrees with itself over paraphrases; `true`: with its defaults."""
    skills: Skills | None = Field(None, examples=[{"eta": 0.5}])
    """Query some rows where their rollout decides, with privileged context; `true`: with its defaults."""
    group: Rows = 1
    """Rollouts of one sample that evidence compares; 1: with running means."""

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, data: Any) -> Any:
        """`true` and `false` switch a gate."""
        if not isinstance(data, Mapping):
            return data
        switch: dict[Any, Any] = {True: {}, False: None}
        names = ("evidence", "consensus", "skills")
        return {k: switch[v] if k in names and isinstance(v, bool) else v for k, v in data.items()}

    @model_validator(mode="after")
    def _check(self) -> Gates:
        if self.group > 1 and self.evidence is None:
            raise ValueError("group compares rollouts of one sample, which only evidence does; leave it out")
        return self

    @property
    def on(self) -> bool:
        """Whether any gate is on."""
        return not (self.evidence is None and self.consensus is None and self.skills is None)

    def contrast(self, capability: str) -> str | None:
        """The contrast of the evidence gate for teachers of a capability; None: the gate is off."""
        if self.evidence is None:
            return None
        other = self.evidence.contrast
        return "prompt" if other == "source" and capability != "editing" else other

    def needs_null(self, capability: str) -> bool:
        """Whether teachers of a capability are queried with the null prompt."""
        context = None if self.skills is None or not self.skills.eta else self.skills.privileged(capability)
        guided = context is not None and "guided" in (context.step, context.episode)
        return self.contrast(capability) == "null" or guided


class Contrast(Part):
    """A teacher's velocity as a target that goes past it: `v + weight (v - v_ref)`, `v_ref` a frozen reference's.

    It is given by teacher or capability: `contrast: {generation: {reference: others}}`.
    """

    reference: str = "others"
    """`base`, `weaker` (the teacher itself at `strength`), another teacher's name, `others` (their mean), `null` (the
    null prompt), `prompt` or `source` (those of another row)."""
    strength: float = Field(0.5, gt=0, lt=1, examples=[0.7])
    """Of reference `weaker`: the teacher's scale in it, as a share of its own."""
    weight: float = Field(1.0, ge=0, le=10)
    """How far the target moves away from the reference; 0: not at all."""
    sigma: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Noise levels at which it is moved, the lower first."""
    bound: PositiveFloat | None = Field(None, examples=[1.0])
    """Largest move, as a share of the norm of the teacher's velocity; null: none."""
    mask: bool = False
    """Move it only where the two differ."""

    @model_validator(mode="after")
    def _check(self) -> Contrast:
        if self.sigma[0] >= self.sigma[1]:
            raise ValueError(f"sigma is {list(self.sigma)}; give the lower noise level first, such as [0.5, 1]")
        return self


def _judge(value: Any) -> Any:
    return None if value is None else existing(value, "similarity model", hub=True, shipped_names=False)


class Monitor(Part):
    """Looks for confident mistakes; on in every run with gates, moved targets or rewards, and where `every` is given.

    `judge` is a similarity model of transformers (CLIP, SigLIP; DINO compares with the teachers' own pictures). None:
    the exact scorer where the data is "scenes", else a frozen model that does not teach the row. The six after it are
    limits (`labelfree.statistics.Limits`). `rollback`: an alarm restores the last good checkpoint, and then the run
    goes on as plain distillation (plain), or ends there (stop).
    """

    every: int | None = Field(None, ge=0, examples=[100])
    """Steps between checks; null: 100 where the run has gates, moved targets or rewards, else never; 0: never."""
    prompts: int = Field(64, ge=8, le=10**5)
    """Held-out prompts, over all teachers."""
    seeds: int = Field(4, ge=2, le=1000)
    """Pictures of each prompt."""
    judge: Annotated[str | None, BeforeValidator(_judge)] = Field(None, examples=["./clip-vit-large-patch14"])
    """A similarity model of transformers (CLIP, SigLIP, DINO): a folder or owner/name; null: the exact scorer of
    `scenes`, else a frozen model that does not teach the row."""
    mistakes: float = Field(0.25, ge=0, le=1)
    """Alarm above this share of confident mistakes."""
    spearman: float = Field(0.0, ge=-1, le=1)
    """Alarm where the rank correlation of confidence and score is below this."""
    checks: int = Field(3, ge=2)
    """Alarm where a confidence rises and the score falls at so many checks in a row."""
    strength: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Alarm outside these bounds of how far a wrong prompt moves the student, over how far it moves its teacher."""
    diversity: float = Field(0.7, ge=0)
    """Alarm where pictures of one prompt differ by less than this share of what is usual."""
    effective: float = Field(0.5, ge=0, le=1)
    """Alarm where the effective sample size of the row weights is below this share of the rows."""
    rollback: Literal["plain", "stop"] | None = None
    """After an alarm restore the last good checkpoint and go on as plain distillation (plain), or end there (stop);
    null: only say it."""

    @model_validator(mode="after")
    def _check(self) -> Monitor:
        if self.strength[0] >= self.strength[1]:
            raise ValueError(f"strength is {list(self.strength)}; give the lower bound first")
        return self

    def interval(self, wanted: bool) -> int:
        """Steps between checks, 0: none; `wanted` where the recipe does not say."""
        return (MONITOR_EVERY if wanted else 0) if self.every is None else self.every

    def forwards(self, steps: int, calls: float) -> float:
        """Forwards of one row in a check, without those of paraphrases and judge: the student's rollout of `steps`,
        its velocity under a wrong prompt, and the teacher's under both, at `calls` forwards each."""
        return self.prompts * self.seeds * (steps + 1 + 2 * calls)
