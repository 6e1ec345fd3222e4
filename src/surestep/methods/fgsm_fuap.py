"""FGSM-FUAP: FGSM-UAP with many universal perturbations, picked by features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import features_of
from surestep.attacks.lending import attacking, interpreted, uncompiled
from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost
from surestep.methods._hyperparameters import param
from surestep.methods._losses import one_hot
from surestep.methods._registry import register
from surestep.methods.fgsm_uap import FGSMUAP, Choice


@register("fgsm-fuap")
@dataclass
class FGSMFUAP(FGSMUAP):
    """F-UAP: ``count`` perturbations; a linear layer picks one from the features of the image.

    The features are the input of the last linear layer to run (without any, the logits), at a
    random point of the ball.
    No gradient flows through the argmax of the pick, so the layer learns by policy gradient: it
    favours picks with a higher loss than the batch's mean.
    """

    summary = "FGSM from one of many universal perturbations, picked by the image's features"

    kept = ("_u", "_m", "_layer")

    count: int = param(50, ge=1)
    pick_lr: float = param(0.1, ge=0)

    def set_up(self) -> None:
        """Begin without a layer."""
        super().set_up()
        self._layer = torch.zeros(0)

    def choose(self, model: nn.Module, x: Tensor, y: Tensor) -> Choice:
        """Pick with the layer, which learns from the losses of the picks."""
        # Compiled code ignores hooks that are added later.
        with attacking(model) as lent, interpreted(lent), torch.no_grad():
            features = features_of(uncompiled(lent), self.threat.random_start(x))
            features = F.normalize(features.to(x.dtype), dim=1)
            if self._layer.shape != (self.count, features.shape[1]):
                # From a fixed seed, so that it is the same in every process.
                own, shape = torch.Generator().manual_seed(0), (self.count, features.shape[1])
                self._layer = torch.randn(shape, generator=own, device="cpu")
            scores = features @ self._layer.to(features).T
        group = scores.argmax(1)

        @torch.no_grad()
        def learn(logits: Tensor) -> None:
            gain = cross_entropy(logits, y).to(x.dtype)
            gain = gain - processes.mean(gain.mean())
            # The gradient of log p(pick) by the scores is one_hot(pick) - softmax(scores).
            pull = gain[:, None] * (one_hot(group, self.count).to(x.dtype) - scores.softmax(1))
            step = processes.mean(pull.T @ features / len(x))
            self._layer = self._layer.to(features) + self.pick_lr * step

        return Choice(group, self.count, learn)

    def cost(self, batch_size: int) -> Cost:
        """One more forward pass, for the features."""
        return Cost.of(attack=1, update=2, forward=1)
