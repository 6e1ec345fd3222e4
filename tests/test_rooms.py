"""Which room imports from which, as docs/architecture.md says; read from the code, not run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import surestep

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "surestep"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ROOMS = re.findall(r"^  (\w+)(?:/|\.py) ", PAGE.partition("\nsrc/surestep/\n")[2], re.MULTILINE)
"""In the page's order."""
FOR_ALL = {"config", "files", "devices", "environment"}
"""From these every room may import."""


def room_of(path):
    """The room that a file belongs to; None for what is above them all."""
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return None if name.startswith("__") else name


def home_of(name):
    """The room of a name that surestep has: the room itself, or a class or function of one."""
    if name in ROOMS:
        return name
    module = getattr(getattr(surestep, name), "__module__", "")  # the version has none
    return module.split(".")[1] if module else None


def imports(path):
    """The rooms that a file imports from, wherever in it; those for type checkers alone, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{one.name}" for one in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "surestep" and rest:
                found.add(home_of(rest.split(".")[0]))
    return found - {None}


FILES = sorted(path for path in SOURCE.rglob("*.py") if room_of(path))


def test_the_page_lists_every_room():
    assert sorted(ROOMS) == sorted({room_of(path) for path in FILES})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_above_it(room):
    files = [path for path in FILES if room_of(path) == room]
    found = {path: imports(path) - {room} for path in files}
    # The four import nothing but errors, wherever they are listed.
    above = {"errors", "devices"} if room == "environment" else {"errors"}
    if room not in FOR_ALL:
        above = FOR_ALL | {*ROOMS[: ROOMS.index(room)]}
    wrong = {str(path.relative_to(SOURCE)): sorted(names - above) for path, names in found.items()}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_methods_never_import_training():
    """Whatever the order of the page, so that a user's own loop does not need ours."""
    users = {room_of(path) for path in FILES if "training" in imports(path)}
    assert "runs" in users
    assert not users & {"threat", "attacks", "methods", "models", "data"}
