"""The command `danceopd plugins`: what a recipe or a flag may name, by kind, and whether each plug-in can be used."""

from __future__ import annotations

from typing import Any

from danceopd.cli.flags import Json, print_json
from danceopd.errors import UserError


def describe() -> dict[str, dict[str, Any]]:
    """Of each kind its entry points' group, what an object must be, the built-in names, and the installed plug-ins.

    Of a plug-in: name, value of its entry point, where it is from, and `fault`, why it cannot be used (None: it can).
    """
    from danceopd.bench.judges.registry import KINDS as JUDGES
    from danceopd.bench.metrics.names import METRICS
    from danceopd.bench.metrics.own import load_metrics
    from danceopd.bench.suites.registry import SUITES, suite_class
    from danceopd.pipelines.registry import BUILTIN, family_of
    from danceopd.planning.plugins import CHECKS
    from danceopd.plugins import KINDS, check_name, installed, load, origin
    from danceopd.recipe.nft import KINDS as REWARDS
    from danceopd.recipe.values import BLENDS, LAWS, OBJECTIVES

    builtin: dict[str, Any] = {
        "family": BUILTIN, "objective": OBJECTIVES, "reward": REWARDS, "query law": LAWS, "blend method": BLENDS,
        "suite": SUITES, "judge": JUDGES, "metric": METRICS,
    }  # fmt: skip
    tries: dict[str, Any] = {
        "family": lambda name: family_of("", name), "suite": suite_class, "metric": lambda name: load_metrics([name]),
        "blend method": lambda name: CHECKS["blend method"](name, {}),
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for kind, how in KINDS.items():
        known, rows = list(builtin.get(kind, ())), []
        for point in installed(kind):
            row = {"name": point.name, "value": point.value, "from": None, "fault": None}
            try:
                check_name(kind, point.name, known)
                tries.get(kind, lambda name, kind=kind: load(kind, name))(point.name)
                row["from"] = str(origin(kind, point.name))
            except UserError as error:
                row["fault"] = str(error)
            rows.append(row)
        found[kind] = {"group": how.group, "must": how.must, "builtin": known, "plugins": rows}
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print what `describe` found as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for head in ("kind", "name", "from"):
        table.add_column(head, no_wrap=head == "kind", overflow="fold")
    for kind, facts in found.items():
        table.add_row(kind, ", ".join(facts["builtin"]) or "–", "built in" if facts["builtin"] else "none is built in")
        for row in facts["plugins"]:
            table.add_row("", row["name"], row["from"] or f"cannot be used: {row['fault']}")
    Console(markup=False).print(table, highlight=False)


def plugins(as_json: Json = False) -> None:
    """List the parts that a recipe or a flag may name: families, objectives, suites and more, with your plug-ins.

    One of your own is named as module:name, too (docs/plugins.md).

    Example: danceopd plugins --json
    """
    found = describe()
    if as_json:
        print_json(found)
    else:
        show(found)
