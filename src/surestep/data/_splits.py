"""The three splits, and how one set of examples is divided into them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from surestep.errors import UserError
from surestep.randomness import generator

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
KNOWN_AS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
"""What the splits of other people's data are called."""


def check_split(split: str) -> Split:
    """Return ``split`` if it is one of the three, else raise a UserError."""
    for known in SPLITS:
        if split == known:
            return known
    raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")


def check_judged(split: str) -> None:
    """Refuse to judge a model on images that it was trained on.

    Raises:
        UserError: ``split`` is neither test nor validation.
    """
    if split not in ("test", "validation"):
        raise UserError(f"split {split!r}: models are judged on test or validation")


def last_held_out(n: int, split: Split, size: int) -> slice:
    """Return which of ``n`` training examples form ``split``: validation is the last ``size``."""
    return slice(n - size, n) if split == "validation" else slice(0, n - size)


def mixed(n: int) -> torch.Tensor:
    """Return a fixed random order of ``n`` examples, for data that are stored class by class.

    Callers that look at only a part take the first examples, which must represent all of them.
    """
    return torch.randperm(n, generator=generator("order", n), device="cpu")


def some(n: int, count: int) -> torch.Tensor:
    """Return a fixed random choice of ``count`` of ``n`` examples, as sorted indices."""
    return mixed(n)[:count].sort().values


def instead(split: Split) -> str:
    """Return the end of an error about a missing split: which other one can be judged on."""
    return "; commands that judge models take --split validation" if split == "test" else ""


def divide(
    n: int, split: Split, *, what: str, test: bool = True, keys: Sequence[str] | None = None
) -> torch.Tensor:
    """Divide ``n`` examples at random, always the same way, and return those of ``split``.

    Args:
        n: number of examples.
        split: the part to return.
        what: name of the data, for error messages.
        test: divide 80/10/10 into train, validation, test; False: 90/10 into train, validation.
        keys: one per example, such as file names. Examples are then ordered by the hashes of
            their keys, so that adding or removing one moves few others; without keys, one example
            more or less reshuffles all of them, and training examples end up in other splits.

    Returns:
        Sorted int64 indices. The parts are disjoint, none is empty, and together they cover ``n``.

    Raises:
        UserError: if there are too few examples to give each part one.
    """
    parts = 3 if test else 2
    if n < parts:
        raise UserError(
            f"{what} has {n} example{'s' * (n != 1)}, too few to divide into {parts} splits: "
            f"give at least {parts}, or give each split its own data"
        )
    if keys is None:
        order = torch.randperm(n, generator=generator("divide", n), device="cpu")
    else:
        hashes = [hashlib.blake2b(os.fsencode(key)).digest() for key in keys]
        order = torch.tensor(sorted(range(n), key=hashes.__getitem__))
    tenth = max(1, n // 10)
    if split == "validation":
        chosen = order[:tenth]
    elif split == "test":
        chosen = order[tenth : 2 * tenth]
    else:
        chosen = order[(2 if test else 1) * tenth :]
    return chosen.sort().values
