"""Models that a Python file makes, with modules beside it."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch

from surestep import models

NET = """
from torch import nn
from parts.blocks import Block
from helpers import scale

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return scale(self.block(x))

def make():
    return Net()
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def forward(self, x):
        return x + {}
"""
HELPERS = """
FACTOR = {}

def scale(x):
    return x * FACTOR
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Two files of one name in two folders, and all beside them of one name, too."""
    monkeypatch.setattr(models._from_file, "_BESIDE", {})
    places = []
    for k in (1, 2):
        folder = tmp_path / str(k)
        (folder / "parts").mkdir(parents=True)
        (folder / "net.py").write_text(NET)
        (folder / "parts" / "blocks.py").write_text(BLOCKS.format(k))
        (folder / "helpers.py").write_text(HELPERS.format(10 * k))
        places.append(f"{folder / 'net.py'}:make")
    yield places
    for name in ("net", "parts", "helpers"):
        for key in [key for key in sys.modules if key.split()[0].partition(".")[0] == name]:
            del sys.modules[key]


def test_two_files_with_other_modules_of_the_same_names_beside_them(nets):
    one, two = map(models.from_file, nets)
    again = models.from_file(nets[0])
    x = torch.zeros(1)
    assert [float(net(x)) for net in (one, two, again)] == [10, 40, 10]
    assert type(again.block) is type(one.block)


def test_what_looks_for_their_modules_finds_the_right_ones(nets):
    """Pickle, which goes by the classes' names, those of the first; torch.compile all."""
    one, two = map(models.from_file, nets)
    assert float(pickle.loads(pickle.dumps(one))(torch.zeros(1))) == 10
    for net in (one, two):
        for function in (net.forward, net.block.forward, net.forward.__globals__["scale"]):
            # As torch.compile does, without the seconds that it takes.
            inside = function.__globals__
            assert vars(importlib.import_module(inside["__name__"])) is inside
