"""How much an audit may spend, by name."""

from __future__ import annotations

from dataclasses import dataclass

from surestep.errors import look_up


@dataclass(frozen=True)
class Budget:
    """How much an audit may spend.

    Attributes:
        steps: of PGD.
        noise: random points per image.
        queries: of Square on every image that is right clean.
        probe: images for the checks that look closely; for binarization a fifth of them, but
            at least 20.
        restarts: of PGD when a check flags.
        late_queries: of Square, on what is left, when a check flags.
        autoattack: run AutoAttack's standard version on what is left.
        fast: make the attacks' points in bfloat16 where the device multiplies it and the model
            agrees with itself there; what they break is decided in float32 in any case.
    """

    steps: int
    noise: int
    queries: int
    probe: int
    restarts: int
    late_queries: int
    autoattack: bool
    fast: bool = False


BUDGETS = {
    "quick": Budget(50, 50, 200, 100, 1, 300, autoattack=False, fast=True),
    "standard": Budget(100, 500, 1000, 200, 3, 2000, autoattack=True),
    # The later Square has a name, and random numbers, of its own.
    "thorough": Budget(200, 10_000, 5000, 500, 5, 10_000, autoattack=True),
}


def budget_of(name: str) -> Budget:
    """Return a budget by its name.

    Raises:
        UserError: there is none of that name.
    """
    return look_up("budget", name, BUDGETS)
