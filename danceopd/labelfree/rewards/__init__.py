"""Frozen rewards that rank the student's own samples of one question, without a label.

In: groups of finished latents with their question (`Group`). Out: a number for each sample (`Reward`), of which only
the order inside a group counts. `REWARDS` are the registered ones: `likelihood.py`, `agreement.py`, and a user's own
"module:function" (`own.py`). `make.py` makes those of a recipe and turns their numbers into ranks. Read `group.py`
first.
"""

from danceopd.labelfree.rewards.agreement import consensus, preserve
from danceopd.labelfree.rewards.group import Group, Reward
from danceopd.labelfree.rewards.likelihood import likelihood
from danceopd.labelfree.rewards.make import REWARDS, check_rewards, combined, rewards_for, rewards_of, standard_scores
from danceopd.labelfree.rewards.own import own

__all__ = [
    "REWARDS", "Group", "Reward", "check_rewards", "combined", "consensus", "likelihood", "own", "preserve",
    "rewards_for", "rewards_of", "standard_scores",
]  # fmt: skip
