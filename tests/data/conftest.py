from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from surestep.errors import UserError


@pytest.fixture
def refused() -> Callable[..., str]:
    """Run something that must be refused; return the message, which is one line."""

    def run(action: Callable[[], object], *words: str) -> str:
        with pytest.raises(UserError) as caught:
            action()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        return message

    return run


@pytest.fixture
def real_cifar() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"the real CIFAR-10 files are not at {folder}")
    return folder
