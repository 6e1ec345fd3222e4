"""Random states: left as they were, and kept in checkpoints."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from surestep import files
from surestep.randomness import forked_rng, rng_state, seed_everything, set_rng_state


@pytest.fixture
def apple(monkeypatch):
    """Play torch.mps: its random state is one tensor that drawing would change."""
    held = [torch.zeros(2, dtype=torch.uint8)]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: held.__setitem__(0, state))
    return held


def test_the_random_state_of_mps_is_left_as_it_was(apple):
    before = torch.get_rng_state()
    with forked_rng(torch.device("mps")):
        torch.rand(1)
        torch.mps.set_rng_state(torch.ones(2, dtype=torch.uint8))
    assert apple[0].tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_holds_the_random_state_of_mps(apple):
    state = rng_state(torch.device("cpu"))
    torch.mps.set_rng_state(torch.ones(2, dtype=torch.uint8))
    set_rng_state(state, torch.device("cpu"))
    assert apple[0].tolist() == [0, 0]


def test_a_checkpoint_holds_the_random_states_of_python_and_numpy(tmp_path):
    cpu = torch.device("cpu")
    seed_everything(3)
    random.gauss(0, 1)
    state = rng_state(cpu)
    files.save_tree(tmp_path / "state", state)

    def draw():
        return random.gauss(0, 1), np.random.randn(2).tolist(), torch.rand(2).tolist()  # noqa: NPY002

    expected = draw()
    for one in (state, files.load_tree(tmp_path / "state")):
        seed_everything(4)
        set_rng_state(one, cpu)
        assert draw() == expected
