"""The one exception for a user's mistake, and the one warning; sentences for common mistakes."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

V = TypeVar("V")


class UserError(ValueError):
    """Bad input. The message is one line: the value, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SurestepWarning(UserWarning):
    """What a user should know of a result or a run. The command line prints it as one line."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a ``name`` that is not among the ``known`` ones.

    Args:
        kind: what is being named, in words ("method", "dataset").
        name: the name as the user wrote it.
        known: the valid names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}")


def look_up(kind: str, name: str, table: Mapping[str, V]) -> V:
    """Return what a table holds under a name.

    Args:
        kind: what is being named, in words ("method", "dataset").
        name: the name as the user wrote it.
        table: what there is, by name.

    Raises:
        UserError: there is nothing of that name; the nearest is named.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


def need(module: str, what: str, install: str, *, called: str = "") -> Any:
    """Import a module of a package that only some uses need, and return it.

    Args:
        module: to import.
        what: what needs it, as the sentence begins.
        install: what pip is to install, such as "surestep[timm]".
        called: the package's name, or several names, where the module's says too little.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            # Of what it imports itself, which nobody here can change.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as e:
        root = module.partition(".")[0]
        if (e.name or root).partition(".")[0] != root:
            raise UserError(f"{what} needs {module}, which cannot be imported here: {e}") from e
        raise UserError(f"{what} needs {called or module}: pip install '{install}'") from e
