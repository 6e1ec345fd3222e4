"""Wide residual networks, the large models of CIFAR robustness evaluations."""

from __future__ import annotations

from torch import nn

from surestep.errors import UserError
from surestep.models._base import Normalize
from surestep.models.resnet import PreActResNet, for_cifar


class WideResNet(PreActResNet):
    """WRN-depth-width (Zagoruyko & Komodakis 2016, arXiv 1605.07146), without dropout.

    Three stages of pre-activation blocks, 16 * width channels in the first. He init over the
    fan-out and zero head bias, as in the original. The public TRADES code computes the same
    function but also holds one stage of weights that its forward never uses; this class does not.

    Args:
        depth: number of convolutions along the path, 6 n + 4.
        width: multiplier of the 16, 32 and 64 channels of the stages.
        num_classes: number of logits.
        in_channels: channels of the images.
        normalize: applied to the pixels first, or None.

    Shape:
        (N, in_channels, H, W), pixels in [0, 1], to (N, num_classes).

    Raises:
        UserError: ``depth`` is not 10, 16, 22, 28, 34, ...
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        normalize: Normalize | None = None,
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise UserError(f"depth {depth} is not a WRN depth: give 6 n + 4, such as 16, 28 or 34")
        super().__init__(
            (blocks, blocks, blocks),
            (16 * width, 32 * width, 64 * width),
            num_classes,
            in_channels,
            normalize,
            stem_width=16,
            name=f"wrn-{depth}-{width}",
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


@for_cifar("wrn-28-10")
def wrn_28_10(
    num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
) -> WideResNet:
    """Build WRN-28-10. ``image_size`` is ignored.

    The SAT paper trains a WRN-28-10 without normalisation; to do so, ``create`` it with
    normalize=False. The authors' network differs in its blocks and initialisation: see the card of
    sat-r2.
    """
    return WideResNet(28, 10, num_classes, in_channels, normalize)
