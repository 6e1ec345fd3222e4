"""Models made by a Python file of the user: FILE.py:FACTORY."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from torch import nn

from surestep.errors import UserError

_FOLDERS: set[str] = set()
"""Where model files have been that have run in this process."""


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
        UserError: there is no such file or function, it fails, or it returns no module; or it
            imports a module from beside it of whose name another model file has imported another.
    """
    path, _, factory = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file} does not exist: give FILE.py:FACTORY")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As in a script, files beside it can be imported. Dataclasses look up their own module.
    folder = str(file.parent.resolve())
    others = _imported_from_elsewhere(folder)
    for key in others:
        del sys.modules[key]
    _FOLDERS.add(folder)
    sys.path.insert(0, folder)
    before = sys.modules.get(file.stem)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
        make = getattr(module, factory, None)
        if make is None:
            known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
            raise UserError(f"{file} has no {factory!r}: it has {', '.join(known) or 'nothing'}")
        model = make()
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # a script that runs, and exits, when imported
        raise UserError(f"{file}:{factory} fails: {type(e).__name__} {e}") from e
    finally:
        with suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(folder)
        if before is not None:
            sys.modules[file.stem] = before
        twice = sorted(others.keys() & sys.modules.keys() - {file.stem})
        sys.modules.update(others)
    if twice:
        raise UserError(
            f"{file} imports {twice[0]!r} from beside it, but another model file has imported "
            "another module of that name: rename one, or load the models in different processes"
        )
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{file}:{factory} returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _imported_from_elsewhere(folder: str) -> dict[str, ModuleType]:
    """Return the modules that model files in other folders have imported from beside them.

    They must stay imported, because torch.compile and pickle look for them.
    """

    def place(module: ModuleType) -> str:
        paths = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None) or ""]
        return os.path.dirname(paths[0])

    modules = dict(sys.modules)
    others = _FOLDERS - {folder}
    beside = {name for name, m in modules.items() if "." not in name and place(m) in others}
    return {name: m for name, m in modules.items() if name.partition(".")[0] in beside}
