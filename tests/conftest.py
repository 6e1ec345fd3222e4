"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Seconds say nothing of a test that shares its cores with others.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """More threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class NoReading(TorchDispatchMode):
    """Fails on operations whose result the host must wait for, wherever they come from."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        assert name not in {r.strip("_") for r in READS}, f"the step reads a value: {func}"
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        for index in indices if isinstance(indices, (list, tuple)) else ():
            assert index is None or index.dtype != torch.bool, "the step indexes with a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reading() -> type[NoReading]:
    """The mode in which a step must not read values."""
    return NoReading
