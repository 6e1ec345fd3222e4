"""Gradients by the images alone: no weight gradient is ever computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking, compiled, uses_batch_statistics
from surestep.attacks.losses import (
    Objective,
    cross_entropy,
    dlr,
    log_odds,
    margin,
)
from surestep.devices import in_fp16
from surestep.errors import UserError
from surestep.threat import per_sample

_INDEPENDENT = (log_odds, cross_entropy, margin, dlr)
"""Objectives whose value for an image does not depend on the other images."""


class NoGradient(UserError):
    """The logits do not depend on the images through autograd."""


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective = log_odds
) -> tuple[Tensor, Tensor]:
    """Differentiate the objective with respect to the images, and nothing else.

    Args:
        model: in the mode the caller wants; see ``attacking``.
        x: images (N, ...).
        y: labels (N,).
        objective: per-sample, to be maximised.

    Returns:
        The gradient (as x) and the logits (N, K), both detached.

    Raises:
        NoGradient: the logits do not depend on x through autograd.
    """
    chunk = getattr(model, "attacked_at_once", None)
    if chunk and len(x) > chunk and objective in _INDEPENDENT:
        # Within a limit on memory: as one pass, each chunk would be computed again in backward.
        pairs = zip(x.split(chunk), y.split(chunk), strict=True)
        parts = [input_gradient(model, *pair, objective) for pair in pairs]
        return torch.cat([grad for grad, _ in parts]), torch.cat([logits for _, logits in parts])
    with torch.inference_mode(False), torch.enable_grad():
        # y is cloned too: a tensor made in inference mode cannot be saved for backward.
        x, y = x.detach().clone().requires_grad_(), y.clone()
        logits = forward_logits(model, x)
        values = objective(logits, y)
        grad = None
        if values.requires_grad:
            if in_fp16(x.device):
                grad = _gradient_by_fp16(model, x, logits, values)
            else:
                (grad,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
                # As with logits, the next pass writes over what CUDA graphs return.
                grad = grad.clone() if grad is not None and compiled(model) else grad
        if grad is None:
            raise NoGradient(
                "the model's output has no gradient with respect to its input (a detach() or "
                "no_grad() in its forward?): gradient attacks and adversarial training need one"
            )
    return grad, logits.detach()


def attack_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective = log_odds,
    *,
    train_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``input_gradient`` of a model that is lent for this one pass; see ``attacking``.

    For several passes, lend the model once.
    """
    with attacking(model, train_mode=train_mode) as inner:
        return input_gradient(inner, x, y, objective)


def _gradient_by_fp16(model: nn.Module, x: Tensor, logits: Tensor, values: Tensor) -> Tensor | None:
    """Return the gradient, backpropagated from logit gradients that are scaled into fp16's range.

    Otherwise cross entropy and divergences have gradient 0 in fp16 on images that the model is sure
    of, which would not be attacked. In train mode images depend on each other and share one factor.
    """
    (pull,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    size = pull.abs().amax(1, keepdim=True)
    together = model.training or uses_batch_statistics(model)
    size = size.amax(0, keepdim=True).expand_as(size) if together else size
    size = torch.where(size > 0, size, 1)
    (grad,) = torch.autograd.grad(logits, x, pull / size, allow_unused=True)
    return None if grad is None else grad * per_sample(size.squeeze(1), grad)


def l1_unit(grad: Tensor) -> Tensor:
    """Return each sample's gradient over the sum of its absolute values; zero stays zero."""
    size = per_sample(grad.abs().flatten(1).sum(1), grad)
    return grad / torch.where(size > 0, size, 1)
