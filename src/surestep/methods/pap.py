"""PAP: SAT-R1's regularizer, with the multi-step attack pipelined across training steps.

Vivek, Revanur, Venkat & Babu 2020, "Plug-And-Pipeline: Efficient Regularization for Single-Step
Adversarial Training", CVPR Workshops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.gradients import attack_gradient
from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import squared_distance
from surestep.methods._presets import CIFAR_SAT, MNIST_FAST, MNIST_SAT, recipe
from surestep.methods._registry import register
from surestep.methods.sat import regularised_images

FIELDS = ("x", "y", "points")


@register("pap")
@dataclass
class PAP(Method):
    """PAP: a pipeline of ``steps`` groups of images, each one I-FGSM step ahead of the next.

    One gradient pass over the batch and the pipeline together advances every group by one step. The
    group that completes its steps leaves and is regularised: its logits must agree with those at
    its FGSM point. The last images of the batch enter. No step waits for another, so the attack
    costs images, not latency; its gradients come from the models of the last ``steps`` steps.
    At first the first batch's images fill the pipeline; the weight is 0 until a group is complete.
    """

    summary = "FGSM and a multi-step attack, pipelined across training steps, must agree"
    paper = "Vivek et al. 2020, CVPR Workshops"
    presets = {
        "mnist": recipe(MNIST_SAT, lam=0.2, steps=10, source="ours: settings of SAT-R1"),
        "mnist-fast": recipe(MNIST_FAST, lam=0.2, steps=10, fraction=1 / 32),
        "cifar10": recipe(CIFAR_SAT, lam=0.2, steps=3, source="ours: settings of SAT-R1"),
    }

    lam: float = param(0.2, ge=0)
    steps: int = param(10, ge=2)
    fraction: float | None = param(None, gt=0, le=1)

    def set_up(self) -> None:
        """Begin with an empty pipeline."""
        # Images, labels and points of all groups, in the order in which they leave.
        self._held: dict[str, Tensor] = {}
        self._age = 0

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Advance the pipeline, and compare the group that leaves it with its FGSM points."""
        held = self._fill(x, y)
        n = len(held["y"]) // self.steps
        threat, size = self.threat, self.threat.eps / self.steps
        leaving, leaving_y = held["x"][:n], held["y"][:n]
        # Beside their last I-FGSM step, the leaving images need an FGSM point of this model.
        starts = torch.cat([x, leaving, held["points"]])
        grad, _ = attack_gradient(model, starts, torch.cat([y, leaving_y, held["y"]]))
        clean = torch.cat([x, leaving])
        fgsm = threat.ascend(clean, grad[: len(clean)], threat.eps, clean)
        points = threat.ascend(held["points"], grad[len(clean) :], size, held["x"])
        done, weight = points[:n], self.lam if self._age >= self.steps - 1 else 0.0
        entering = torch.arange(-n, 0, device=x.device) % len(x)
        self._held = {
            "x": torch.cat([held["x"][n:], x[entering]]),
            "y": torch.cat([held["y"][n:], y[entering]]),
            "points": torch.cat([points[n:], x[entering]]),
        }
        self._age = min(self._age + 1, self.steps)

        def loss(logits: Tensor) -> LossAndTerms:
            at_x, at_fgsm, at_ifgsm = logits.split([len(x), n, n])
            ce, distance = self.criterion(at_x, y), squared_distance(at_fgsm, at_ifgsm)
            return ce + weight * distance, {"ce": ce, "distance": distance}

        return Update(torch.cat([fgsm, done]), loss, slice(len(x)))

    def _fill(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the pipeline; if none fits, fill one with the last images of this batch."""
        held = self._held
        if held and held["x"].shape[1:] == x.shape[1:]:
            return {k: v.to(y if k == "y" else x) for k, v in held.items()}
        self._age = 0
        n = regularised_images(len(x), self.fraction)
        rows = torch.arange(-n, 0, device=x.device).repeat(self.steps) % len(x)
        return {"x": x[rows], "y": y[rows], "points": x[rows]}

    def cost(self, batch_size: int) -> Cost:
        """FGSM on the batch and the leaving group, a step of each group; two views to update."""
        share = regularised_images(batch_size, self.fraction) / batch_size
        return Cost.of(attack=1 + (self.steps + 1) * share, update=1 + 2 * share)

    def peak_images(self, batch_size: int) -> int:
        """Count the images of the attack, which are more than the update's."""
        return batch_size + (self.steps + 1) * regularised_images(batch_size, self.fraction)

    def state_dict(self) -> dict[str, Any]:
        """Return the pipelines of all processes, and the number of steps they have taken."""
        held = {k: processes.gather(v) for k, v in self._held.items()}
        return {"age": self._age, "processes": processes.world_size(), **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this process's pipeline; if the number of processes changed, start empty."""
        if state.get("processes", processes.world_size()) != processes.world_size():
            return  # the next batch fills it
        self._age = state.get("age", self._age)
        self._held |= {k: processes.local_rows(state[k]).clone() for k in FIELDS if k in state}
