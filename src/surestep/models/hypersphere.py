"""Hypersphere embedding: logits that are cosines.

Pang et al. 2020, "Boosting Adversarial Training with Hypersphere Embedding", arXiv 2002.08619.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of, hooked, interpreted
from surestep.devices import without_autocast
from surestep.errors import UserError


class HypersphereHead(nn.Linear):
    """A linear layer on the unit sphere, without bias: logits are ``scale`` times cosines.

    Features and class weights are normalised to unit length, and gradients flow through this.
    The margin of the training loss is applied by the method, not here (``Method.margin``, scale
    times the margin on the cosine). Attacks and evaluation see logits without it, at the full
    scale, where cross entropy does not vanish.

    Args:
        in_features: length of the features.
        num_classes: number of logits.
        scale: s of the paper, 15 in its adversarial training.

    Shape:
        (N, in_features) to (N, num_classes), in the dtype of the weights even under autocast:
        near 1, cosines in bf16 come in steps of 1/256.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 15.0) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Draw class weights whose directions are uniform on the sphere."""
        nn.init.normal_(self.weight)

    def extra_repr(self) -> str:
        """Show the scale, which is not stored in the weights."""
        return f"{super().extra_repr()}, scale={self.scale:g}"

    def forward(self, input: Tensor) -> Tensor:
        """Return ``scale`` times the cosines between features and class weights."""
        with without_autocast(input.device):
            dtype = self.weight.dtype
            unit = F.normalize(input.to(dtype), dim=1)
            return self.scale * F.linear(unit, F.normalize(self.weight, dim=1))


def on_hypersphere(model: nn.Module, x: Tensor, *, scale: float = 15.0) -> nn.Module:
    """Replace a model's last linear layer by a hypersphere head, and return the model.

    Args:
        model: a model whose logits a linear layer makes.
        x: an image (1, ...), with which the model is run to see which layer runs last.
        scale: of the head.

    Raises:
        UserError: the model has no linear layer, or several that may make the logits together, or
            none that makes the logits alone, or the scale is not positive.
    """
    if not scale > 0:
        raise UserError(f"the head's scale is {scale:g}: give a positive number, such as 15")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linear:
        raise UserError("the model has no linear layer that a hypersphere head could replace")
    place = _last_to_run(model, linear, x)
    last = linear.pop(place)
    # From attributes, since the weights of a lazy layer have no shape yet.
    shape = (last.in_features, last.out_features)
    alike = [name for name, m in linear.items() if (m.in_features, m.out_features) == shape]
    if alike and last.in_features != last.out_features:  # square ones are inside transformers
        # Such as the heads of distilled transformers, whose logits are averaged.
        raise UserError(
            f"the model has several linear layers of one shape, {', '.join([*alike, place])}, and "
            "which of them make the logits is unknown: keep the linear head"
        )
    head = HypersphereHead(last.in_features, last.out_features, scale).to(last.weight)
    if not place:  # the model is this layer
        return head
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, head)
    return model


def _last_to_run(model: nn.Module, linear: dict[str, nn.Linear], x: Tensor) -> str:
    """Run a model and return the name of the linear layer that makes its logits.

    Raises:
        UserError: no linear layer runs, or the last one has another number of outputs.
    """
    ran: list[nn.Module] = []
    hooks = (m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in linear.values())
    with hooked(hooks), interpreted(model):
        logits = count_classes(model, x.to(device_of(model)))
    if not ran:
        raise UserError("no linear layer of the model runs as a module: keep the linear head")
    place = next(name for name, m in linear.items() if m is ran[-1])
    if linear[place].out_features != logits:
        raise UserError(
            f"the linear layer that runs last, {place}, has {linear[place].out_features} outputs, "
            f"but the model {logits} logits, so something else makes these: keep the linear head"
        )
    return place
