"""What `scores.json` and a line of `samples.jsonl` must hold for a report: `check_scores`, `check_row`.

A bench folder may be damaged, or a stranger's. It is checked once, at the door, so that nothing behind it has to be.
Fields that are not named here are left as they are; those of newer or older benches are optional.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Figure(_Part):
    mean: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    lower: float | None = None
    upper: float | None = None
    failed: int | None = None


class _Counted(_Figure):
    n: int

    @model_validator(mode="after")
    def _has_interval(self) -> _Counted:
        if self.mean is not None and (self.low is None or self.high is None):
            raise ValueError("a mean needs an interval")
        return self


class _Delta(_Counted):
    categories: dict[str, _Counted]


class _Means(_Part):
    overall: _Counted
    categories: dict[str, _Counted]
    groups: dict[str, _Figure] | None = None
    exact: _Means | None = None


class _Gap(_Part):
    share: float | None
    low: float | None
    high: float | None
    teacher: str


class _Best(_Figure):
    teacher: str


class _HeldOut(_Part):
    models: dict[str, dict[str, _Figure | None]] | None = None


class _Comparison(_Part):
    deltas: dict[str, _Delta]
    best_teacher: str | None = None
    gap_closed: _Gap | None = None
    against_best: dict[str, _Best] | None = None
    heldout: _HeldOut | None = None
    exact: _Comparison | None = None


class _Cell(_Part):
    base: _Figure
    teacher: _Figure | None = None
    verdict: str | None = None


class _Own(_Part):
    capability: str
    teacher: str
    gain: _Figure | None
    cells: dict[str, _Cell]
    category: str = ""


class _Interference(_Part):
    models: list[str]
    verdicts: dict[str, str]
    teachers: list[_Own]
    categories: list[_Own]


class _Probe(_Part):
    capability: str
    models: dict[str, _Counted]


class _Model(_Part):
    name: str
    label: str
    role: str
    path: str | None = None
    sha256: str | None = None
    generation: _Means | None = None
    editing: _Means | None = None


class _Suite(_Part):
    name: str
    version: str
    protocol: str
    scale: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    share: dict[str, bool] | None = None
    subsets: dict[str, list[str]] | None = None


class _Worst(_Figure):
    category: str
    capability: str
    against: str


class _Verdict(_Part):
    kind: str = Field(pattern="^(lost|kept|unknown)$")
    sentence: str
    margin: float
    worst: dict[str, _Worst]


class _Images(_Part):
    n: int | None = None
    near_duplicates: float | None = None
    constant: float | None = None


class _Reason(_Part):
    reason: str
    status: str
    count: int


class _Blend(_Part):
    label: str
    best: bool
    generation: float | None = None
    editing: float | None = None


class _Teacher(_Part):
    name: str
    adapter: str
    capability: str
    weight: float | None = None
    scale: float | None = None


class _Recipe(_Part):
    base: str
    teachers: list[_Teacher]
    rank: int
    steps: int


class _Ceiling(_Part):
    overall: float | None
    categories: dict[str, float | None]
    exact: _Ceiling | None = None


class _Ceilings(_Part):
    generation: _Ceiling | None = None
    editing: _Ceiling | None = None


class _Alarm(_Part):
    step: int
    sentence: str


class _Monitor(_Part):
    judge: str
    alarms: list[_Alarm]
    rolled_back: list[Any] | bool | None
    checks: int


class _Check(_Part):
    step: int
    error: float | None
    teachers: dict[str, float | None]


class _Validation(_Part):
    checks: list[_Check] = Field(min_length=1)
    exported: int

    @model_validator(mode="after")
    def _has_exported(self) -> _Validation:
        if all(check.step != self.exported for check in self.checks):
            raise ValueError("the exported step was not checked")
        return self


class _Grid(_Part):
    step: int
    image: str


class _Farthest(_Part):
    prompt: str
    distance: float
    base: str
    student: str


class _Drift(_Part):
    prompts: list[str]
    seeds: int
    models: dict[str, dict[str, _Figure]]
    farthest: list[_Farthest]


class _Told(_Part):
    kind: str = Field(pattern="^(lost|kept|unknown)$")
    sentence: str


class _SecondJudge(_Part):
    verdict: _Told
    models: dict[str, dict[str, _Counted]]
    agreement: dict[str, dict[str, Any]]
    same: bool


class _Scores(_Part):
    suite: _Suite
    models: list[_Model] = Field(min_length=1)
    comparison: dict[str, _Comparison | None] | None = None
    interference: _Interference | None = None
    subsets: dict[str, dict[str, dict[str, _Counted]]] | None = None
    metrics: dict[str, dict[str, dict[str, _Figure]]] | None = None
    pictures: dict[str, _Images | None] | None = None
    ceiling: _Ceilings | None = None
    monitor: _Monitor | None = None
    validation: _Validation | None = None
    probes: dict[str, _Probe] | None = None
    blend_grid: list[_Blend] | None = None
    unscored: list[_Reason] | None = None
    verdict: _Verdict | None = None
    recipe: _Recipe | None = None
    recipe_yaml: str | None = None
    samples: list[_Grid] | None = None
    skills: list[str] | None = None
    drift: _Drift | None = None
    second_judge: _SecondJudge | None = None
    judging: dict[str, Any] | None = None
    call: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    seconds: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    created: str | None = None
    student: str | None = None


class _Row(_Part):
    model: str
    capability: str
    category: str
    key: str
    prompt: str
    score: float | None
    status: str | None = None
    reason: str | None = None
    probe: str | None = None
    image: str | None = None
    source: str | None = None
    target: str | None = None
    tags: list[str] | None = None
    metrics: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    parts: dict[str, Any] | None = None


def rename_steps(bench: dict[str, Any]) -> None:
    """Give the `call` of an older bench the name num_inference_steps, in place."""
    call = bench.get("call")
    if isinstance(call, dict) and "steps" in call:
        call.setdefault("num_inference_steps", call.pop("steps"))


def check_scores(scores: Any) -> None:
    """ValueError, in one short sentence, where the contents of `scores.json` are not those of a bench."""
    _check(_Scores, scores)


def check_row(row: Any) -> None:
    """ValueError where a row of `samples.jsonl` is none."""
    _check(_Row, row)


def _check(kind: type[_Part], value: Any) -> None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg'].lower()}") from None
