"""Attacks of foolbox's, held against a model whose nearest boundary can be computed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import surestep
from surestep.attacks import nearest
from surestep.errors import UserError
from surestep.evaluation import suite

pytest.importorskip("foolbox", reason="an extra: pip install 'surestep[foolbox]'")

CENTRE = 0.5
NORMS = {surestep.Linf: float("inf"), surestep.L2: 2}


def linear() -> nn.Module:
    """Four classes, linear in the image, in train mode and with dropout: attacks must leave both.

    Its weights are small, so that its boundaries lie within the data range.
    """
    torch.manual_seed(0)
    layer = nn.Linear(12, 4).double()
    with torch.no_grad():
        layer.bias.copy_(-layer.weight.sum(1) * CENTRE + 0.02 * torch.randn(4))
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), layer)


def to_boundary(layer: nn.Linear, x: torch.Tensor, label: int, norm: int) -> float:
    """To the nearest point of another class, in plain loops: the margin over the dual norm."""
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    flat = x.flatten().tolist()
    logits = [
        sum(w * v for w, v in zip(row, flat, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]
    found = []
    for other in range(len(logits)):
        if other == label:
            continue
        step = [w - v for w, v in zip(weight[other], weight[label], strict=True)]
        size = sum(abs(s) for s in step) if norm == 1 else sum(s * s for s in step) ** 0.5
        found.append((logits[label] - logits[other]) / size)
    return min(found)


@pytest.fixture
def data():
    torch.manual_seed(1)
    net = linear()
    x = CENTRE + 0.1 * torch.randn(10, 1, 3, 4).double()
    return net, x, net.eval()(x).argmax(1)


@pytest.mark.parametrize(
    ("name", "threat", "dual", "slack"),
    [
        ("deepfool", surestep.Linf, 1, 1.03),
        ("deepfool", surestep.L2, 2, 1.03),
        ("cw-l2-300", surestep.L2, 2, 1.1),
    ],
)
def test_it_breaks_what_lies_within_the_ball_and_nothing_else(data, name, threat, dual, slack):
    net, x, y = data
    net[1].train()
    away = [to_boundary(net[2], one, int(label), dual) for one, label in zip(x, y, strict=True)]
    eps = sorted(away)[5] * slack
    x_adv = suite.parse(name, threat(eps)).run(net, x, y)
    assert net[1].training
    assert not net[2].training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert float((x_adv - x).flatten(1).norm(NORMS[threat], 1).max()) <= eps * (1 + 1e-9)
    wrong = (net.eval()(x_adv).argmax(1) != y).tolist()
    for one, is_wrong in zip(away, wrong, strict=True):
        assert is_wrong or one * slack > eps
        assert not is_wrong or one <= eps
    assert 6 <= sum(wrong) < 10


def test_a_radius_of_zero_and_a_model_that_is_flat(data):
    net, x, y = data
    assert torch.equal(nearest.deepfool(net, x, y, surestep.Linf(0)), x)
    nn.init.zeros_(net[2].weight)
    y = net.eval()(x).argmax(1)
    for threat, attack in (
        (surestep.Linf(0.1), nearest.deepfool),
        (surestep.L2(0.1), nearest.cw_l2),
    ):
        x_adv = attack(net, x, y, threat, 3)
        assert x_adv.isfinite().all()
        assert float((x_adv - x).flatten(1).norm(NORMS[type(threat)], 1).max()) <= 0.1 + 1e-9


def test_a_norm_in_which_it_does_not_look():
    with pytest.raises(UserError, match="cw-l2 supports l2 only, the threat model is linf: name"):
        suite.parse("cw-l2", surestep.Linf(0.3))


def test_it_decides_in_float32(digits, mlp, autocast_at_logits):
    """foolbox keeps the nearest point that is wrong, be it by a hair of bf16's."""
    seen = autocast_at_logits(nearest)
    x = digits(4)[0].float()
    net = mlp.float()
    with torch.autocast("cpu", torch.bfloat16):
        nearest.deepfool(net, x, net(x).argmax(1), surestep.L2(0.5), 3)
    assert seen
    assert not any(seen)


def test_without_foolbox(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(UserError, match=r"needs foolbox: pip install 'surestep\[foolbox\]'"):
        suite.parse("deepfool", surestep.Linf(0.3))
