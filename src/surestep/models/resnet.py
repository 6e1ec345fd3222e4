"""Residual networks for 32x32 images, in the forms used by the robustness literature.

All begin with a 3x3 convolution of stride 1 and no max-pool, halve the image at the start of
every stage but the first, and end in global average pooling, so they take images of any size.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from surestep.models._base import Classifier, Normalize
from surestep.models._registry import register

# With mean and standard deviation of the CIFAR-10 training pixels, in [0, 1].
for_cifar = functools.partial(
    register,
    in_channels=3,
    image_size=32,
    statistics=((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, normalised after each, added to the input (He et al. 2015).

    Shape:
        (N, in_width, H, W) to (N, width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            self.shortcut.append(nn.Conv2d(in_width, width, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and relu, added to the input.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input
    (He et al. 2016, arXiv 1603.05027).

    Shape:
        (N, in_width, H, W) to (N, width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3x3(width, width)
        same_shape = stride == 1 and in_width == width
        self.shortcut = None if same_shape else nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + shortcut


class ResNet(Classifier):
    """ResNet of basic blocks (He et al. 2015, arXiv 1512.03385) with the CIFAR stem.

    As in kuangliu/pytorch-cifar, with PyTorch's default init as there.

    Args:
        depths: blocks in each stage.
        widths: channels of each stage; the stem has as many as the first.
        num_classes: number of logits.
        in_channels: channels of the images.
        normalize: applied to the pixels first, or None.
        name: error messages begin with it.

    Shape:
        (N, in_channels, H, W), pixels in [0, 1], to (N, num_classes).
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 10,
        in_channels: int = 3,
        normalize: Normalize | None = None,
        name: str = "ResNet",
    ) -> None:
        body = nn.Sequential(
            OrderedDict(
                conv1=_conv3x3(in_channels, widths[0]),
                bn1=nn.BatchNorm2d(widths[0]),
                relu=nn.ReLU(),
                **_stages(BasicBlock, widths[0], depths, widths),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        head = nn.Linear(widths[-1], num_classes)
        super().__init__(name, body, head, in_channels=in_channels, normalize=normalize)


class PreActResNet(Classifier):
    """Pre-activation ResNet (He et al. 2016, arXiv 1603.05027) with the CIFAR stem.

    It has batch norm and relu between the last block and the pooling, as in the paper and in
    the code of "Fast is better than free" (Wong et al. 2020, arXiv 2001.03994); the version in
    kuangliu/pytorch-cifar leaves those two out. PyTorch's default init, as in both codes.

    Args:
        depths: blocks in each stage.
        widths: channels of each stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        normalize: applied to the pixels first, or None.
        stem_width: channels of the first convolution; default: those of the first stage.
        name: error messages begin with it.

    Shape:
        (N, in_channels, H, W), pixels in [0, 1], to (N, num_classes).
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 10,
        in_channels: int = 3,
        normalize: Normalize | None = None,
        stem_width: int | None = None,
        name: str = "PreActResNet",
    ) -> None:
        stem_width = stem_width or widths[0]
        body = nn.Sequential(
            OrderedDict(
                conv1=_conv3x3(in_channels, stem_width),
                **_stages(PreActBlock, stem_width, depths, widths),
                bn=nn.BatchNorm2d(widths[-1]),
                relu=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        head = nn.Linear(widths[-1], num_classes)
        super().__init__(name, body, head, in_channels=in_channels, normalize=normalize)


@for_cifar("preactresnet10-slim")
def preactresnet10_slim(
    num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
) -> PreActResNet:
    """Build PreActResNet-18 with half the blocks and a quarter of the width.

    Not from a paper: chosen here to train on two CPU cores. ``image_size`` is ignored.
    """
    return PreActResNet(
        (1, 1, 1, 1),
        (16, 32, 64, 128),
        num_classes,
        in_channels,
        normalize,
        name="preactresnet10-slim",
    )


@for_cifar("preactresnet18")
def preactresnet18(
    num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
) -> PreActResNet:
    """Build PreActResNet-18, with the final norm and relu. ``image_size`` is ignored."""
    return PreActResNet(
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        normalize=normalize,
        name="preactresnet18",
    )


@for_cifar("resnet18")
def resnet18(
    num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
) -> ResNet:
    """Build ResNet-18. ``image_size`` is ignored."""
    return ResNet(
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        normalize=normalize,
        name="resnet18",
    )


@for_cifar("resnet34")
def resnet34(
    num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
) -> ResNet:
    """Build ResNet-34. ``image_size`` is ignored."""
    return ResNet(
        (3, 4, 6, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        normalize=normalize,
        name="resnet34",
    )


def _conv3x3(in_width: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)


def _stages(
    block: Callable[[int, int, int], nn.Module],
    in_width: int,
    depths: Sequence[int],
    widths: Sequence[int],
) -> dict[str, nn.Module]:
    stages: dict[str, nn.Module] = {}
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        first = block(in_width, width, 1 if i == 0 else 2)
        rest = (block(width, width, 1) for _ in range(depth - 1))
        stages[f"layer{i + 1}"] = nn.Sequential(first, *rest)
        in_width = width
    return stages
