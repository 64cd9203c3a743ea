"""The suites by name: `load_suite` makes one, `suite_items` chooses its items."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from danceopd.bench.suites.protocol import ExactSuite, Item, JudgedSuite, Suite
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError
from danceopd.pipelines.registry import family_of
from danceopd.plugins import check_options, load, name_of, plugin_names
from danceopd.recipe.recipe import CAPABILITIES

if TYPE_CHECKING:
    from danceopd.bench.lineup import Lineup

_log = logging.getLogger("danceopd")

SUITES = {
    "scenes": "danceopd.bench.suites.scenes",
    "gedit": "danceopd.bench.suites.gedit",
    "imgedit": "danceopd.bench.suites.imgedit",
    "geneval": "danceopd.bench.suites.geneval",
    "openmoji": "danceopd.bench.suites.openmoji",
    "folder": "danceopd.bench.suites.folder",
}
"""Name -> module with a class ``Suite``."""
KINDS_OF_SUITE = (ExactSuite, JudgedSuite)
FLAGS = {
    "data": "--data",
    "language": "--language",
    "official_prompts": "--official-prompts",
    "samples": "--samples",
}
"""Options that a suite may take, and their flags."""


def suite_names() -> list[str]:
    """The suites that are built in, and those that installed packages add."""
    return [*SUITES, *plugin_names("suite")]


def suite_class(name: str) -> type[Suite]:
    """The class of the suite of that name, built in or a plug-in; UserError suggests the nearest name."""
    found = load("suite", name, SUITES, lambda value: isinstance(value, type) and issubclass(value, KINDS_OF_SUITE))
    if name in SUITES:
        return import_module(found).Suite
    check_suite(name, found)
    return found


def check_suite(name: str, suite: Suite | type[Suite]) -> None:
    """UserError for a suite of the user's that lacks a part; some parts a class need not have, but its objects."""
    parts = ("name", "version", "scale", "share") + (() if isinstance(suite, type) else ("rules", "protocol"))
    lacks = [key for key in parts if not hasattr(suite, key)]
    if lacks := sorted({*lacks, *getattr(suite, "__abstractmethods__", ())}):
        raise UserError(f"suite {name} has no {', '.join(lacks)}; see the class it inherits from")


def load_suite(suite: str | Suite | type[Suite], **options: Any) -> Suite:
    """The suite of a name or a class, or the one given; ``options``: those of ``FLAGS``, None for what was not given.

    UserError for an unknown name, a suite that lacks a part, an option that the suite does not take, and missing data.
    """
    name = name_of("suite", suite)
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(suite, Suite):
        check_suite(name, suite)
        if given:
            raise UserError(f"suite {name} is made already, so it takes no {next(iter(given))}; leave it out")
        return suite
    made = suite_class(name)
    for key in given:
        if key not in inspect.signature(made).parameters:
            raise UserError(f"suite {name} takes no {FLAGS.get(key, key)}; leave it out")
    check_options("suite", name, made, given)
    found = made(**given)
    check_suite(name, found)
    return found


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


def drawable(items: dict[str, list[Item]], lineup: Lineup) -> dict[str, list[Item]]:
    """The items that the models of a line-up can draw: without the edits where their family has no editing pipeline."""
    family = None if lineup.folder is None else family_of(lineup.folder, lineup.family)
    edits = items["editing"]
    if family is None or family.editing is not None or not edits or not items["generation"]:
        return items
    _log.warning("%s cannot edit, so the suite's %d edits are left out", family.name, len(edits))
    return {**items, "editing": []}


def of_pictures(call: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's call for pictures, which suites are of: one frame where the student's recipe draws videos."""
    if call.get("num_frames", 1) > 1:
        _log.warning("suites are of pictures, so one frame is drawn, not call.num_frames %d", call["num_frames"])
        return {**call, "num_frames": 1}
    return call
