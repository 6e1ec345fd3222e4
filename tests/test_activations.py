from __future__ import annotations

import torch
from torch import nn

from surestep.activations import activations
from surestep.posthoc import insert


class GELU(nn.Module):
    """Like timm's, which is no nn.GELU."""

    def forward(self, x):
        return nn.functional.gelu(x)


class QuickGELU(nn.Sequential):
    """Only called like an activation: a block with one inside."""


class Swish(nn.Module):
    """Only called like an activation: it has weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_activations_of_other_packages_are_known_by_their_names():
    net = nn.Sequential(nn.Linear(4, 3), GELU(), QuickGELU(nn.ReLU()), Swish(), nn.Identity())
    assert list(activations(net)) == ["1", "2.0"]


def test_they_can_be_sparsified():
    net = insert(nn.Sequential(nn.Linear(4, 3), GELU()), torch.rand(1, 4), 0.1)
    assert type(net[1][1]) is GELU
