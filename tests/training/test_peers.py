"""The steps that step_cost.py holds surestep's against compute the same: only the habits differ."""

from __future__ import annotations

import copy

import _peers
import pytest
import torch
from torch import nn

import surestep
from surestep import methods
from surestep.training import make_step

EPS = 0.1
PEERS = {
    "fgsm": ({}, lambda m, o: _peers.fgsm(m, o, EPS)),
    "pgd": ({"steps": 3, "alpha": 0.05}, lambda m, o: _peers.pgd(m, o, EPS, 3, 0.05)),
    "sat-r1": (
        {"fraction": 1 / 8, "steps": 3, "lam": 2.0},
        lambda m, o: _peers.sat_r1(m, o, EPS, 8, 3, 2.0),
    ),
    "sat-r2": ({"lam": 5.0, "alpha": 0.02}, lambda m, o: _peers.sat_r2(m, o, EPS, 5.0, 0.02)),
    "sat-r3": (
        {"lam": 2.0, "tau": 0.4, "alpha": 0.02, "eps_low": 0.04},
        lambda m, o: _peers.sat_r3(m, o, EPS, 2.0, 0.4, 0.02, 0.04),
    ),
}


@pytest.mark.parametrize("slug", list(PEERS))
def test_one_step_of_theirs_is_one_of_ours(tiny, slug):
    params, make = PEERS[slug]
    x, y = tiny.data()
    x, ends = x.double(), []
    with tiny.nothing_random():
        for whose in ("theirs", "ours"):
            net = tiny.net(dtype=torch.float64).train()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            if whose == "theirs":
                make(net, optimizer)(x, y)
            else:
                method = methods.build(slug, surestep.Linf(EPS), params)
                make_step(net, method, optimizer, "reference")(x, y)
            ends.append(net)
    start = tiny.net(dtype=torch.float64)
    moved = 0.0
    for theirs, ours, before in zip(*(n.parameters() for n in (*ends, start)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
        moved = max(moved, float((ours - before).detach().abs().max()))
    assert moved > 1e-3
    for theirs, ours in zip(*(n.buffers() for n in ends), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_a_plain_network_computes_what_ours_does():
    ours = surestep.models.create("lenet+").eval()
    plain = _peers.plain(copy.deepcopy(ours))
    assert {type(m) for m in plain.modules() if "Conv" in type(m).__name__} == {nn.Conv2d}
    x, grads = torch.rand(2, 1, 28, 28), []
    for net in (ours, plain):
        images = x.clone().requires_grad_()
        net(images).square().sum().backward()
        grads.append(images.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)
