"""What a command asks for of the inputs that a blend looks at: data, how many rows of it, and where to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from danceopd.adapters.blending.methods import Method
from danceopd.errors import UserError

MOST = 4096
"""Prompts of a LoRA, at most."""


@dataclass(frozen=True)
class Asked:
    """What is asked for: sources of data, prompts or edits of each LoRA (None: the method's own), the device."""

    data: Sequence[str] = ()
    prompts: int | None = None
    device: str | None = None

    def check(self, how: Method) -> None:
        """UserError for a number that is none, and where the method looks at no inputs."""
        flags = ("--data", self.data), ("--prompts", self.prompts), ("--device", self.device)
        given = [flag for flag, value in flags if value]
        if given and how.regress is None:
            raise UserError(f"{how.name} looks at no inputs, so {given[0]} has no meaning; leave it out")
        if self.prompts is not None and not 1 <= self.prompts <= MOST:
            raise UserError(f"--prompts is {self.prompts}; give a number from 1 to {MOST}")
