"""SAT, FGSM and PGD steps written the way the field's public training scripts write them.

The mathematics is that of surestep's methods. The differences are common habits: the attack calls a
full ``backward()``, which also computes weight gradients, and clears them; float32; images and
weights in the default memory format; torch's own first convolution; an optimizer that is not
fused; ``.item()`` on the loss and the accuracy at each step. (Allocator settings apply to the whole
process, so the peer steps use surestep's.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.models._stem import GreyConv2d

Step = Callable[[Tensor, Tensor], None]
Perturb = Callable[[Tensor, Tensor], Tensor]


def plain(model: nn.Module) -> nn.Module:
    """Replace surestep's first convolution by torch's own, in place, and return the network."""
    for module in model.modules():
        if isinstance(module, GreyConv2d):
            # It only overrides the forward pass of its base class.
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


def _sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    model.zero_grad()
    loss.backward()
    assert x.grad is not None
    return x.grad.sign()


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, logits: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for logged in (loss, (logits[: len(y)].argmax(1) == y).sum()):
        logged.item()


def _train_on(model: nn.Module, optimizer: torch.optim.Optimizer, perturb: Perturb) -> Step:
    """Build the step that trains on the points that an attack returns."""

    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        x_adv = perturb(x, y)
        model.train()
        logits = model(x_adv)
        _update(model, optimizer, F.cross_entropy(logits, y), logits, y)

    return step


def fgsm(model: nn.Module, optimizer: torch.optim.Optimizer, eps: float) -> Step:
    def perturb(x: Tensor, y: Tensor) -> Tensor:
        return torch.clamp(x + eps * _sign(model, x, y), 0, 1)

    return _train_on(model, optimizer, perturb)


def pgd(
    model: nn.Module, optimizer: torch.optim.Optimizer, eps: float, steps: int, size: float
) -> Step:
    def perturb(x: Tensor, y: Tensor) -> Tensor:
        x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), 0, 1)
        for _ in range(steps):
            x_adv = x_adv + size * _sign(model, x_adv, y)
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
        return x_adv

    return _train_on(model, optimizer, perturb)


def sat_r1(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    eps: float,
    images: int,
    steps: int = 10,
    lam: float = 0.2,
) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        x_fgsm = torch.clamp(x + eps * _sign(model, x, y), 0, 1)
        x_n, y_n = x[-images:], y[-images:]
        x_adv = x_n.clone()
        for _ in range(steps):
            x_adv = torch.clamp(x_adv + eps / steps * _sign(model, x_adv, y_n), 0, 1)
        model.train()
        logits = model(torch.cat([x_fgsm, x_adv]))
        distance = (logits[len(x) - images : len(x)] - logits[len(x) :]).pow(2).sum(1).mean()
        loss = F.cross_entropy(logits[: len(x)], y) + lam * distance
        _update(model, optimizer, loss, logits, y)

    return step


def sat_r2(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    eps: float,
    lam: float = 5.0,
    alpha: float = 0.01,
) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        both = torch.cat([x, x + alpha * torch.randn_like(x).sign()])
        x_adv = torch.clamp(both + eps * _sign(model, both, torch.cat([y, y])), 0, 1)
        model.train()
        logits = model(x_adv)
        at_fgsm, at_rfgsm = logits[: len(x)], logits[len(x) :]
        loss = F.cross_entropy(at_fgsm, y) + lam * (at_fgsm - at_rfgsm).pow(2).sum(1).mean()
        _update(model, optimizer, loss, logits, y)

    return step


def sat_r3(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    eps: float,
    lam: float = 1.0,
    tau: float = 0.4,
    alpha: float = 0.01,
    eps_low: float = 0.1,
) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        start = torch.clamp(x + alpha * torch.randn_like(x).sign(), 0, 1)
        sign = _sign(model, start, y)
        low, high = start + eps_low * sign, start + eps * sign
        model.train()
        logits = model(torch.clamp(torch.cat([high, low]), 0, 1))
        at_high = F.cross_entropy(logits[: len(x)], y)
        at_low = F.cross_entropy(logits[len(x) :], y)
        loss = at_high + lam * F.relu(at_low - tau * at_high)
        _update(model, optimizer, loss, logits, y)

    return step


def torchattacks_fgsm(model: nn.Module, optimizer: torch.optim.Optimizer, eps: float) -> Step:
    """Build an FGSM training step with torchattacks' class."""
    from torchattacks import FGSM

    return _train_on(model, optimizer, FGSM(model, eps=eps))


def torchattacks_pgd(
    model: nn.Module, optimizer: torch.optim.Optimizer, eps: float, steps: int, size: float
) -> Step:
    """Build a PGD training step with torchattacks' class."""
    from torchattacks import PGD

    return _train_on(model, optimizer, PGD(model, eps=eps, alpha=size, steps=steps))


def art_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    eps: float,
    shape: tuple[int, ...],
    steps: int = 0,
    size: float = 0.0,
) -> Step:
    """Build an FGSM step (PGD if ``steps`` > 0) with ART's classes, as in its trainers' loops."""
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        shape,
        10,
        optimizer=optimizer,
        clip_values=(0.0, 1.0),
        device_type="gpu" if next(model.parameters()).is_cuda else "cpu",
    )
    attack = (
        ProjectedGradientDescentPyTorch(
            classifier,
            eps=eps,
            eps_step=size,
            max_iter=steps,
            num_random_init=1,
            # By default ART attacks 32 images at a time.
            batch_size=4096,
            verbose=False,
        )
        if steps
        else FastGradientMethod(classifier, eps=eps, batch_size=4096)
    )

    def step(x: Tensor, y: Tensor) -> None:
        labels = F.one_hot(y, 10).cpu().numpy()
        x_adv = attack.generate(x.cpu().numpy(), labels)
        classifier.fit(x_adv, labels, batch_size=len(x), nb_epochs=1)

    return step
