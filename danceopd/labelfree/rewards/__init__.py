"""Frozen rewards that rank the student's own samples of one question, without a label.

In: groups of finished latents with their question (`Group`). Out: a number for each sample (`Reward`), of which only
the order inside a group counts. `REWARDS` are the registered ones: `likelihood.py`, `agreement.py`, and a plug-in
of the user's (`own.py`). `make.py` makes those of a recipe and turns their numbers into ranks. Read `group.py`
first.
"""

from danceopd.labelfree.rewards.agreement import consensus, preserve
from danceopd.labelfree.rewards.group import Group, Reward
from danceopd.labelfree.rewards.likelihood import likelihood
from danceopd.labelfree.rewards.make import REWARDS, combined, rewards_for, rewards_of, standard_scores
from danceopd.labelfree.rewards.own import own

__all__ = [
    "REWARDS", "Group", "Reward", "combined", "consensus", "likelihood", "own", "preserve",
    "rewards_for", "rewards_of", "standard_scores",
]  # fmt: skip
