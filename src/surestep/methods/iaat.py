"""IAAT: every image has a radius of its own (Balaji et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.core import misclassified
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.methods._base import Cost, Update, register
from surestep.methods._memory import Memory
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods.pgd import PGD
from surestep.threat import per_sample


@register("iaat")
@dataclass
class IAAT(PGD):
    """IAAT: a radius grows by ``gamma`` if the image withstands that, and shrinks if not the old.

    A share of PGD's perturbation of the full radius is taken, so that no radius exceeds eps; the
    authors run the attack at each image's own. The radius of an image that is wrong as it is aims
    at 0. Of each move ``beta`` is taken; for the share ``rest`` of training there is none.
    """

    summary = "PGD; each image's radius grows while it withstands it"
    paper = "Balaji et al. 2019, arXiv 1910.08051"
    lengths = ("alpha",)
    needs_index = True
    needs_progress = True
    kept = ("_missing",)
    presets = {
        "mnist": recipe(MNIST_ZOO, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, steps=10, alpha=2 / 255),
    }

    gamma: float = 1.9 / 8
    beta: float = 0.1
    rest: float = 0.1

    def validate(self) -> None:
        """Check the rates, in shares of eps and of training."""
        super().validate()
        self.require(0 < self.gamma <= 1, "gamma", "in (0, 1]")
        self.require(0 < self.beta <= 1, "beta", "in (0, 1]")
        self.require(0 <= self.rest <= 1, "rest", "in [0, 1]")
        self._missing = Memory()  # eps minus the image's radius, as a share: 0 at first

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Attack at the full radius, scale to the image's, then move the radius."""
        assert index is not None
        images = self.progress.images
        delta = self.perturb(model, x, y) - x
        share = 1 - self._missing.read(index, x.flatten(1)[:, 0], images)
        more, less = (share + self.gamma).clamp(max=1), (share - self.gamma).clamp(min=0)
        larger, x_adv = (
            self.threat.project(x + per_sample(r, x) * delta, x) for r in (more, share)
        )
        with attacking(model) as inner, torch.no_grad():
            logits = forward_logits(inner, torch.cat([larger, x_adv, x]))
        grows, stays, right = (~misclassified(logits, y.repeat(3))).chunk(3)
        aim = right * torch.where(grows, more, torch.where(stays, share, less))
        beta = self.beta if self.progress.done >= self.rest else 0.0
        self._missing.write(index, 1 - torch.lerp(share, aim, beta), images)
        return Update(x_adv, self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """PGD-AT's, and a pass each that tries the next radius, the old and none."""
        return Cost(self.steps + 4, self.steps + 1, 1)
