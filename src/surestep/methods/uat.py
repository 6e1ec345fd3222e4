"""Unsupervised adversarial training, which also uses images without labels.

Alayrac et al. 2019, "Are Labels Required for Improving Adversarial Robustness?", arXiv 1905.13725.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import kl
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.pgd import PGD
from surestep.methods.trades import ascend_kl


@register("uat")
@dataclass
class UAT(PGD):
    """UAT-OT: cross entropy on a labelled share of the images, KL to the clean output on all.

    Which labels are used depends only on the image's position in the data set, so it is the same
    in every epoch, and the other labels are never read. Images may have no label at all (y = -1).
    """

    summary = "cross entropy on some images; on all, the output must not change under attack"
    paper = "Alayrac et al. 2019, arXiv 1905.13725"
    needs_index = True
    takes_unlabelled = True
    presets = {
        # With the default lam and the full eps from the start, the output stays constant.
        "mnist": recipe(
            MNIST_ZOO, labelled=0.1, steps=40, alpha=0.01, lam=1.0, settings={"eps_warmup": 1.0}
        ),
        "cifar10": recipe(CIFAR_RESNET, labelled=0.1, steps=10, alpha=2 / 255),
    }

    labelled: float = param(0.1, gt=0, le=1)
    lam: float = param(5.0, ge=0)

    def known(self, index: Tensor) -> Tensor:
        """Return which images (N,) count as labelled; the same at every call."""
        # Knuth's multiplicative hash separates neighbours, which may all be of one class.
        return (index * 2654435761) % 2**32 < self.labelled * 2**32

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack agreement with the clean output rather than with the label."""
        index = self.positions.index
        x_adv = ascend_kl(model, x, y, self.start(x), self.threat, self.steps, self.alpha)

        def loss(logits: Tensor) -> LossAndTerms:
            known = (self.known(index) & (y >= 0)).to(logits.dtype)
            losses = self.criterion(logits[len(x) :], y.clamp(min=0), reduction="none")
            ce = (known * losses).mean() / (self.labelled * self.progress.labelled)
            # The clean output is the target: no gradient into it.
            target, output = F.log_softmax(logits, dim=1).chunk(2)
            apart = kl(target.detach(), output).mean()
            return ce + self.lam * apart, {"ce": ce, "kl": apart}

        return Update(torch.cat([x, x_adv]), loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One clean forward and the steps; clean and adversarial images in the update."""
        return Cost.of(attack=self.steps, update=2, forward=1)
