"""Models that a Python file makes, with modules beside it."""

from __future__ import annotations

import sys

import pytest
import torch

from surestep import UserError, models

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
    monkeypatch.setattr(models._from_file, "_FOLDERS", set())
    places = []
    for k in (1, 2):
        folder = tmp_path / str(k)
        (folder / "parts").mkdir(parents=True)
        (folder / "net.py").write_text(NET)
        (folder / "parts" / "blocks.py").write_text(BLOCKS.format(k))
        (folder / "helpers.py").write_text(HELPERS.format(10 * k))
        places.append(f"{folder / 'net.py'}:make")
    yield places
    for key in [key for key in sys.modules if key.partition(".")[0] in ("net", "parts", "helpers")]:
        del sys.modules[key]


def test_a_neighbour_of_another_file_is_not_taken_for_ones_own(nets):
    """Python would silently import the first file's helpers for the second."""
    one, again = (models.from_file(nets[0]) for _ in range(2))
    assert float(one(torch.zeros(1))) == float(again(torch.zeros(1))) == 10
    with pytest.raises(UserError, match="imports 'helpers' from beside it, but another model"):
        models.from_file(nets[1])


def test_files_of_one_name_without_neighbours_are_their_own(nets, tmp_path):
    for k in (3, 4):
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}" / "net.py").write_text(
            f"from torch import nn\ndef make(): return nn.ReLU() if {k} == 3 else nn.GELU()\n"
        )
    made = [type(models.from_file(f"{tmp_path / str(k) / 'net.py'}:make")).__name__ for k in (3, 4)]
    assert made == ["ReLU", "GELU"]
