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
    """IAAT: a radius grows if the image withstands a larger one, and shrinks if it fails as is.

    PGD runs at eps and its perturbation is scaled to the image's radius, so no radius exceeds eps;
    the authors run the attack at each image's own radius. For the first ``rest`` of training, at
    least an epoch, the radius is eps where the clean image is classified correctly and 0 elsewhere.
    Then it moves ``beta`` of the way to its target: ``gamma`` more or less, 0 if the clean image is
    wrong.
    """

    summary = "PGD; each image has a radius of its own, which grows while the image withstands it"
    paper = "Balaji et al. 2019, arXiv 1910.08051"
    needs_index = True
    needs_progress = True
    kept = ("_radius",)
    presets = {
        "mnist": recipe(MNIST_ZOO, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, steps=10, alpha=2 / 255),
    }

    gamma: float = 1.9 / 8
    beta: float = 0.1
    rest: float = 0.1

    def validate(self) -> None:
        """Check gamma (a share of eps), beta and rest (a share of training)."""
        super().validate()
        self.require(0 < self.gamma <= 1, "gamma", "in (0, 1]")
        self.require(0 < self.beta <= 1, "beta", "in (0, 1]")
        self.require(0 <= self.rest <= 1, "rest", "in [0, 1]")
        self._radius = Memory()  # as a share of eps

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Attack at eps, move each image's radius, and scale the perturbation to it."""
        assert index is not None
        images = self.progress.images
        delta = self.perturb(model, x, y) - x
        radius = self._radius.read(index, x.flatten(1)[:, 0], images)
        more, less = (radius + self.gamma).clamp(max=1), (radius - self.gamma).clamp(min=0)

        def at(share: Tensor) -> Tensor:
            return self.threat.project(x + per_sample(share, x) * delta, x)

        with attacking(model) as inner, torch.no_grad():
            logits = forward_logits(inner, torch.cat([at(more), at(radius), x]))
        grows, stays, right = (~misclassified(logits, y.repeat(3))).chunk(3)
        if self.progress.done < self.rest or self.progress.epoch == 0:
            radius = right.to(radius.dtype)
        else:
            target = right * torch.where(grows, more, torch.where(stays, radius, less))
            radius = torch.lerp(radius, target, self.beta)
        self._radius.write(index, radius, images)
        return Update(at(radius), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """PGD-AT's, and one forward pass each at the larger radius, the current one and 0."""
        return Cost.of(attack=self.steps, update=1, forward=3)
