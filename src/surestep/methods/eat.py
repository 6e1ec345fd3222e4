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
from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
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

    clean: float = param(0.5, ge=0, lt=1)
    perturbation: str = "fgsm"

    def set_up(self) -> None:
        """Turn the perturbation to the model's own prediction."""
        super().set_up()
        # A gradient at the image itself comes with the prediction there.
        self.at_image = unchanged(type(self.base), "start", "gradient")
        if self.at_image:
            self.base.objective = partial(at_prediction, self.base.objective)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack the model whose turn it is."""
        turn = self.progress.step % (1 + len(self.sources))
        attacked = self.sources[turn - 1].to(x.device) if turn else model
        # Fixed models are attacked in eval mode, even by a perturbation that uses train mode.
        train_mode = not turn and self.base.train_mode
        # The engine chose the memory format for the model; another may not take it.
        images = x.contiguous() if turn else x
        labels = y
        with attacking(attacked, train_mode=train_mode) as inner:
            if not self.at_image:
                with torch.no_grad():
                    labels = forward_logits(inner, images).argmax(1)
            start = self.base.start(images)
            grad = self.base.gradient(inner, start, labels)
        x_adv = torch.empty_like(x).copy_(self.base.step(start, grad, images))

        def loss(logits: Tensor) -> LossAndTerms:
            at_clean, at_adv = (self.criterion(part, y) for part in logits.chunk(2))
            ce = (1 - self.clean) * at_adv + self.clean * at_clean
            return ce, {"ce": at_adv, "ce_clean": at_clean}

        return Update(torch.cat([x, x_adv]), loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One perturbation, and a prediction; clean and perturbed images in the update."""
        return Cost.of(attack=self.base.gradients, update=2, forward=0 if self.at_image else 1)
