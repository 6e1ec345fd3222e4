"""Attacks that look for the nearest wrong point, from foolbox: CW-L2 and DeepFool.

They know no radius: what they find counts where it lies within the threat model's. foolbox is an
extra, adapted, not changed: it leaves no gradients in the weights, and no point outside the ball.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking, frozen
from surestep.devices import exact
from surestep.errors import UserError, need
from surestep.threat import L2, Linf, ThreatModel

CW_STEPS, DEEPFOOL_STEPS = 1000, 50
SEARCHES = 9
"""Of CW: for the constant between distance and margin."""
CANDIDATES = 10
"""Classes towards which DeepFool looks, at most."""


def cw_l2(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = CW_STEPS
) -> Tensor:
    """Carlini & Wagner's attack: Adam on distance and margin together (arXiv 1608.04644, VI.A).

    Args:
        model: the classifier.
        x: images (N, ...) in the data range.
        y: labels (N,).
        threat: of the l2 norm.
        steps: of each of the nine searches.

    Returns:
        x_adv, shaped as x, within the ball: the nearest wrong point if that lies there.

    Raises:
        UserError: on invalid images or labels, another norm, or foolbox not installed.
    """
    check("cw-l2", threat)
    import foolbox.attacks

    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=SEARCHES, steps=steps)
    return _run(attack, model, x, y, threat)


def deepfool(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = DEEPFOOL_STEPS
) -> Tensor:
    """DeepFool: steps to the nearest boundary of the linearised model (arXiv 1511.04599).

    Args:
        model: the classifier.
        x: images (N, ...) in the data range.
        y: labels (N,).
        threat: norm (L-inf or L2), radius and data range.
        steps: at most.

    Returns:
        x_adv, shaped as x, within the ball: the wrong point found if that lies there.

    Raises:
        UserError: on invalid images or labels, another norm, or foolbox not installed.
    """
    check("deepfool", threat)
    import foolbox.attacks as found

    kind = found.L2DeepFoolAttack if isinstance(threat, L2) else found.LinfDeepFoolAttack
    return _run(kind(steps=steps, candidates=CANDIDATES), model, x, y, threat)


def check(name: str, threat: ThreatModel) -> None:
    """Refuse a norm in which the attack does not look, and a missing foolbox.

    Raises:
        UserError: the norm is not supported, or foolbox is missing.
    """
    norms = (L2,) if name == "cw-l2" else (L2, Linf)
    if not isinstance(threat, norms):
        raise UserError(
            f"{name} supports l2{'' if name == 'cw-l2' else ' and linf'} only, the threat model is "
            f"{threat.to_dict()['norm']}: name another attack"
        )
    need("foolbox", name, "surestep[foolbox]")


class _Logits(nn.Module):
    """A model as foolbox calls it: it wants a module in eval mode that returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False  # the model is in eval mode already; eval() would walk through it

    def forward(self, x: Tensor) -> Tensor:
        return forward_logits(self.model, x)


def _run(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    import foolbox

    check_inputs(model, x, y, threat)
    if threat.eps == 0:
        return x.detach().clone()
    # It calls backward, which would add to the user's gradients. And it keeps the nearest point
    # that is wrong, be it by a hair that is there in low precision only.
    with attacking(model) as inner, frozen(inner), torch.enable_grad(), exact(x.device):
        bounds = threat.bounds_in(x.dtype)
        called = foolbox.PyTorchModel(_Logits(inner), bounds=bounds, device=x.device)
        found = attack(called, x.detach(), y, epsilons=None)[0].detach()
    # DeepFool divides by gradients, which may be zero.
    return threat.project(torch.where(found.isfinite(), found, x), x)
