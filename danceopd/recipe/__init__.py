"""The recipe of a merge: pure data, without torch.

In: a YAML file, command-line flags or Python keywords. Out: a frozen `Recipe` whose parts (`recipe.rollout`,
`recipe.query`, ...) are handed to the rooms that need them. Read `recipe.py` first; `parts.py`, `labelfree.py` and
`validation.py` hold the parts, `checks.py` what must hold between them, `aliases.py` keys of earlier versions,
`recorded.py` reads the recipe of a run that may have moved; `reference.py` makes docs/recipe.md and the JSON schema.
"""

from danceopd.recipe.recipe import Recipe

__all__ = ["Recipe"]
