from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import surestep
from surestep.auditing import Audit, audit, binarization, budgets
from surestep.evaluation import substitute


@pytest.fixture(scope="session")
def images() -> tuple[Tensor, Tensor]:
    """Sixty images of three classes: a template each, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    templates = (torch.rand(3, 1, 8, 8, generator=generator) > 0.5).float() * 0.4 + 0.3
    y = torch.arange(60) % 3
    x = templates[y] + 0.1 * torch.randn(60, 1, 8, 8, generator=generator)
    return x.clamp(0, 1), y


@pytest.fixture(scope="session")
def trained_once(images: tuple[Tensor, Tensor]) -> nn.Module:
    """A network that tells the templates apart, so that it withstands eps 0.05 and not 0.3."""
    x, y = images
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3))
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(60):
            noisy = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
            loss = nn.functional.cross_entropy(net(noisy), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.zero_grad()
    return net.eval()


@pytest.fixture
def net(trained_once: nn.Module) -> nn.Module:
    """A copy that a test may change."""
    return copy.deepcopy(trained_once)


SMALL = budgets.Budget(20, 20, 60, 30, 1, 200, autoattack=False)
"""With it an audit takes a second, and still comes to the right verdict."""


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(budgets.BUDGETS, "quick", SMALL)


@pytest.fixture
def run(images, small_budget: None) -> Callable[..., Audit]:
    """Audit a model on the images, with the small budget."""

    def call(model: nn.Module, eps: float = 0.3, data=images, **more) -> Audit:
        return audit(model, data, surestep.Linf(eps), budget="quick", **more)

    return call


@pytest.fixture(scope="session")
def plain(trained_once: nn.Module, images: tuple[Tensor, Tensor]) -> Audit:
    """What ``run(net)`` returns, for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        # As for a single test; the fixtures that do so are not there yet.
        patch.setitem(budgets.BUDGETS, "quick", SMALL)
        patch.setattr(substitute, "STEPS", 80)
        patch.setattr(binarization, "INNER", 199)
        return audit(copy.deepcopy(trained_once), images, surestep.Linf(0.3), budget="quick")


@pytest.fixture
def little_else(monkeypatch):
    """Still less of what costs time: how good the substitute and binarization are says nothing."""
    monkeypatch.setattr("surestep.evaluation.substitute.STEPS", 20)
    monkeypatch.setattr("surestep.auditing.binarization.INNER", 30)
