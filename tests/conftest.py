"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, and for subprocesses

import pytest
import torch
from hypothesis import settings
from torch import nn

from surestep.auditing import binarization, budgets
from surestep.evaluation import substitute

torch.backends.mps.is_available = lambda: False

# Seconds say nothing of a test that shares its cores with others.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """More threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashes here are of the process, not of the machine: do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _smaller_parts_of_an_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer questions to the substitute, fewer points of binarization: the nets are tiny."""
    monkeypatch.setattr(substitute, "STEPS", min(substitute.STEPS, 80))
    monkeypatch.setattr(binarization, "INNER", min(binarization.INNER, 199))


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an audit is not the subject, what a quick one spends is little."""
    small = budgets.Budget(5, 5, 20, 10, 1, 30, autoattack=False)
    monkeypatch.setitem(budgets.BUDGETS, "quick", small)


@pytest.fixture
def nothing_stays_compiled() -> Iterator[None]:
    """What torch.compile remembers ends with the test."""
    yield
    torch.compiler.reset()


@pytest.fixture
def net() -> nn.Module:
    """A net with batch statistics and dropout, in train mode, its statistics not the initial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96, 3),
        )
        for _ in range(3):
            net(torch.rand(8, 1, 8, 8))
    return net.train()
