"""The attacks of an evaluation, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from surestep import attacks
from surestep.errors import UserError
from surestep.threat import ThreatModel

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

NAMES = "fgsm, r-fgsm, i-fgsm-STEPS, mi-fgsm-STEPS, noise-SAMPLES, pgd-STEPS[xRESTARTS][-LOSS]"
_NAME = re.compile(
    r"(?P<kind>fgsm|r-fgsm|i-fgsm|mi-fgsm|noise|pgd)"
    r"(?:-(?P<count>[1-9]\d*))?(?:x(?P<restarts>[1-9]\d*))?(?:-(?P<loss>ce|margin|dlr))?"
)


def pgd_step_size(eps: float, steps: int) -> float:
    """Return the step size of PGD in an evaluation: 2.5 eps / steps, but at least eps / 30.

    At eps 0.3 this is the usual 0.01 for PGD-100, at eps 8/255 the usual 2/255 for PGD-10.
    """
    return eps * max(2.5 / steps, 1 / 30)


def parse(name: str, threat: ThreatModel) -> Attack:
    """Return the attack of a name, called as ``attack(model, x, y)``.

    Args:
        name: such as "fgsm", "pgd-100", "pgd-20x2" (two restarts), "pgd-100-margin", "noise-10".
        threat: norm, radius and data range.

    Raises:
        UserError: the name is none of these.
    """
    match = _NAME.fullmatch(name)
    counted = match is not None and match["kind"] in ("pgd", "i-fgsm", "mi-fgsm", "noise")
    if (
        match is None
        or counted != (match["count"] is not None)
        or (match["restarts"] is not None and match["kind"] != "pgd")
        or (match["loss"] is not None and match["kind"] == "noise")
    ):
        raise UserError(f"unknown attack {name!r}: write one of {NAMES}, LOSS ce, margin or dlr")
    kind, loss = match["kind"], match["loss"] or "ce"
    count, restarts = int(match["count"] or 0), int(match["restarts"] or 1)

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if kind == "fgsm":
            return attacks.fgsm(model, x, y, threat, loss)
        if kind == "r-fgsm":
            return attacks.r_fgsm(model, x, y, threat, loss=loss)
        if kind == "i-fgsm":
            return attacks.i_fgsm(model, x, y, threat, count, loss)
        if kind == "mi-fgsm":
            return attacks.mi_fgsm(model, x, y, threat, count, loss=loss)
        if kind == "noise":
            return attacks.random_noise(model, x, y, threat, count)
        size = pgd_step_size(threat.eps, count)
        return attacks.pgd(model, x, y, threat, count, size, restarts, loss, stop_when_wrong=True)

    return attack


def parse_all(names: Iterable[str], threat: ThreatModel) -> dict[str, Attack]:
    """Return several attacks by their names.

    Raises:
        UserError: one is unknown, or there is none.
    """
    found = {name: parse(name, threat) for name in names}
    if not found:
        raise UserError(f"no attack given: name some of {NAMES}")
    return found
