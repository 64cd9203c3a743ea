"""What objective nft adds to an update, in forwards of one row: samples, their rewards, and what drew them."""

from __future__ import annotations

from danceopd.recipe.nft import Likelihood
from danceopd.recipe.recipe import Recipe


def nft_forwards(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Forwards of a row of each teacher in an update, by part and name; nothing for another objective.

    Samples are drawn and ranked once and learnt from in `reuse` updates. A user's own reward counts nothing.
    """
    if recipe.objective != "nft":
        return {}
    options, steps = recipe.nft, recipe.rollout.steps
    asked = sum(len(one.levels) * one.draws for one in options.rewards.values() if isinstance(one, Likelihood))
    parts = {
        "own samples": steps / options.reuse,
        "rewards": asked / options.reuse,
        "the average that drew": float(recipe.query.count),
    }
    if options.contexts:  # a sample of each question is finished twice, and the teacher may be guided from then on
        guided = "guided" in options.contexts
        parts["contexts"] = ((2 + guided) * steps + 2 * asked) / options.group / options.reuse
        parts["contexts"] += guided * recipe.query.count
    return {part: dict.fromkeys((t.name for t in recipe.teachers), count) for part, count in parts.items()}
