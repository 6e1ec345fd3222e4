"""Threat models: what an attacker may do to an image.

The only place that knows norms, radii and the data range. Everything here works on tensors
of shape (N, ...), pixel units as in ``bounds`` (by default [0, 1]).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from surestep.devices import finest
from surestep.errors import UserError, look_up

T = TypeVar("T", bound="ThreatModel")


@dataclass(frozen=True)
class ThreatModel(ABC):
    """A norm ball of radius ``eps`` around each image, cut by the data range.

    Args:
        eps: the radius, in pixel units (8 / 255, not 8).
        bounds: the data range (low, high).

    Raises:
        UserError: ``eps`` is negative or not finite, or ``bounds`` are not increasing.
    """

    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", _plain(self.eps))
        object.__setattr__(self, "bounds", tuple(map(_plain, self.bounds)))
        if not (len(self.bounds) == 2 and all(map(_finite, self.bounds)) and self.span > 0):
            raise UserError(f"bounds {self.bounds} are not a range: give (low, high), low < high")
        if not (_finite(self.eps) and self.eps >= 0):
            raise UserError(f"eps {self.eps!r} is not a radius: give a number >= 0, such as 8/255")

    @property
    def span(self) -> float:
        """The width of the data range."""
        return self.bounds[1] - self.bounds[0]

    def with_eps(self: T, eps: float) -> T:
        """Return the same threat model with another radius."""
        return replace(self, eps=eps)

    def to_dict(self) -> dict[str, Any]:
        """Return norm, eps and data range as plain values, for results."""
        return {"norm": type(self).__name__.lower(), "eps": self.eps, "bounds": list(self.bounds)}

    def clip(self, x: Tensor) -> Tensor:
        """Clip to the data range only (no norm ball)."""
        return x.clamp(*self.bounds)

    def bounds_in(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the data range as rounded to a dtype, which is where ``clip`` ends."""
        low, high = torch.tensor(self.bounds, dtype=dtype).tolist()
        return low, high

    def random_start(self, x: Tensor, radius: float | None = None) -> Tensor:
        """Draw a start uniformly from the ball of ``radius`` (default eps), then project it.

        Args:
            x: images (N, ...).
            radius: of the draw; at most eps matters, since the result is projected.
        """
        return self.project(x + self.random_delta(x, radius), x)

    @abstractmethod
    def random_delta(self, x: Tensor, radius: float | None = None) -> Tensor:
        """Draw perturbations shaped as ``x``, uniform in the ball of ``radius`` (default eps)."""

    @abstractmethod
    def steepest_step(self, grad: Tensor, size: float) -> Tensor:
        """Return the perturbation of norm ``size`` along which the loss grows fastest.

        A sample with zero gradient gets a zero step.
        """

    def random_step(self, x: Tensor, size: float) -> Tensor:
        """Return perturbations shaped as ``x`` along Gaussian noise, of norm ``size``."""
        return self.steepest_step(torch.randn_like(x), size)

    def ascend(self, point: Tensor, grad: Tensor, size: float, x: Tensor) -> Tensor:
        """Take one step of steepest ascent: from ``point``, of length ``size``, within the ball.

        Args:
            point: where the gradient was taken (N, ...).
            grad: the gradient, shaped as ``point``.
            size: length of the step, in the data's units.
            x: the images whose ball and data range the result is projected to.
        """
        return self.project(point + self.steepest_step(grad, size), x)

    @abstractmethod
    def shrink(self, delta: Tensor, radius: float) -> Tensor:
        """Bring perturbations (N, ...) into the ball of ``radius``, whatever the data range."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Bring ``x_adv`` back into the ball around ``x`` and into the data range.

        Exact under rounding: the distance of the result from ``x``, computed in the tensors'
        own dtype, never exceeds eps. ``x`` must lie in the data range.
        """
        return self.around(x)(x_adv)

    @abstractmethod
    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return ``project`` for many points around the same ``x``.

        What depends on ``x`` alone is computed once.
        """


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value a sample (N,) so that it meets each of the sample's in ``like`` (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Linf(ThreatModel):
    """Every pixel may change by at most ``eps``.

    Raises:
        UserError: as for every threat model, or ``eps`` is larger than the data range.

    Example:
        >>> threat = Linf(eps=8 / 255)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps > self.span:
            raise UserError(
                f"eps {self.eps:g} is larger than the data range {self.bounds}: "
                "eps is in pixel units, write 8/255 rather than 8"
            )

    def random_delta(self, x: Tensor, radius: float | None = None) -> Tensor:
        """Draw every pixel from U(-radius, radius)."""
        radius = self.eps if radius is None else radius
        return torch.empty_like(x).uniform_(-radius, radius)

    def steepest_step(self, grad: Tensor, size: float) -> Tensor:
        """Return ``size * sign(grad)`` (Goodfellow et al. 2015, section 4)."""
        return size * grad.sign()

    def shrink(self, delta: Tensor, radius: float) -> Tensor:
        """Clip each pixel to [-radius, radius]."""
        return delta.clamp(-radius, radius)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Clip each pixel to [x - eps, x + eps] and to the data range."""
        low, high = self.bounds
        top, bottom = x + self.eps, x - self.eps
        # x + eps rounds, so (x + eps) - x can come out above eps: where it does, the next
        # float towards x is inside, and by monotonicity so is everything between.
        top = torch.where(top - x > self.eps, top.nextafter(x), top).clamp(max=high)
        bottom = torch.where(x - bottom > self.eps, bottom.nextafter(x), bottom).clamp(min=low)
        return lambda x_adv: x_adv.clamp(bottom, top)


@dataclass(frozen=True)
class L2(ThreatModel):
    """The Euclidean norm of an image's perturbation is at most ``eps``.

    Example:
        >>> threat = L2(eps=0.5)
    """

    def random_delta(self, x: Tensor, radius: float | None = None) -> Tensor:
        """Draw uniformly from the ball: a Gaussian direction, a radius with density r^(d-1)."""
        radius = self.eps if radius is None else radius
        share = torch.rand(len(x), device=x.device, dtype=x.dtype).pow(1 / x[0].numel())
        return self.random_step(x, radius) * per_sample(share, x)

    def steepest_step(self, grad: Tensor, size: float) -> Tensor:
        """Return ``size * grad / ||grad||_2`` per sample."""
        # Dividing by the largest entry first keeps the squares of tiny gradients from vanishing.
        scale = per_sample(grad.flatten(1).abs().amax(1), grad)
        direction = grad / torch.where(scale > 0, scale, 1)
        norm = per_sample(direction.flatten(1).norm(dim=1), grad)
        return size * direction / norm.clamp(min=1)

    def shrink(self, delta: Tensor, radius: float) -> Tensor:
        """Scale each perturbation that is longer to norm ``radius``."""
        norm = per_sample(delta.flatten(1).norm(dim=1), delta)
        return delta * torch.where(norm > radius, radius / norm, 1)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Scale the perturbation back to norm eps, then clip to the data range."""
        # x + delta rounds each pixel by half an ulp at most: the radius gives way by that much.
        ulp = torch.finfo(x.dtype).eps * max(abs(b) for b in self.bounds)
        radius = max(0.0, self.eps - ulp * math.sqrt(math.prod(x.shape[1:])))

        def project(x_adv: Tensor) -> Tensor:
            x_adv = self.clip(x_adv)
            delta = x_adv - x
            norm = delta.flatten(1).to(finest(x.device)).norm(dim=1)
            factor = torch.where(norm > self.eps, radius / norm, 1.0).to(x.dtype)
            inside = per_sample(norm <= self.eps, x)
            return torch.where(inside, x_adv, self.clip(x + delta * per_sample(factor, x)))

        return project


NORMS: dict[str, type[ThreatModel]] = {"linf": Linf, "l2": L2}


def make(norm: str, eps: float, bounds: tuple[float, float] = (0.0, 1.0)) -> ThreatModel:
    """Build the threat model of a norm's name.

    Args:
        norm: "linf" or "l2".
        eps: the radius, in pixel units.
        bounds: the data range.

    Raises:
        UserError: the norm is unknown, or eps or bounds are invalid.
    """
    return look_up("norm", norm, NORMS)(eps, bounds)


def check_threat(given: object) -> None:
    """Refuse what is not a threat model.

    Raises:
        UserError: it is none, such as a bare number.
    """
    if not isinstance(given, ThreatModel):
        raise UserError(
            f"{given!r} is not a threat model: give surestep.Linf(8 / 255) or surestep.L2(0.5)"
        )


def _plain(value: Any) -> Any:
    """Return a number of numpy's or torch's as python's; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
