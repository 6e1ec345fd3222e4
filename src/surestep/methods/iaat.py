"""IAAT: every image has a radius of its own (Balaji et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.outcomes import misclassified
from surestep.methods._base import Cost, Update
from surestep.methods._hyperparameters import param
from surestep.methods._memory import Memory
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
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

    gamma: float = param(1.9 / 8, gt=0, le=1)
    beta: float = param(0.1, gt=0, le=1)
    rest: float = param(0.1, ge=0, le=1)

    def set_up(self) -> None:
        """Begin without radii."""
        self._radius = Memory(pixels=False)  # as a share of eps

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack at eps, move each image's radius, and scale the perturbation to it."""
        delta = self.perturb(model, x, y) - x
        radius = self._radius.read(self.positions, x.new_empty(len(x)))
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
        self._radius.write(self.positions, radius)
        return Update(at(radius), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """PGD-AT's, and one forward pass each at the larger radius, the current one and 0."""
        return Cost.of(attack=self.steps, update=1, forward=3)
