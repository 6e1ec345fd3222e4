"""ConvergeSmooth: penalises jumps of the clean loss between epochs or batches.

Zhao et al. 2023, "Fast Adversarial Training with Smooth Convergence", ICCV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.lending import unwrapped
from surestep.devices import finest
from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import once
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe, smoothed
from surestep.methods._registry import build_written, register


@register("converge-smooth")
@dataclass
class ConvergeSmooth(Method):
    """E-CS (``compare="epoch"``) or B-CS (``"batch"``) around any method.

    ``perturbation`` names the wrapped method, optionally with settings: ``"fgsm-mep alpha=0.15"``.
    If a batch's clean loss differs by more than T from the mean over the previous epoch (B-CS: from
    the previous batch's), it is added to the loss if higher, subtracted if lower. T is the last
    rise of that mean, clipped to [gamma * r, gamma]; r is the learning rate over its peak so far
    in this epoch. E-CS is off in the first two epochs, B-CS on its first batch. When the learning
    rate falls below half that peak (at an epoch's first step: the previous epoch's), both are off
    until the end of the next epoch, which would be compared with this one.
    ``pull`` weights the squared distance to the mean of the weights at the ends of earlier epochs
    (weight centralization).
    """

    kept = ("_sums", "_epoch", "_lr", "_steady", "_calm", "_centre", "base")
    needs_progress = True
    summary = "any method; jumps of its clean loss between epochs or batches are penalised"
    paper = "Zhao et al. 2023, arXiv 2308.12857"
    presets = {
        "mnist": recipe(MNIST_ZOO, perturbation="rs-fgsm"),
        "cifar10": recipe(CIFAR_ZOO, perturbation="rs-fgsm"),
        "cifar10-mep": recipe(CIFAR_ZOO, perturbation="fgsm-mep", settings=smoothed(10)),
    }

    perturbation: str = "rs-fgsm"
    compare: str = "epoch"
    gamma: float = param(0.03, ge=0)
    weight: float = param(1.0, ge=0)
    pull: float = param(0.0, ge=0)

    def set_up(self) -> None:
        """Build the wrapped method, and begin without a history."""
        self.require(self.compare in ("epoch", "batch"), "compare", "'epoch' or 'batch'")
        self.base = build_written(self.perturbation, self.threat)
        self.needs_index, self.replays = self.base.needs_index, self.base.replays
        self.second_order, self.takes_sources = self.base.second_order, self.base.takes_sources
        self.remembers_images = self.base.remembers_images
        self.dropout = max(self.dropout, self.base.dropout)
        # Clean loss: sum and count in this epoch, then the last two means (B-CS: batches).
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._epoch, self._lr = 0, 0.0
        # No drop of the learning rate in this epoch / the last; for E-CS the start counts as one.
        self._steady = self._calm = self.compare == "batch"
        self._centre: list[Tensor] = []

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Append the clean images to the wrapped method's update."""
        for part in ("progress", "_positions", "sources", "label_smoothing", "margin"):
            setattr(self.base, part, getattr(self, part))
        inner = self.base.craft(model, x, y)
        self._turn(model)
        n = len(inner.points)
        sign = once(self._sign)
        # After a checkpoint is loaded the centre is on the CPU.
        weights = list(unwrapped(model).parameters()) if self._centre else []
        self._centre = [c.to(w) for c, w in zip(self._centre, weights, strict=True)]

        def loss(logits: Tensor) -> LossAndTerms:
            own, terms = inner.loss(logits[:n])
            clean = self.criterion(logits[n:], y)
            jump = sign(clean.detach()).to(clean.dtype) * clean
            total = own + self.weight * jump
            if self.pull:
                pairs = zip(weights, self._centre, strict=True)
                apart = [(w - c).square().sum() for w, c in pairs]
                total = total + self.pull * sum(apart, torch.zeros_like(own))
            return total, {**terms, "clean": clean, "jump": jump}

        return Update(torch.cat([inner.points, x]), loss, slice(*inner.rows.indices(n)))

    def _sign(self, clean: Tensor) -> Tensor:
        """Return 1 if the loss jumped up, -1 if down, 0 if within T; then record the loss."""
        clean = processes.mean(clean).to(finest(clean.device))
        total, count, mean, before = self._sums.to(clean)
        rise = mean - before
        limit = rise.clamp(min=self.gamma * self._ratio(), max=self.gamma)
        off = clean - mean
        known = (mean > 0) & (self._steady and self._calm)
        if self.compare == "batch":
            mean, before = clean, mean
        self._sums = torch.stack([total + clean, count + 1, mean, before])
        return torch.where(known & (off.abs() > limit), off.sign(), 0)

    def _ratio(self) -> float:
        return min(1.0, self.progress.lr / self._lr) if self._lr else 1.0

    def _turn(self, model: nn.Module) -> None:
        """Watch the learning rate; at an epoch's first step update the mean loss and weights."""
        lr = self.progress.lr
        if self.progress.epoch == self._epoch:
            self._lr = max(self._lr, lr)
            self._steady = self._steady and lr >= self._lr / 2
            return
        self._epoch, self._calm = self.progress.epoch, self._steady
        self._steady, self._lr = lr >= self._lr / 2, lr
        total, count, mean, _ = self._sums
        if self.compare == "epoch":
            zero = torch.zeros_like(total)
            self._sums = torch.stack([zero, zero, total / count.clamp(min=1), mean])
        if self.pull:
            now = [w.detach() for w in unwrapped(model).parameters()]
            pairs = zip(self._centre or now, now, strict=True)
            self._centre = [torch.lerp(c.to(w), w, 1 / self._epoch) for c, w in pairs]

    @property
    def cycle(self) -> int:
        """The wrapped method's cycle."""
        return self.base.cycle

    def peak_images(self, batch_size: int) -> int:
        """Count the wrapped method's images and the clean ones."""
        return self.base.peak_images(batch_size) + batch_size

    def set_strength(self, share: float) -> None:
        """Scale the wrapped method too."""
        super().set_strength(share)
        self.base.set_strength(share)

    def cost(self, batch_size: int) -> Cost:
        """The wrapped method's cost, and one more image (the clean one) in the update."""
        own = self.base.cost(batch_size)
        return Cost(own.forward + 1, own.input_grad + 1, own.weight_grad + 1)
