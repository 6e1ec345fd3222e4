"""Importing surestep: light, offline, and possible with every optional package missing."""

from __future__ import annotations

import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from importlib import resources

import pytest

import surestep

NO_NETWORK = """
import socket

class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("something asked for the network")

socket.socket = socket.create_connection = socket.getaddrinfo = Refused
"""

MODULES = [m.name for m in pkgutil.walk_packages(surestep.__path__, "surestep.")]


def fresh(code: str) -> str:
    """Run code in a new interpreter, without a network; return what it printed."""
    ended = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:surestep", "-c", NO_NETWORK + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_import_is_light():
    heavy = {"torch", "numpy", "accelerate", "safetensors", "torchvision", "PIL", "rich", "yaml"}
    loaded = fresh("import sys, json, surestep; print(json.dumps(list(sys.modules)))")
    assert not heavy & set(json.loads(loaded))


OPTIONAL = [
    *("altair", "vl_convert", "jinja2", "tabulate", "jsonschema", "pyautoattack", "torchvision"),
    *("PIL", "timm", "datasets", "tensorboard", "torch.utils.tensorboard"),
]
LIGHT = {
    "data": ["PIL", "datasets", "rich", "urllib.request"],
    "report": ["altair", "vl_convert", "jinja2"],
}
"""What a room leaves alone until it is needed."""


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """What a new interpreter says after some imports; one does it all, as torch takes seconds."""
    code = f"""
import importlib, json, sys
import torch  # what it imports itself is not ours to judge
before, found = set(sys.modules), {{}}
for room, names in {LIGHT}.items():
    importlib.import_module("surestep." + room)
    found[room] = sorted({{*names}} & set(sys.modules) - before)
# Once more, and everything, where nothing optional can be imported.
for name in [name for name in sys.modules if name.split(".")[0] == "surestep"]:
    del sys.modules[name]
sys.modules |= dict.fromkeys({OPTIONAL})
for name in {MODULES}:
    importlib.import_module(name)
import surestep
found["lost"] = [name for name in surestep.__all__ if getattr(surestep, name, None) is None]
print(json.dumps(found))
"""
    return json.loads(fresh(code))


def test_every_module_without_the_optional_packages(told):
    """Also shows that no import asks for the network, and that every public name resolves."""
    assert told["lost"] == []
    assert len(MODULES) > 40


@pytest.mark.parametrize("room", LIGHT)
def test_a_room_imports_what_is_heavy_where_it_is_needed(told, room):
    assert told[room] == []


@pytest.mark.parametrize("name", surestep.__all__)
def test_a_public_name(name):
    assert getattr(surestep, name) is not None
    assert name in dir(surestep)


def test_a_public_name_is_at_home_where_it_says():
    assert surestep.fit is surestep.training.fit
    assert surestep.evaluate is surestep.evaluation.evaluate
    assert issubclass(surestep.UserError, ValueError)
    assert issubclass(surestep.Linf, surestep.ThreatModel)


@pytest.mark.parametrize("room", ["config", "errors", "threat"])
def test_rooms_that_the_documentation_names(room):
    assert surestep.__getattr__(room).__name__ == f"surestep.{room}"
    assert room in surestep.__all__


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'surestep' has no attribute 'fitt'"):
        surestep.fitt  # noqa: B018
    assert not hasattr(surestep, "__wrapped__")
    with pytest.raises(ImportError, match="fitt"):
        from surestep import fitt  # noqa: F401


@pytest.mark.parametrize("room", [m for m in MODULES if m.count(".") == 1])
def test_all_of_a_room_resolves(room):
    module = importlib.import_module(room)
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_version():
    assert surestep.__version__ == importlib.metadata.version("surestep")


def test_files_that_come_along():
    package = resources.files("surestep")
    assert (package / "py.typed").is_file()
    assert (package / "data" / "files" / "mnist" / "LICENSE.txt").is_file()
    cards = {p.name.removesuffix(".md") for p in (package / "methods" / "cards").iterdir()}
    assert cards == set(surestep.methods.names())
