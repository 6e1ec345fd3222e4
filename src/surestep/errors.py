"""The exception for user mistakes, the warning, and the messages for common mistakes."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

V = TypeVar("V")

ERROR = "surestep: error: "
"""What the command line writes before an error; a comparison finds its trainings' errors by it."""


class UserError(ValueError):
    """Bad input. The message is one line: the value, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SurestepWarning(UserWarning):
    """Something a user should know about a result or a run; the command line prints one line."""


def unknown_name(kind: str, name: str, known: Iterable[str], meant: str = "") -> UserError:
    """Build the error for a ``name`` that is not among the ``known`` ones.

    Args:
        kind: what is being named, in words ("method", "dataset").
        name: the name as the user wrote it.
        known: the valid names.
        meant: the one to suggest; by default the nearest in spelling.
    """
    names = sorted(known)
    close = [meant] if meant else difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}")


def look_up(kind: str, name: str, table: Mapping[str, V]) -> V:
    """Return the entry of a table under a name.

    Args:
        kind: what is being named, in words ("method", "dataset").
        name: the name as the user wrote it.
        table: the entries, by name.

    Raises:
        UserError: there is no entry of that name; the message suggests the nearest.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


def need(module: str, what: str, install: str, *, called: str = "") -> Any:
    """Import a module of an optional package, and return it.

    Args:
        module: the module to import.
        what: what needs it; the error message begins with this.
        install: what to install with pip, such as "surestep[timm]".
        called: name of the package or packages, if the module's name is not clear enough.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            # The package may import deprecated things, which cannot be changed here.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as e:
        root = module.partition(".")[0]
        if (e.name or root).partition(".")[0] != root:
            raise UserError(f"{what} needs {module}, which cannot be imported here: {e}") from e
        raise UserError(f"{what} needs {called or module}: pip install '{install}'") from e
