"""Finds a plug-in by its name, says in one sentence why it cannot be used, and where it came from.

A name is built in (the caller knows those), that of an entry point, or `module:name`. An object that was given in
Python goes by the `module:name` under which it can be imported again, else by one that this process alone knows.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from danceopd.common.files import sha256
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError
from danceopd.plugins.kinds import KINDS

_WORD = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
MODULE_NAME = rf"^{_WORD}:{_WORD}$"
"""The pattern of `module:name`, also of a JSON schema."""
_given: dict[tuple[str, str], Any] = {}
"""Objects that were given in Python and cannot be imported, by kind and name."""


@dataclass(frozen=True)
class Origin:
    """Where a plug-in is from: `place`, "package 1.0" or a file's name, and the sha256 of the file that defines it."""

    kind: str
    name: str
    place: str
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.place}, sha256 {self.sha256[:12]}" if self.sha256 else self.place


@cache
def _entry_points(path: tuple[str, ...]) -> dict[str, list[metadata.EntryPoint]]:
    """Entry points by kind; `path` is sys.path, with which they change."""
    every = metadata.entry_points()
    return {kind: sorted(every.select(group=how.group), key=lambda one: one.name) for kind, how in KINDS.items()}


def installed(kind: str) -> list[metadata.EntryPoint]:
    """The entry points of a kind, of all packages that are installed, by name."""
    return _entry_points(tuple(sys.path))[kind]


def plugin_names(kind: str) -> list[str]:
    """The names of a kind that packages add to those that are built in."""
    return list(dict.fromkeys(point.name for point in installed(kind)))


def is_plugin(kind: str, name: str) -> bool:
    """Whether a name that is in use is a plug-in's, not a built-in one."""
    return (kind, name) in _given or name in plugin_names(kind) or ":" in name


def name_of(kind: str, value: Any) -> str:
    """A name as it is; an object under the `module:name` by which `load` finds it again in this process."""
    if isinstance(value, str):
        return value
    label = getattr(value, "__qualname__", None)
    module = str(getattr(value, "__module__", "") if label else type(value).__module__)
    if label and _attribute(sys.modules.get(module), label) is value:
        return f"{module}:{label}"
    own = re.sub(r"[^\w.]+|\.(?!\w)", "_", str(label or getattr(value, "name", None) or type(value).__qualname__))
    name, number = f"{module}:{own}", 1
    while _given.setdefault((kind, name), value) is not value:
        name = f"{module}:{own}_{(number := number + 1)}"
    return name


def check_name(kind: str, name: str, builtin: Collection[str]) -> None:
    """UserError, in one sentence, for what is no name of this kind. Imports nothing.

    That is a word which is neither built in nor installed, a malformed `module:name`, a name that two packages have,
    and a built-in one that a package has, too.
    """
    packages = sorted({_package(point) for point in installed(kind) if point.name == name})
    if name in builtin and packages:
        raise UserError(
            f"{kind} {name!r} is built in, and {packages[0]} has a plug-in of that name; uninstall that package, or "
            f"rename the entry point in its group {KINDS[kind].group}"
        )
    if len(packages) > 1:
        raise UserError(
            f"{kind} {name!r} is in {' and in '.join(packages)}; uninstall all but one, or write module:name"
        )
    if name in builtin or packages or (kind, name) in _given or re.fullmatch(MODULE_NAME, name):
        return
    if ":" in name:
        file, _, word = name.rpartition(":")
        hint = f"{Path(file).stem}:{word}, from the folder it lies in" if file.endswith(".py") else "my_module:my_name"
        raise UserError(
            f"{kind} {name!r} is no module:name; write the module as in `import`, a colon, and a name in it, as {hint}"
        )
    known = [*builtin, *plugin_names(kind)]
    raise UserError(
        f"there is no {kind} {name!r}{did_you_mean(name, known)}"
        f" (one of your own is module:name, or an entry point of group {KINDS[kind].group})"
    )


def load(
    kind: str, name: str, builtin: Mapping[str, Any] | None = None, fits: Callable[[Any], bool] = callable
) -> Any:
    """The object of a name: a value of `builtin`, or a plug-in for which `fits` says that it is of the kind.

    UserError as `check_name`, for a module that does not import or has no such name, and for another type.
    """
    builtin = builtin or {}
    check_name(kind, name, builtin)
    if name in builtin:
        return builtin[name]
    value = _value(kind, name)
    if not fits(value):
        what = f"of type {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"
        raise UserError(f"{kind} {name} is {what}; it must be {KINDS[kind].must}")
    return value


def check_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """UserError where a plug-in's function does not take what it is called with and the recipe's options."""
    takes = KINDS[kind].takes or ()
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C
        return
    try:
        signature.bind(*takes, **options)
    except TypeError as error:
        given = ", ".join([*takes, *(f"{key}=…" for key in options)])
        raise UserError(
            f"{kind} {name} takes {signature} and is called with ({given}): {error}; mend its options or its arguments"
        ) from None


def check_made(kind: str, name: str, value: Any, fits: bool) -> None:
    """UserError where what a plug-in made is not of its kind."""
    if not fits:
        raise UserError(f"{kind} {name} made something of type {type(value).__name__}; it must be {KINDS[kind].must}")


def origin(kind: str, name: str) -> Origin:
    """Where a plug-in comes from, which must load."""
    value = _value(kind, name)
    point = next((point for point in installed(kind) if point.name == name), None)
    if inspect.isroutine(value) or isinstance(value, type):
        file = _file(value)
    elif (kind, name) in _given:  # an object: what counts is its class, where that is the user's own
        file = None if type(value).__module__.startswith("danceopd.") else _file(type(value))
    else:
        file = getattr(sys.modules.get((point.value if point else name).partition(":")[0]), "__file__", None)
    there = file is not None and Path(file).is_file()
    place = _package(point) if point else Path(file).name if file and there else "given in Python"
    return Origin(kind, name, place, sha256(Path(file)) if file and there else None)


def _file(value: Any) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(value))
    except TypeError:  # of C, or of an interactive session
        return None


def _package(point: metadata.EntryPoint) -> str:
    """The name and version of the package that has an entry point."""
    return f"{point.dist.metadata['Name']} {point.dist.version}" if point.dist else point.value


def _value(kind: str, name: str) -> Any:
    """The object of a name that `check_name` let pass."""
    if (kind, name) in _given:
        return _given[kind, name]
    point = next((point for point in installed(kind) if point.name == name), None)
    who = f"{kind} {name} of {_package(point)}" if point else f"{kind} {name}"
    module, _, attribute = (point.value.partition("[")[0].strip() if point else name).partition(":")
    loaded = _module(module, who, installed=point is not None)
    if not attribute:
        return loaded
    found = _attribute(loaded, attribute)
    if found is None:
        own = [key for key, one in vars(loaded).items() if getattr(one, "__module__", None) == module]
        hint = did_you_mean(attribute, own)
        raise UserError(f"{who}: module {module!r} has no {attribute!r}{hint}")
    return found


def _module(name: str, who: str, installed: bool) -> ModuleType:
    """A module, which may lie in the working folder; UserError where it does not import."""
    here = os.getcwd()
    own = not installed and here not in sys.path
    if own:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a foreign module raises while it loads
        where = "mend or reinstall that package" if installed else f"it must lie in {here} or be installed"
        raise UserError(
            f"{who}: module {name!r} does not import ({type(error).__name__}: {error}); {where}"
        ) from error
    finally:
        if own:
            sys.path.remove(here)
            sys.path.append(here)  # for what it imports later
    beside = Path(here, *name.split("."))
    file = getattr(found, "__file__", None)
    if not installed and file and beside.with_suffix(".py").is_file() and not beside.with_suffix(".py").samefile(file):
        raise UserError(
            f"{who}: module {name!r} is {file} here, and not {beside.with_suffix('.py')}; rename the one that you mean"
        )
    return found


def _attribute(module: ModuleType | None, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None
