"""Ensemble adversarial training: some perturbations are made on other, fixed models.

Tramèr et al. 2018, "Ensemble Adversarial Training: Attacks and Defenses", ICLR, arXiv 1705.07204.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.losses import Objective
from surestep.methods._base import Cost, Terms, Update, register
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._single_step import OnSingleStep, unchanged


def at_prediction(objective: Objective, logits: Tensor, y: Tensor) -> Tensor:
    """Return an attack's objective (N,) at the labels that the model predicts in place of y."""
    return objective(logits, logits.detach().argmax(1))


@register("eat")
@dataclass
class EAT(OnSingleStep):
    """EAT: the step is taken on the model itself and on each of ``sources`` in turn.

    It attacks the label that the attacked model predicts, not the true label, which the
    perturbation would leak.
    Set ``sources`` to trained models before training (``surestep train`` loads the run folders
    that ``--sources`` names). With none, the model itself is attacked at every step.
    """

    takes_sources = True
    needs_progress = True
    summary = "single steps on the model itself and fixed models in turn, and clean images"
    paper = "Tramèr et al. 2018, arXiv 1705.07204"
    presets = {
        "mnist": recipe(MNIST_ZOO),
        "cifar10": recipe(CIFAR_RESNET, source="ours: the field's usual settings"),
    }

    clean: float = 0.5
    perturbation: str = "fgsm"

    def validate(self) -> None:
        """Check the share of the clean loss."""
        super().validate()
        self.require(0 <= self.clean < 1, "clean", "in [0, 1)")
        # A gradient at the image itself comes with the prediction there.
        self.at_image = unchanged(type(self.base), "start", "gradient")
        if self.at_image:
            self.base.objective = partial(at_prediction, self.base.objective)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Attack the model whose turn it is."""
        turn = self.progress.step % (1 + len(self.sources))
        attacked = self.sources[turn - 1].to(x.device) if turn else model
        # Fixed models are attacked in eval mode, even by a perturbation that uses train mode.
        train_mode = not turn and self.base.train_mode
        # The engine chose the memory format for the model; another may not take it.
        images = x.contiguous() if turn else x
        labels = y
        if not self.at_image:
            with attacking(attacked, train_mode=train_mode) as inner, torch.no_grad():
                labels = forward_logits(inner, images).argmax(1)
        x_adv = self.base.step_on(attacked, images, labels, train_mode)
        x_adv = torch.empty_like(x).copy_(x_adv)

        def loss(logits: Tensor) -> Terms:
            at_clean, at_adv = (self.criterion(part, y) for part in logits.chunk(2))
            return torch.lerp(at_adv, at_clean, self.clean), {"ce": at_adv, "ce_clean": at_clean}

        return Update(torch.cat([x, x_adv]), loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One perturbation, and a prediction; clean and perturbed images in the update."""
        return Cost.of(attack=self.gradients, update=2, forward=0 if self.at_image else 1)
