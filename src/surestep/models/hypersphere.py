"""Hypersphere embedding: logits that are cosines.

Pang et al. 2020, "Boosting Adversarial Training with Hypersphere Embedding", arXiv 2002.08619.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from surestep.devices import without_autocast
from surestep.errors import UserError


class HypersphereHead(nn.Linear):
    """A linear layer without bias on the unit sphere: ``scale`` times the cosine.

    Features and class weights are normalised, with gradient. The margin of the training loss is
    not here but in the method (``Method.margin``, scale times the margin on the cosine): attacks
    and evaluation see logits without it, at the full scale, where cross entropy does not vanish.

    Args:
        in_features: length of the features.
        num_classes: number of logits.
        scale: s of the paper, 15 in its adversarial training.

    Shape:
        (N, in_features) to (N, num_classes), in float32 also under autocast: a cosine in bf16 has
        steps of 1/256 near 1.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 15.0) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Draw the class weights: their directions are uniform on the sphere."""
        nn.init.normal_(self.weight)

    def extra_repr(self) -> str:
        """Tell the scale, which no weight holds."""
        return f"{super().extra_repr()}, scale={self.scale:g}"

    def forward(self, input: Tensor) -> Tensor:
        """Return ``scale`` times the cosines of features."""
        with without_autocast(input.device):
            dtype = self.weight.dtype
            unit = F.normalize(input.to(dtype), dim=1)
            return self.scale * F.linear(unit, F.normalize(self.weight, dim=1))


def on_hypersphere(model: nn.Module, scale: float = 15.0) -> nn.Module:
    """Replace a model's last linear layer by a hypersphere head; returns the model.

    Raises:
        UserError: it has no linear layer, or several that may make the logits together, or the
            scale is not positive.
    """
    if not scale > 0:
        raise UserError(f"the head's scale is {scale:g}: give a positive number, such as 15")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linear:
        raise UserError("the model has no linear layer that a hypersphere head could replace")
    *others, (place, last) = linear.items()
    # By the numbers: the weights of a lazy layer have no shape yet.
    shape = (last.in_features, last.out_features)
    alike = [name for name, m in others if (m.in_features, m.out_features) == shape]
    if alike and last.in_features != last.out_features:  # square ones are a transformer's inside
        # Heads of distilled transformers, whose logits are averaged.
        raise UserError(
            f"the model has linear layers of one shape, {', '.join([*alike, place])}: which make "
            "the logits is not known here, so no hypersphere head is put in; leave the head linear"
        )
    head = HypersphereHead(last.in_features, last.out_features, scale).to(last.weight)
    if not place:  # the model is this layer
        return head
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, head)
    return model
