"""The three splits, and how one set of examples is divided into them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from surestep.data._random import generator
from surestep.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def check_split(split: str) -> Split:
    """Return ``split`` if it is one of the three, else raise a UserError."""
    for known in SPLITS:
        if split == known:
            return known
    raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")


def last_held_out(n: int, split: Split, size: int) -> slice:
    """Which of ``n`` training examples belong to ``split``: the last ``size`` are validation."""
    return slice(n - size, n) if split == "validation" else slice(0, n - size)


def mixed(n: int) -> torch.Tensor:
    """Return an order of ``n`` examples, always the same, for such as lie class by class.

    Whoever looks at a part takes the first ones, which are to stand for all.
    """
    return torch.randperm(n, generator=generator("order", n), device="cpu")


def some(n: int, count: int) -> torch.Tensor:
    """Return which ``count`` of ``n`` examples, always the same, stand for all of them."""
    return mixed(n)[:count].sort().values


def instead(split: Split) -> str:
    """Return what an error adds where a split is not there: what else can be judged on."""
    return "; evaluate and audit take --split validation" if split == "test" else ""


def divide(
    n: int, split: Split, *, what: str, test: bool = True, keys: Sequence[str] | None = None
) -> torch.Tensor:
    """Divide ``n`` examples at random, always the same way, and return those of ``split``.

    Args:
        n: number of examples.
        split: the part to return.
        what: what is divided, in words, for the error.
        test: divide 80/10/10 into train, validation, test; False: 90/10 into train, validation.
        keys: of the examples, such as file names: an example more or less then moves few others,
            where by number alone it would send most that were trained on to another part.

    Returns:
        Sorted int64 indices. The parts are disjoint, none is empty, together they are all of ``n``.

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
