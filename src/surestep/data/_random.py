"""Random generators that depend on nothing but the numbers they are named by."""

from __future__ import annotations

import hashlib

import torch


def generator(*words: int | str) -> torch.Generator:
    """Return a CPU generator seeded from a hash of ``words``.

    The CPU generator of PyTorch keeps only the low 32 bits of its seed, so ``seed + epoch`` would
    give run 0 at epoch 1 the draws of run 1 at epoch 0. A hash (BLAKE2b of the words) has no such
    neighbours and is the same on every platform and Python version.
    """
    return torch.Generator().manual_seed(seed_of(*words))


def seed_of(*words: int | str) -> int:
    """Return 32 bits of a hash of ``words``."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
