"""The label-free parts of a recipe: gates that weigh the teachers' answers, targets that are moved away from a
reference, and the monitor of confident mistakes.

    gates: {evidence: true}                      # or with settings: {evidence: {alpha: -0.5, contrast: prompt}}
    gates: {evidence: true, consensus: true, skills: {eta: 0.5}}
    contrast: {generation: {reference: others, weight: 1.0}}
    monitor: {every: 100, judge: path/to/clip, rollback: plain}

`true` is a gate with its defaults, `false` is none. With none on, a run is plain DanceOPD. docs/labelfree.md has the
equations; a key here is a letter there. The monitor changes nothing that an update computes until an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from danceopd.recipe.parts import Part, Rows, existing

Degradation = Literal["blur", "jpeg", "noise", "downscale"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)
REFERENCES = ("base", "others", "null", "prompt", "source")
"""References of a contrast that are no teacher's name."""
MONITOR_EVERY = 100
"""Steps between the monitor's checks where a gate is on and the recipe does not say."""


def _null(value: Any) -> Any:
    return "null" if value is None else value  # YAML reads a bare null as nothing


EvidenceContrast = Annotated[Literal["null", "prompt", "source"], BeforeValidator(_null)]


class Evidence(Part):
    """V-Zero's gate: the teacher is queried again under a contrast; the difference says where and how far it edits.

    `contrast` is the other condition: the null prompt on the same source, another row's prompt, or another row's source
    (generation rows, which have none, then get another row's prompt). A positive `alpha` raises rows that already
    follow the teacher, a negative one those that do not.
    """

    alpha: float = Field(0.5, ge=-2, le=2)  # of row weights, by the group's standard score; 0: all rows are equal
    tokens: float = Field(0.5, ge=0, le=1)  # of token weights, towards where the answers differ; 0: all are equal
    contrast: EvidenceContrast = "null"
    bounds: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=1, le=4)]] = (0.25, 2.0)


class Consensus(Part):
    """Self-consistency: a teacher that agrees with itself over paraphrases, and not under a wrong prompt, counts more.

    Weights go up to 1 + `bound`. Paraphrases are the data's column `paraphrases`, else a rule for the built-in
    scenes' templates.
    """

    bound: float = Field(0.5, ge=0, le=0.5)
    framings: int = Field(3, ge=2, le=7)  # wordings at most, the prompt itself among them


class PrivilegedContext(Part):
    """What the teacher of generation rows sees and the student does not: at a critical step, and elsewhere."""

    step: Literal["guided", "caption", "none"] = "guided"
    episode: Literal["guided", "caption", "none"] = "caption"


class PrivilegedEditContext(Part):
    """What the teacher of editing rows sees and the student does not: at a critical step, and elsewhere."""

    step: Literal["source", "guided", "caption", "none"] = "source"
    episode: Literal["guided", "caption", "none"] = "caption"


class Skills(Part):
    """OPID's skills: some rows are queried where their own rollout decides, by a teacher with privileged context.

    `guided` is classifier-free guidance about the teacher's own answer, `caption` the data's column `expanded` (else a
    rule for the built-in scenes' templates), `source` the clean source of which the student sees a degraded copy.
    """

    eta: float = Field(1.0, ge=0, le=1)  # share of the shift that is taken; 0: no privileged context
    radius: float = Field(0.1, gt=0, le=1)  # trust region: largest shift, as a share of the answer's own norm
    critical: float = Field(0.5, ge=0, le=1)  # share of rows queried at critical steps; the query law draws the others
    top: float = Field(0.25, gt=0, le=1)  # share of the steps that count as critical
    until: float = Field(1.0, gt=0, le=1)  # share of the rollout whose steps may be critical: it ends there
    scale: float = Field(3.0, gt=1)  # of guided
    generation: PrivilegedContext = PrivilegedContext()
    editing: PrivilegedEditContext = PrivilegedEditContext()
    degrade: tuple[Degradation, ...] = Field(DEGRADATIONS, min_length=1)

    def privileged(self, capability: str) -> PrivilegedContext | PrivilegedEditContext:
        """What the teachers of a capability see besides."""
        return self.editing if capability == "editing" else self.generation


class Gates(Part):
    """Which gates are on. With `group` > 1 that many rollouts of one sample are compared; 1: with running means."""

    evidence: Evidence | None = None
    consensus: Consensus | None = None
    skills: Skills | None = None
    group: Rows = 1

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

    `reference` is the bare "base", another teacher's name, "others" (the mean of all other teachers), "null" (the null
    prompt), "prompt" or "source" (the prompt or the source image of another row of the data). The target is moved at
    noise levels within `sigma` only, by at most `bound` times the norm of `v`. `mask`: only where the two differ.
    """

    reference: str = "others"
    weight: float = Field(1.0, ge=0, le=10)
    sigma: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    bound: PositiveFloat | None = None
    mask: bool = False

    @model_validator(mode="after")
    def _check(self) -> Contrast:
        if self.sigma[0] >= self.sigma[1]:
            raise ValueError(f"sigma is {list(self.sigma)}; give the lower noise level first, such as [0.5, 1]")
        return self


def _judge(value: Any) -> Any:
    return None if value is None else existing(value, "similarity model", hub=True, shipped_names=False)


class Monitor(Part):
    """Looks for confident mistakes; on in every run with a gate, and where `every` is given.

    `judge` is a similarity model of transformers (CLIP, SigLIP; DINO compares with the teachers' own pictures). None:
    the exact scorer where the data is "scenes", else a frozen model that does not teach the row. The six after it are
    limits (`labelfree.statistics.Limits`). `rollback`: an alarm restores the last good checkpoint, and then the run
    goes on without gates (plain), or ends there (stop).
    """

    every: int | None = Field(None, ge=0)  # steps; None: MONITOR_EVERY where a gate is on, else never; 0: never
    prompts: int = Field(64, ge=8, le=10**5)  # held out, over all teachers
    seeds: int = Field(4, ge=2, le=1000)  # pictures of each prompt
    judge: Annotated[str | None, BeforeValidator(_judge)] = None
    mistakes: float = Field(0.25, ge=0, le=1)
    spearman: float = Field(0.0, ge=-1, le=1)
    checks: int = Field(3, ge=2)
    strength: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    diversity: float = Field(0.7, ge=0)
    effective: float = Field(0.5, ge=0, le=1)
    rollback: Literal["plain", "stop"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Monitor:
        if self.strength[0] >= self.strength[1]:
            raise ValueError(f"strength is {list(self.strength)}; give the lower bound first")
        return self

    def interval(self, gated: bool) -> int:
        """Steps between checks, 0: none; `gated` says whether a gate is on."""
        return (MONITOR_EVERY if gated else 0) if self.every is None else self.every

    def forwards(self, steps: int, calls: float) -> float:
        """Forwards of one row in a check, without those of paraphrases and judge: the student's rollout of `steps`,
        its velocity under a wrong prompt, and the teacher's under both, at `calls` forwards each."""
        return self.prompts * self.seeds * (steps + 1 + 2 * calls)
