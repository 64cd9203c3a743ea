"""The gates of a recipe: how far an answer is trusted, and what a teacher is told that the student is not.

    gates: {evidence: true}                      # or with knobs: {evidence: {alpha: -0.5, contrast: prompt}}
    gates: {evidence: true, consensus: true, skills: {eta: 0.5}, group: 4}

`true` is a gate with its defaults, `false` is none. With none on, a run is plain DanceOPD. docs/labelfree.md has the
equations; a key here is a letter there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from .recipe_parts import Part

Degradation = Literal["blur", "jpeg", "noise", "downscale"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)


def _null(value: Any) -> Any:
    return "null" if value is None else value  # YAML reads a bare null as nothing


Contrast = Annotated[Literal["null", "prompt", "source"], BeforeValidator(_null)]


class Evidence(Part):
    """V-Zero's gate: the teacher is asked again with a contrast, and the difference says where and how far it edits.

    `contrast` is what it is asked instead: the null prompt on the same source, another row's prompt, or another row's
    source (generation rows, which have none, are then asked another row's prompt). A positive `alpha` raises rows that
    already follow the teacher, a negative one those that do not.
    """

    alpha: float = Field(0.5, ge=-2, le=2)  # of row weights, by the group's standard score; 0: all rows are equal
    tokens: float = Field(0.5, ge=0, le=1)  # of token weights, towards where the answers differ; 0: all are equal
    contrast: Contrast = "null"
    bounds: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=1, le=4)]] = (0.25, 2.0)


class Consensus(Part):
    """Self-consistency: answers that agree across framings, and not with a wrong prompt, count up to 1 + `bound`.

    Framings are other wordings: the data's column `paraphrases`, else a rule for the exact world's templates.
    """

    bound: float = Field(0.5, ge=0, le=0.5)
    framings: int = Field(3, ge=2, le=7)  # at most, its own among them


class Told(Part):
    """What the teacher of generation rows is told besides, at a critical step and else."""

    step: Literal["guided", "caption", "none"] = "guided"
    episode: Literal["guided", "caption", "none"] = "caption"


class ToldEdit(Part):
    """What the teacher of editing rows is told besides, at a critical step and else."""

    step: Literal["source", "guided", "caption", "none"] = "source"
    episode: Literal["guided", "caption", "none"] = "caption"


class Skills(Part):
    """OPID's skills: some rows ask where their own walk decides, and the teacher knows more than the student does.

    `guided` is classifier-free guidance about the teacher's own answer, `caption` the data's column `expanded` (else a
    rule for the exact world's templates), `source` the clean source of which the student sees a degraded copy.
    """

    eta: float = Field(1.0, ge=0, le=1)  # share of the shift that is taken; 0: nobody is told anything
    radius: float = Field(0.1, gt=0, le=1)  # largest shift, as a share of the answer's own length
    critical: float = Field(0.5, ge=0, le=1)  # share of questions asked at critical steps; the law draws the others
    top: float = Field(0.25, gt=0, le=1)  # share of the steps that count as critical
    until: float = Field(1.0, gt=0, le=1)  # share of the walk whose steps may be critical: it ends there
    scale: float = Field(3.0, gt=1)  # of guided
    generation: Told = Told()
    editing: ToldEdit = ToldEdit()
    degrade: tuple[Degradation, ...] = Field(DEGRADATIONS, min_length=1)

    def told(self, capability: str) -> Told | ToldEdit:
        """What the teachers of a capability are told."""
        return self.editing if capability == "editing" else self.generation


class Gates(Part):
    """Which gates are on. `group` walks of one question are weighed against each other; 1: against running means."""

    evidence: Evidence | None = None
    consensus: Consensus | None = None
    skills: Skills | None = None
    group: PositiveInt = 1

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
    def _agree(self) -> Gates:
        if self.group > 1 and self.evidence is None:
            raise ValueError("group compares walks of one question, which only evidence asks for; leave it out")
        return self

    @property
    def on(self) -> bool:
        """Whether any gate is on."""
        return not (self.evidence is None and self.consensus is None and self.skills is None)

    def contrast(self, capability: str) -> str | None:
        """What the teachers of a capability are asked instead, for `evidence`; None: nothing."""
        if self.evidence is None:
            return None
        other = self.evidence.contrast
        return "prompt" if other == "source" and capability != "editing" else other

    def null(self, capability: str) -> bool:
        """Whether the null prompt is asked."""
        told = None if self.skills is None or not self.skills.eta else self.skills.told(capability)
        return self.contrast(capability) == "null" or (told is not None and "guided" in (told.step, told.episode))
