"""Models by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import nn

from surestep.errors import UserError, unknown_name
from surestep.models._base import Normalize, choose_normalize
from surestep.models._from_file import from_file, in_file
from surestep.models._timm import PREFIX, create_timm


class Builder(Protocol):
    """A class or function that makes a model from these four arguments."""

    def __call__(
        self, num_classes: int, in_channels: int, image_size: int, normalize: Normalize | None
    ) -> nn.Module:
        """Build the model."""
        ...


B = TypeVar("B", bound=Builder)


@dataclass(frozen=True)
class _Entry:
    build: Builder
    in_channels: int
    image_size: int
    statistics: tuple[Sequence[float], Sequence[float]] | None


_ENTRIES: dict[str, _Entry] = {}


def register(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Callable[[B], B]:
    """Return a decorator that makes a model class or function available under ``name``.

    Args:
        name: what users type.
        in_channels: default number of channels.
        image_size: default height and width.
        statistics: default normalisation (mean, std) for pixels in [0, 1], or None.

    Raises:
        UserError: the name is taken.
    """

    def add(build: B) -> B:
        if name in _ENTRIES:
            raise UserError(f"model {name!r} is already registered: choose another name")
        _ENTRIES[name] = _Entry(build, in_channels, image_size, statistics)
        return build

    return add


def names() -> list[str]:
    """List the registered models; those of timm are available too, as ``timm:NAME``."""
    return list(_ENTRIES)


def create(
    name: str,
    num_classes: int = 10,
    *,
    in_channels: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalize: bool = True,
    pretrained: bool = False,
) -> nn.Module:
    """Create a model that maps pixels in [0, 1] to logits, by default with random weights.

    Args:
        name: one of ``names()``, ``timm:NAME`` with timm installed, or ``FILE.py:FACTORY``: a
            function without arguments, whose model is returned as it is.
        num_classes: number of logits.
        in_channels: channels of the images; default: the model's own (1 or 3).
        image_size: height and width of the images; default: the model's own. Models with global
            average pooling take any size, whatever is given here.
        mean: per-channel mean of pixels in [0, 1], for normalisation inside the model. The default
            is the model's own; if that is for another number of channels, its average for timm's
            models, and no normalisation for others.
        std: per-channel standard deviation; required with ``mean``.
        normalize: False leaves normalisation out.
        pretrained: load timm's own weights, downloaded if needed; the last layer is random if
            the number of classes differs.

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        UserError: the name is unknown, a number is not positive, mean and std do not match
            in_channels, the model cannot be built for this size, timm is not installed, there
            are no pretrained weights, or the file makes no model.
    """
    for what, value in (
        ("num_classes", num_classes),
        ("in_channels", in_channels),
        ("image_size", image_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"{what} is {value}: give a number of 1 or more")
    if name.startswith(PREFIX):
        return create_timm(
            name, num_classes, in_channels or 3, image_size, mean, std, normalize, pretrained
        )
    if pretrained:
        raise UserError(f"{name} has no pretrained weights, only {PREFIX}NAME has: give a file")
    if in_file(name):
        return from_file(name)
    entry = _entry(name)
    in_channels = in_channels or entry.in_channels
    return entry.build(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size or entry.image_size,
        normalize=choose_normalize(in_channels, mean, std, entry.statistics) if normalize else None,
    )


def check_name(name: str) -> None:
    """Refuse the name of no model; names within timm or a file are checked when they are loaded.

    Raises:
        UserError: there is no model of that name.
    """
    if not name.startswith(PREFIX) and not in_file(name):
        _entry(name)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise unknown_name("model", name, [*_ENTRIES, f"{PREFIX}NAME", "FILE.py:FACTORY"])
    return _ENTRIES[name]
