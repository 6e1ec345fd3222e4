"""GradAlign where only one of the two gradients is there."""

import torch
from torch import nn

from surestep import Linf, methods


def test_a_gradient_beside_the_image_alone_does_not_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.zeros(2, 5), torch.tensor([0, 1])  # every unit sits on its kink, slope 0
    terms = methods.get("gradalign")(Linf(0.1))(net, x, y).terms
    assert float(terms["turn"]) == 0


def test_nor_does_one_at_the_image_alone(monkeypatch):
    """The random point lies where every unit is off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.abs_()
    x, y = torch.full((2, 5), 0.5), torch.tensor([0, 1])
    threat = Linf(0.6)
    monkeypatch.setattr(Linf, "random_delta", lambda self, x, radius=None: torch.full_like(x, -0.6))
    terms = methods.get("gradalign")(threat)(net, x, y).terms
    assert float(terms["turn"]) == 0
