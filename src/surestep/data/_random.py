"""Random generators that depend only on the numbers and words they are named by."""

from __future__ import annotations

import hashlib

import torch


def generator(*words: int | str) -> torch.Generator:
    """Return a CPU generator seeded from a hash of ``words``.

    With ``seed + epoch``, run 0 at epoch 1 would repeat the draws of run 1 at epoch 0; and the two
    cannot be packed side by side, since PyTorch's CPU generator keeps only the low 32 bits of its
    seed. A hash (BLAKE2b of the words) avoids such collisions and is the same on every platform
    and Python version.
    """
    return torch.Generator().manual_seed(seed_of(*words))


def seed_of(*words: int | str) -> int:
    """Return 32 bits of a hash of ``words``."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
