"""Objective nft of a recipe: the student's own samples, ranked by frozen rewards (DiffusionNFT, arXiv 2509.16117).

    objective: nft
    nft: {group: 6, share: 0.5, rewards: {likelihood: 1.0, consensus: {weight: 0.5}}}
    nft: {rewards: {"my_rewards:sharpness": {weight: 2, options: {radius: 3}}}}

A number alone is a reward's weight. docs/labelfree.md has the equations; a key here is a letter there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, ValidationError, WithJsonSchema

from danceopd.common.messages import explain_validation_error
from danceopd.recipe.parts import Part, Weight
from danceopd.recipe.values import part_name


class Reward(Part):
    """What every reward has: its weight in the sum of the rewards' standard scores."""

    weight: Weight = 1.0
    """Weight in the sum of the rewards' standard scores."""


class Likelihood(Reward):
    """Minus a frozen teacher's denoising loss of the picture, at these noise levels, with so many noises at each.

    `teacher` None asks each row's routed teacher, else "base" or a teacher's name.
    """

    levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.85, 0.75, 0.65), min_length=1, max_length=64)
    """Noise levels of the denoising loss."""
    draws: int = Field(2, ge=1, le=64)
    """Noises at each level."""
    teacher: str | None = Field(None, examples=["base"])
    """Whose loss: `base` or a teacher's name; null: each row's routed teacher."""


class Consensus(Reward):
    """Minus the distance to the other samples of the group inside the region that is edited; of editing rows only."""


class Preserve(Reward):
    """Minus what changed of the source outside the region that is edited; of editing rows only."""


class OwnReward(Reward):
    """A function of the user's, `function(groups, **options)`."""

    options: dict[str, Any] = Field({}, examples=[{"radius": 3}])
    """Keyword arguments of the function."""


KINDS: dict[str, type[Reward]] = {"likelihood": Likelihood, "consensus": Consensus, "preserve": Preserve}
EDITING_ONLY = ("consensus", "preserve")
"""Rewards that say nothing of a picture without a source."""
REWARDS = {"type": "object", "additionalProperties": {"anyOf": [{"type": "number"}, {"type": "object"}]}}
"""Their JSON schema: a weight, or the reward's own keys."""


def _rewards(value: Any) -> Any:
    """Each reward as its own part; a number is its weight."""
    if not isinstance(value, Mapping):
        return value
    found = {}
    for key, given in value.items():
        name = part_name("reward", key, tuple(KINDS))
        kind = KINDS.get(name, OwnReward)
        fields = {"weight": given} if isinstance(given, int | float) and not isinstance(given, bool) else given
        try:
            found[name] = kind.model_validate(fields)
        except ValidationError as error:
            raise ValueError(explain_validation_error(error, kind, f"reward {name}")) from None
    return found


class NFT(Part):
    """Of objective nft: each question is answered `group` times, and the answers are told from each other by rewards.

    The student's average draws the samples of `round` updates, each sample is learnt from in `reuse` of them, and it
    stays as it is for so long. `beta` is how far the student moves from it in the positive and the negative branch,
    `clip` the standard score at which a sample counts as wholly good or bad. `share` of the loss is this one, the rest
    is objective danceopd's; `anchor` weighs the error to the routed teacher at the samples' states, beside it.
    `hindsight` is how far the noise levels at which good and bad samples part count more (0: all alike). `contexts` are
    what teachers are given besides the question, where that makes bad samples into good ones.
    """

    group: int = Field(6, ge=2, le=2**10)
    """Answers to each question, which are ranked against each other."""
    rewards: Annotated[
        dict[str, SerializeAsAny[Reward]], BeforeValidator(_rewards), WithJsonSchema(REWARDS)
    ] = Field(
        {"likelihood": Likelihood()}, min_length=1
    )
    """Rewards by name (`likelihood`, `consensus`, `preserve`, or a function of yours as `module:function`); a number is
    a weight."""
    beta: float = Field(1.0, gt=0, le=10)
    """How far the student moves from its average in the positive and the negative branch."""
    clip: float = Field(1.0, gt=0, le=10)
    """Standard score at which a sample counts as wholly good or bad."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of this loss; the rest is that of objective danceopd."""
    anchor: float = Field(0.0, ge=0, le=1e3)
    """Weight of the error to the routed teacher at the samples' states."""
    hindsight: float = Field(0.0, ge=0, le=1)
    """How far the noise levels at which good and bad samples part count more; 0: all alike."""
    contexts: tuple[Literal["guided", "caption"], ...] = Field((), examples=[["guided"]])
    """What a teacher is tried with on bad samples, and asked with once it makes more of them good than it does alone:
    `guided` is classifier-free guidance, `caption` the data's longer prompt (column `expanded`)."""
    context_scale: float = Field(3.0, gt=1, le=100)
    """Guidance scale of the context `guided`."""
    round: PositiveInt = 16
    """Updates whose samples are drawn by one average of the student."""
    reuse: PositiveInt = 4
    """Updates that learn from a sample."""
    audit: str | None = Field(None, examples=["student-audit"])
    """Result of `danceopd audit`, which must say that every reward ranks better than chance; a file or its folder,
    by default the one beside the run folder, if there is one. `none`: train without."""

    @property
    def asks_teacher(self) -> bool:
        """Whether anything is learnt from a teacher's velocity."""
        return self.share < 1 or self.anchor > 0

    @property
    def distinct(self) -> int:
        """Updates of a round that draw samples; the others of it learn from the same ones."""
        return self.round // self.reuse

    def applying(self, capability: str) -> list[str]:
        """The rewards that say something of pictures of a capability."""
        return [name for name in self.rewards if capability == "editing" or name not in EDITING_ONLY]
