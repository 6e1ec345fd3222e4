"""FGSM-UAP: the step starts at a universal perturbation: one for all, one per class, or of many.

Pan, Li & Yao 2024, "Adversarial Initialization with Universal Adversarial Perturbation: A New
Approach to Fast Adversarial Training", AAAI; C-UAP and F-UAP as in the FastAT benchmark, arXiv
2604.22853.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.gradients import attack_gradient, l1_unit
from surestep.devices import without_autocast
from surestep.methods._base import Cost, Method, Update
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._losses import one_hot
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.fgsm_mep import paired
from surestep.threat import per_sample


class Choice(NamedTuple):
    """Which of ``groups`` perturbations each image starts at, as ``group`` (N,).

    ``learn`` takes the logits (N, K) at these starts, if the choice depends on anything learnt.
    """

    group: Tensor
    groups: int
    learn: Callable[[Tensor], None] | None = None


def mean_by_group(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return each group's mean over all processes (G, ...), and which groups have any images.

    Args:
        values: of the images (N, ...).
        group: of each image (N,).
        groups: their number G.
    """
    member = one_hot(group, groups).to(values.dtype)
    with without_autocast(values.device):  # l1-normalised gradients underflow in fp16
        total = processes.mean(torch.einsum("ng,n...->g...", member, values))
    count = per_sample(processes.mean(member.sum(0)), values)
    return total / torch.where(count > 0, count, 1), count > 0


@register("fgsm-uap")
@dataclass
class FGSMUAP(Method):
    """FGSM-UAP: all images start at one perturbation, which follows the gradients' momentum.

    ``alpha``, 10/255 at eps 8/255, is the length of the universal perturbation and of its step.
    """

    summary = "FGSM from one universal perturbation that follows the gradients' momentum"
    kept: ClassVar[tuple[str, ...]] = ("_u", "_m")
    paper = "Pan, Li & Yao 2024 (AAAI); as in the FastAT benchmark, arXiv 2604.22853"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=10.0),
        "cifar10": recipe(CIFAR_RESNET, lam=10.0, settings={"label_smoothing": 0.4}),
    }

    lam: float = param(10.0, ge=0)
    decay: float = param(0.3, ge=0)
    alpha: float = of_eps(1.25)

    def set_up(self) -> None:
        """Begin at zero perturbations."""
        self._u = self._m = torch.zeros(0)

    def choose(self, model: nn.Module, x: Tensor, y: Tensor) -> Choice:
        """Choose the perturbation that each image starts at."""
        return Choice(torch.zeros_like(y), 1)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Step from the images' universal perturbations, then move those along their momenta."""
        threat, (group, groups, learn) = self.threat, self.choose(model, x, y)
        u, m = (self._of(v, groups, x) for v in (self._u, self._m))
        start = threat.project(x + u[group], x)
        grad, logits = attack_gradient(model, start, y)
        if learn is not None:
            learn(logits)
        x_adv = threat.ascend(start, grad, threat.eps, x)
        mean, present = mean_by_group(l1_unit(grad), group, groups)
        m = torch.where(present, mean + self.decay * m, m)  # without images, a group stays put
        moved = threat.shrink(u + threat.steepest_step(m, self.alpha), self.alpha)
        self._u, self._m = torch.where(present, moved, u), m
        return paired(start, x_adv, y, self.criterion, self.lam)

    def _of(self, kept: Tensor, groups: int, x: Tensor) -> Tensor:
        """Return the state if it fits this number of groups and image shape, else zeros."""
        if kept.shape != (groups, *x.shape[1:]):
            return torch.zeros(groups, *x.shape[1:], dtype=x.dtype, device=x.device)
        return kept.to(x)

    def cost(self, batch_size: int) -> Cost:
        """One gradient; the start and x_adv in the update."""
        return Cost.of(attack=1, update=2)
