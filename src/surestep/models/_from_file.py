"""Models made by a Python file of the user: FILE.py:FACTORY."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from torch import nn

from surestep.errors import UserError

_BESIDE: dict[str, dict[str, ModuleType]] = {}
"""By folder, the modules that model files have imported from it."""


def in_file(name: str) -> bool:
    """Tell whether a model's name has the form FILE.py:FACTORY."""
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def file_of(name: str) -> Path:
    """Return the file of a name FILE.py:FACTORY."""
    return Path(name.rpartition(":")[0])


def absolute(name: str) -> str:
    """Return the name with an absolute path, which is valid in any working directory."""
    return f"{file_of(name).resolve()}:{name.rpartition(':')[2]}"


def from_file(name: str) -> nn.Module:
    """Run a Python file and call the function in it that makes the model.

    Args:
        name: FILE.py:FACTORY; the factory takes no arguments.

    Raises:
        UserError: there is no such file or function, it fails, or it returns no module.
    """
    path, _, factory = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file} does not exist: give FILE.py:FACTORY")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with _importing_from(str(file.parent.resolve()), file.stem, module):
            spec.loader.exec_module(module)
            make = getattr(module, factory, None)
            if make is None:
                known = ", ".join(
                    k for k, v in vars(module).items() if callable(v) and not k.startswith("_")
                )
                raise UserError(f"{file} has no {factory!r}: it has {known or 'nothing'}")
            model = make()
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # a script that runs, and exits, when imported
        raise UserError(f"{file}:{factory} fails: {type(e).__name__} {e}") from e
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{file}:{factory} returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


@contextmanager
def _importing_from(folder: str, name: str, module: ModuleType) -> Iterator[None]:
    """Let a file import those beside it, as in a script, and not those beside other model files.

    What is imported stays in ``sys.modules``, where torch.compile and pickle look for it; where
    there was a module of that name before, under another name.

    Args:
        folder: the file's folder.
        name: the file's name as a module.
        module: its module, which dataclasses look up.
    """
    others = {
        key: found
        for place, modules in _BESIDE.items()
        for key, found in modules.items()
        if place != folder and sys.modules.get(key) is found
    }
    for key in others:
        del sys.modules[key]  # until the end
    own = _BESIDE.setdefault(folder, {})
    known, before = set(sys.modules), sys.modules.get(name)
    for key, found in own.items():
        found.__name__ = key
    sys.modules.update({**own, name: module})
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(folder)
        new = {key: found for key, found in sys.modules.items() if key not in known}
        own.update({k: m for k, m in new.items() if m is module or _is_in(folder, k)})
        sys.modules.update(others if before is None else {**others, name: before})
        for key, found in own.items():
            if sys.modules.get(key) is not found:
                # Else torch.compile, which goes by this name, would take the other's globals.
                found.__name__ = f"{key} in {folder}"
                sys.modules[found.__name__] = found


def _is_in(folder: str, name: str) -> bool:
    """Tell whether an imported module is a file or package in ``folder``, or part of such one."""
    top = sys.modules.get(name.partition(".")[0])
    places = getattr(top, "__path__", None) or [getattr(top, "__file__", None) or ""]
    return any(os.path.dirname(place) == folder for place in places)
