from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from surestep.evaluation import suite
from surestep.evaluation.suite import Attack, AttackResult


@pytest.fixture
def images(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Ninety images; the labels are the net's own, but for every ninth."""
    x = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    net.train()
    y[::9] = (y[::9] + 1) % 3
    return x, y


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Return ``told(**broken)``: make attacks that break just the images they are told to.

    Returns the model to go with them: an image's first pixel, 0.1 k, says its class k; an attack
    breaks image number i, known by its second pixel, by adding a class.
    """

    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            classes = torch.arange(5.0) * 0.1
            return -(x[:, :1] - classes).abs()

    real = suite.parse

    def install(**broken: set[int]) -> nn.Module:
        def parse(name: str, threat: object, sources: object = ()) -> Attack:
            def attack(model: nn.Module, x: Tensor, y: Tensor) -> AttackResult:
                numbers = (x[:, 1] * 1000).round().int().tolist()
                hit = torch.tensor([n in broken[name] for n in numbers])
                x = x.clone()
                x[hit, 0] += 0.1
                return AttackResult(x)

            of_ones_own = name.partition("-")[0] not in suite.KINDS
            known = Attack(attack) if of_ones_own else real(name, threat)
            return replace(known, run=attack, survivors_only=False)

        monkeypatch.setattr("surestep.evaluation.suite.parse", parse)
        return Reader()

    return install
