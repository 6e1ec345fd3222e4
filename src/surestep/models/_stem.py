"""The first convolution for grey images, with an input gradient that is cheap on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GreyConv2d(nn.Conv2d):
    """``nn.Conv2d`` of stride 1 with a faster input gradient for grey images on a CPU.

    Attacks need the gradient of the images at the first convolution; ordinary training does not.
    oneDNN computes it many channels at a time, and one-channel images leave all but one of them
    empty. With shifted rows stacked as channels, the same sums become a convolution from
    kernel-height channels with a kernel one pixel high. Used only if the images require a
    gradient; docs/performance.md has the gain.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``.
        padding: zeros on each side of the images.
    """

    padding: tuple[int, int]  # never a string, unlike nn.Conv2d's

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images (N, C, H, W)."""
        if x.requires_grad and x.shape[1] == 1 and x.device.type == "cpu":
            return self._by_rows(x)
        return super().forward(x)

    def _by_rows(self, x: Tensor) -> Tensor:
        filters, _, height, width = self.weight.shape
        above, beside = self.padding
        padded = F.pad(x.squeeze(1), (0, 0, above, above))
        rows = padded.shape[1] - height + 1
        # Stacked last, for the channels_last order, which makes the next pooling faster, too.
        shifted = torch.stack([padded[:, i : i + rows] for i in range(height)], -1)
        weight = self.weight.reshape(filters, height, 1, width)
        return F.conv2d(shifted.permute(0, 3, 1, 2), weight, self.bias, padding=(0, beside))
