"""What all models share: pixels in [0, 1], normalisation inside, checked input, one head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surestep.errors import UserError


class Normalize(nn.Module):
    """Map pixels to ``(x - mean) / std``, channel by channel.

    It lives inside the model, so that ``eps`` is always in pixel units. ``mean`` and ``std`` are
    saved with the weights, so that a checkpoint brings its own normalisation.

    Args:
        mean: one value per channel, for pixels in [0, 1].
        std: one value per channel, > 0.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        UserError: the lengths differ, a value is not finite, or a ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise UserError(f"mean has {len(mean)} values and std {len(std)}: give one per channel")
        if not all(map(math.isfinite, (*mean, *std))) or min(std, default=1) <= 0:
            raise UserError(f"mean {tuple(mean)} and std {tuple(std)}: give finite values, std > 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch (N, C, H, W) of pixels in [0, 1]."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the statistics in ``print(model)``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """An image classifier: normalise, ``body`` to features (N, D), ``head`` to logits.

    Every activation in ``body`` is a separate ``nn.ReLU``, called once per forward pass, so that
    methods that act on activations (MeanSparse, SADS) can find and wrap each of them.

    Args:
        name: as registered; error messages begin with it.
        body: from normalised images to features (N, D).
        head: from features to logits; may be replaced.
        in_channels: channels of the images.
        image_size: height and width of the images, or None if any size will do.
        normalize: applied to the pixels first, or None.

    Shape:
        (N, in_channels, H, W), pixels in [0, 1], to logits (N, num_classes).
    """

    def __init__(
        self,
        name: str,
        body: nn.Module,
        head: nn.Module,
        *,
        in_channels: int,
        image_size: int | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_channels = in_channels
        self.image_size = image_size
        self.normalize = normalize
        self.body = body
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        """Return what the head sees, (N, D), for images (N, C, H, W) in [0, 1].

        Raises:
            UserError: ``x`` has the wrong number of dimensions, channels or pixels.
        """
        self._check(x)
        return self.body(x if self.normalize is None else self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W) in [0, 1].

        Raises:
            UserError: ``x`` has the wrong number of dimensions, channels or pixels.
        """
        return self.head(self.features(x))

    def _check(self, x: Tensor) -> None:
        # Shapes only: looking at the values would wait for the device at every step.
        size = self.image_size
        fits = x.dim() == 4 and x.shape[1] == self.in_channels
        if fits and (size is None or x.shape[2:] == (size, size)):
            return
        height, width = ("H", "W") if size is None else (size, size)
        if x.dim() != 4:
            got, advice = str(tuple(x.shape)), "give a batch, channels before height and width"
        else:
            got = f"(N, {', '.join(map(str, x.shape[1:]))})"
            if not fits and x.shape[3] == self.in_channels:
                advice = "put the channels first, x.permute(0, 3, 1, 2)"
            elif size is None:
                advice = f"create it with in_channels={x.shape[1]}"
            elif x.shape[2] == x.shape[3]:
                advice = f"create it with in_channels={x.shape[1]}, image_size={x.shape[2]}"
            else:
                advice = "crop or resize the images to a square"
        raise UserError(
            f"{self.name} takes images of shape (N, {self.in_channels}, {height}, {width}); "
            f"got {got}: {advice}"
        )


def choose_normalize(
    in_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    default: tuple[Sequence[float], Sequence[float]] | None,
) -> Normalize | None:
    """Build the normalisation: the user's if given, else the default, else none.

    The default is dropped when it is for another number of channels: CIFAR-10 statistics mean
    nothing for grey images.

    Raises:
        UserError: only one of the two is given, or there is not one value per channel.
    """
    if mean is None and std is None:
        if default is None or len(default[0]) != in_channels:
            return None
        mean, std = default
    if mean is None or std is None:
        raise UserError("mean and std go together: give both or neither")
    if not len(mean) == len(std) == in_channels:
        raise UserError(
            f"mean has {len(mean)} values and std {len(std)}: give one of each for every "
            f"channel, here {in_channels}"
        )
    return Normalize(mean, std)
