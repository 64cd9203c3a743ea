"""What an audit says of the rewards of objective nft, before a merge begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danceopd.common.parse import JSON_BYTES, read_text
from danceopd.errors import UserError
from danceopd.labelfree.audit.figures import LEAST
from danceopd.labelfree.audit.summary import RESULT, audit_folder
from danceopd.recipe.nft import NFT
from danceopd.recipe.recipe import Recipe


def check_audit(recipe: Recipe, part: NFT, base: str, teachers: Mapping[str, str | None]) -> str:
    """A line for the user: what an audit says of the rewards of `part`, or that there is none.

    `base` and `teachers` (by name) are sha256. The audit is `nft.audit`, else the one beside the run folder;
    `none` asks for none. UserError for a reward that ranks the samples of a teacher's questions no better
    than chance, and for a named audit that is none, or of other weights or rewards.
    """
    named = part.audit
    if named == "none":
        return "nft.audit is none: nothing is read about whether the rewards rank"
    path = audit_folder(recipe.output) if named is None else Path(named)
    path = path / RESULT if path.suffix != ".json" else path
    if named is None and not path.is_file():
        return "no audit says whether the rewards rank this model's samples; `danceopd audit` measures it in minutes"
    facts = _read(path)
    try:
        other = _other(part, facts, base, teachers)
        unknown = [] if other else _unknown(recipe, part, facts, path)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of `danceopd audit` (no {error}); run it again") from None
    if other and named is None:
        return f"the audit in {path.parent} is of another {other}, and is not read; run `danceopd audit` again"
    if other:
        raise UserError(f"nft.audit {named} is of another {other}; run `danceopd audit` again, or leave it out")
    if unknown:
        return f"the audit in {path.parent} cannot tell whether these rewards rank: {', '.join(unknown)}"
    return f"every reward ranks better than chance by the audit in {path.parent}, of samples by {facts['by']}"


def _unknown(recipe: Recipe, part: NFT, facts: Mapping[str, Any], path: Path) -> list[str]:
    """Rewards of which the audit cannot tell; UserError for one that ranks no better than chance."""
    unknown = []
    for teacher in recipe.teachers:
        found = facts["teachers"][teacher.name]
        for name in part.applying(teacher.capability):
            auc = found["signals"][f"reward {name}"]["auc"]
            if not found["truth"] or not auc or auc["n"] < LEAST:
                unknown.append(f"{name} for {teacher.name}")
            elif auc["low"] <= 0.5:
                raise UserError(
                    f"reward {name} {found['signals'][f'reward {name}']['verdict']} for teacher {teacher.name!r}: AUC "
                    f"{auc['mean']:.2f} [{auc['low']:.2f} to {auc['high']:.2f}] over {auc['n']} questions ({path}); "
                    "leave it out of nft.rewards, or write nft: {audit: none} to train with it anyway"
                )
    return unknown


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(read_text(path, "audit", JSON_BYTES))
        if not isinstance(facts, dict) or not {"identity", "teachers"} <= facts.keys():
            raise ValueError("it has no identity and no teachers")
    except ValueError as error:
        raise UserError(f"{path} is no result of `danceopd audit` ({str(error)[:120]}); run it again") from None
    return facts


def _other(part: NFT, facts: Mapping[str, Any], base: str, teachers: Mapping[str, str | None]) -> str:
    """What the audit and the recipe differ in, in words; empty where they agree."""
    identity = facts["identity"]
    if identity.get("base") != base:
        return "base"
    if {name: of[0] for name, of in identity["teachers"].items()} != dict(teachers):
        return "set of teachers"
    audited = identity["rewards"]
    missing = [n for n, one in part.rewards.items() if _asks(audited.get(n)) != _asks(one.model_dump(mode="json"))]
    return f"reward {missing[0]}" if missing else ""


def _asks(reward: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A reward without its weight, which changes no rank of its own."""
    return None if reward is None else {key: value for key, value in reward.items() if key != "weight"}
