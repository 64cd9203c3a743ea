"""The suites by name: `load_suite` makes one, `suite_items` chooses its items."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from danceopd.bench.suites.protocol import Item, Suite
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError
from danceopd.recipe.recipe import CAPABILITIES

SUITES = {
    "scenes": "danceopd.bench.suites.scenes",
    "gedit": "danceopd.bench.suites.gedit",
    "imgedit": "danceopd.bench.suites.imgedit",
    "geneval": "danceopd.bench.suites.geneval",
    "openmoji": "danceopd.bench.suites.openmoji",
    "folder": "danceopd.bench.suites.folder",
}
"""Name -> module with a class ``Suite``."""
FLAGS = {
    "data": "--data",
    "language": "--language",
    "official_prompts": "--official-prompts",
    "samples": "--samples",
}
"""Options that a suite may take, and their flags."""


def suite_class(name: str) -> type[Suite]:
    """The class of the suite of that name; UserError suggests the nearest name when there is none."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}{did_you_mean(name, SUITES)}")
    return import_module(SUITES[name]).Suite


def load_suite(name: str, **options: Any) -> Suite:
    """The suite of that name; ``options`` are those of ``FLAGS``, None for what was not given.

    UserError for an unknown name, an option that the suite does not take, and missing data.
    """
    made = suite_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in inspect.signature(made).parameters:
            raise UserError(f"suite {name} takes no {FLAGS.get(key, key)}; leave it out")
    return made(**given)


def suite_items(suite: Suite, limit: int | None, probes: bool, categories: Sequence[str] = ()) -> dict[str, list[Item]]:
    """Capability -> items of a suite, at most `limit`; with `probes`, those follow and count in no overall score.

    `categories`: only items of these, the first `limit` of them. UserError for a category that the suite has not.
    """
    wanted = None if categories else limit
    ordinary = {"generation": suite.generation_items(wanted), "editing": suite.editing_items(wanted)}
    apart = suite.probe_items(wanted) if probes else {}
    known = {item.category: None for items in (*ordinary.values(), *apart.values()) for item in items}
    for category in categories:
        if category not in known:
            raise UserError(f"suite {suite.name} has no category {category!r}{did_you_mean(category, known)}")
    chosen = set(categories) or set(known)
    found = {}
    for capability in CAPABILITIES:
        kept = [item for item in ordinary[capability] if item.category in chosen][:limit]
        by_probe: dict[str | None, list[Item]] = {}
        for item in apart.get(capability, ()):
            if item.category in chosen:
                by_probe.setdefault(item.probe, []).append(item)
        found[capability] = kept + [item for items in by_probe.values() for item in items[:limit]]
    return found
