"""How much an audit may spend, by name."""

from __future__ import annotations

from dataclasses import dataclass

from surestep.errors import look_up


@dataclass(frozen=True)
class Budget:
    """How much an audit may spend.

    Attributes:
        steps: PGD steps.
        noise: random points per image.
        queries: Square's queries per image that is right clean.
        probe: images that the closer checks look at; binarization takes a fifth of them, but at
            least 20.
        restarts: PGD restarts when a check flags.
        late_queries: Square's queries per surviving image when a check flags.
        autoattack: run AutoAttack's standard version on the surviving images.
        fast: craft the attacks' points in bfloat16 if the device multiplies it and the model
            answers alike in it; whether a point succeeds is always decided in float32.
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
    # The later Square has its own name and therefore its own random numbers.
    "thorough": Budget(200, 10_000, 5000, 500, 5, 10_000, autoattack=True),
}


def budget_of(name: str) -> Budget:
    """Return the budget called ``name``.

    Raises:
        UserError: no budget has that name.
    """
    return look_up("budget", name, BUDGETS)
