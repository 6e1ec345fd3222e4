"""Models whose truth is known by construction, and parts of their audits."""

from __future__ import annotations

import torch
from torch import nn

import surestep
from surestep.auditing import Check, _subject, budgets


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def quantise(x):
    return (x * 7).round() / 7


def thermometer(x):
    return (x > torch.arange(0.05, 1, 0.1).view(1, -1, 1, 1)).float()


MASKS = {
    "quantised": lambda net: nn.Sequential(Layer(quantise), net),
    "detached": lambda net: nn.Sequential(Layer(torch.Tensor.detach), net),
    "no gradient at all": lambda net: Layer(lambda x: net(x.detach()).detach()),
    "probabilities": lambda net: nn.Sequential(net, Layer(lambda z: (8 * z).softmax(1))),
    "logits x 1e4": lambda net: nn.Sequential(net, Layer(lambda z: 1e4 * z)),
    "noise": lambda net: nn.Sequential(Layer(lambda x: x + 0.1 * torch.randn_like(x)), net),
    "thermometer": lambda net: nn.Sequential(
        Layer(thermometer), Layer(lambda x: x.mean(1, keepdim=True)), net
    ),
    "nan gradients": lambda net: nn.Sequential(Layer(lambda x: x + 0 * (x - x).sqrt()), net),
}


class Gated(nn.Module):
    """Scales a net's answer by what an argmax decides."""

    def __init__(self, net):
        super().__init__()
        self.net, self.gate = net, nn.Linear(64, 2)

    def forward(self, x):
        return self.net(x) * (1 + self.gate(x.flatten(1)).argmax(1, keepdim=True))


PLAIN = {"straight": False, "probabilities": False, "random": False, "switches": 0}
"""What calls for no answer of the audit: the arguments of ``most_forwards``."""


UNSEEN = {"quantised", "detached", "no gradient at all", "thermometer", "nan gradients"}
"""What gradient attacks cannot see at all: these masks make a weak model look robust."""


def flagged(name, **counts):
    return Check(1, name, name, "flagged", 1.0, "", "", "", sign=name, **counts)


def subject(model, images, *, fast=True):
    x, y = images
    budget = budgets.Budget(5, 5, 20, 30, 1, 30, autoattack=False, fast=fast)
    return _subject.Subject(model, x, y, surestep.Linf(0.3), budget, 0, 25, lambda _: None)
