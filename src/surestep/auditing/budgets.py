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
        late_queries: Square's queries per surviving image when a check flags. Never as many as
            ``queries``: of the same name, this Square would draw the same numbers and take the
            first one's place.
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

    @property
    def pgd(self) -> str:
        """Name of the PGD that other attacks are held against."""
        return f"pgd-{self.steps}"

    @property
    def pgd_margin(self) -> str:
        """Name of the same on the margin."""
        return f"{self.pgd}-margin"

    @property
    def random_points(self) -> str:
        """Name of the attack by random points."""
        return f"noise-{self.noise}"

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks on every image that is right clean; transfer follows them."""
        return (
            *("fgsm", "fgsm-margin", "pgd-10", self.random_points),
            *(self.pgd, self.pgd_margin, f"square-{self.queries}"),
        )


BUDGETS = {
    "quick": Budget(
        steps=50,
        noise=50,
        queries=200,
        probe=100,
        restarts=1,
        late_queries=300,
        autoattack=False,
        fast=True,
    ),
    "standard": Budget(
        steps=100,
        noise=500,
        queries=1000,
        probe=200,
        restarts=3,
        late_queries=2000,
        autoattack=True,
    ),
    "thorough": Budget(
        steps=200,
        noise=10_000,
        queries=5000,
        probe=500,
        restarts=5,
        late_queries=10_000,
        autoattack=True,
    ),
}


def budget_of(name: str) -> Budget:
    """Return the budget called ``name``.

    Raises:
        UserError: no budget has that name.
    """
    return look_up("budget", name, BUDGETS)
