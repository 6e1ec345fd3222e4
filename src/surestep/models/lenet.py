"""Small networks for MNIST-sized images."""

from __future__ import annotations

from torch import nn

from surestep.errors import UserError
from surestep.models._base import Classifier, Normalize
from surestep.models._registry import register
from surestep.models._stem import GreyConv2d


@register("lenet+", in_channels=1, image_size=28)
class LeNetPlus(Classifier):
    """LeNet+, the MNIST network of SAT-R1, R2 and R3 (Vivek & Babu 2020, arXiv 2002.00614).

    Also the MNIST network of Madry et al. 2017 (arXiv 1706.06083). PyTorch's default init.

    Shape:
        (N, in_channels, image_size, image_size), pixels in [0, 1], to (N, num_classes).

    Raises:
        UserError: ``image_size`` is not a multiple of 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        normalize: Normalize | None = None,
    ) -> None:
        side = _quarter("lenet+", image_size)
        # Published as relu, then max-pool. The two commute, with the same gradients, and in this
        # order relu touches a quarter of the elements.
        body = nn.Sequential(
            GreyConv2d(in_channels, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side * side, 1024),
            nn.ReLU(),
        )
        super().__init__(
            "lenet+",
            body,
            nn.Linear(1024, num_classes),
            in_channels=in_channels,
            image_size=image_size,
            normalize=normalize,
        )


@register("cnn-small", in_channels=1, image_size=28)
class CNNSmall(Classifier):
    """The MNIST network of "Fast is better than free" (Wong et al. 2020, arXiv 2001.03994).

    PyTorch's default init, as in the original.

    Shape:
        (N, in_channels, image_size, image_size), pixels in [0, 1], to (N, num_classes).

    Raises:
        UserError: ``image_size`` is not a multiple of 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        normalize: Normalize | None = None,
    ) -> None:
        side = _quarter("cnn-small", image_size)
        body = nn.Sequential(
            nn.Conv2d(in_channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, 100),
            nn.ReLU(),
        )
        super().__init__(
            "cnn-small",
            body,
            nn.Linear(100, num_classes),
            in_channels=in_channels,
            image_size=image_size,
            normalize=normalize,
        )


def _quarter(name: str, image_size: int) -> int:
    if image_size % 4:
        raise UserError(
            f"{name} halves images twice, but image_size {image_size} is not a multiple of 4"
        )
    return image_size // 4
