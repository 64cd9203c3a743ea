"""Plug-ins: parts of your own in place of, or beside, those that are built in, without an edit of this package.

In: a kind ("objective", "suite", …) and a name: of an entry point that an installed package has in the kind's group, or
`module:name` of a module that is installed or lies in the working folder. Out: the object, checked to be of its kind,
or one sentence that says what is wrong; and where it came from, for the records of a run. `kinds.py` lists the kinds,
`registry.py` finds. Loads no torch by itself.
"""

from danceopd.plugins.kinds import KINDS, Kind
from danceopd.plugins.registry import (
    MODULE_NAME,
    Origin,
    check_made,
    check_name,
    check_options,
    installed,
    is_plugin,
    load,
    name_of,
    origin,
    plugin_names,
)

__all__ = [
    "KINDS", "MODULE_NAME", "Kind", "Origin", "check_made", "check_name", "check_options", "installed", "is_plugin",
    "load", "name_of", "origin", "plugin_names",
]  # fmt: skip
