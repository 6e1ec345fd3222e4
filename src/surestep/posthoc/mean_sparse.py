"""MeanSparse: replace activations near their channel's mean by the mean.

Amini et al. 2024, "MeanSparse: Post-Training Robustness Enhancement Through Mean-Centered Feature
Sparsification", arXiv 2406.05927. The authors average the variances within batches; here the
channels' true standard deviation over the data is taken. Inside the dead zone the gradient is
zero, which masks gradients by construction: judge the result with ``straight_through`` too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from surestep.activations import activations
from surestep.attacks.lending import attacking, device_of, hooked, interpreted, uncompiled
from surestep.data import Images, as_images
from surestep.devices import finest
from surestep.errors import UserError


class MeanSparse(nn.Module):
    """Replace values within ``threshold`` standard deviations of their channel's mean by the mean.

    Args:
        channels: number of channels.
        threshold: t of the paper, in standard deviations; 0 changes nothing.
        dim: the channel dimension: 1, or -1 for tokens that come from a linear layer.

    Shape:
        Input: (N, channels, ...) or (N, ..., channels), according to ``dim``. Output: the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, threshold: float, dim: int = 1) -> None:
        super().__init__()
        self.threshold, self.dim = threshold, dim
        self.straight_through = False
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.zeros(channels))

    def extra_repr(self) -> str:
        """Show the threshold, which is not a buffer."""
        return f"{len(self.mean)}, threshold={self.threshold:g}, dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        """Sparsify x; with ``straight_through``, use the gradient of the identity."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        mean, std = self.mean.view(shape).to(x.dtype), self.std.view(shape).to(x.dtype)
        near = (x - mean).abs() < self.threshold * std
        if self.straight_through:
            mean = mean + (x - x.detach())
        return torch.where(near, mean, x)


@contextmanager
def _watching(
    model: nn.Module, see: Callable[[str, Tensor, int], None]
) -> Iterator[Callable[[Tensor], None]]:
    """Lend a pass through the model that shows each activation.

    Args:
        model: run in eval mode.
        see: called with the name, input and channel dimension of each activation in a pass.

    Raises:
        UserError: an activation is used twice in one pass.
    """
    # Several, as in a gated MLP: act(gate(x)) * up(x). Weakly, so that a pass frees them as usual.
    linear: list[weakref.ref[Tensor]] = []
    met: set[str] = set()

    def made(_module: nn.Module, _args: object, out: Tensor) -> None:
        linear.append(weakref.ref(out))

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        if name in met:
            raise UserError(
                f"the activation {name} is used twice in a pass, with different statistics each "
                "time: give the model a separate module for each use"
            )
        met.add(name)
        # The output of a linear layer has its channels last.
        of_linear = any(out() is args[0] for out in linear)
        see(name, args[0].detach(), -1 if of_linear else 1)

    noting = (
        module.register_forward_pre_hook(lambda m, args, name=name: note(name, args))
        for name, module in activations(model).items()
    )
    making = (m.register_forward_hook(made) for m in model.modules() if isinstance(m, nn.Linear))
    with hooked(noting), hooked(making), attacking(model) as inner:

        def run(x: Tensor) -> None:
            met.clear()
            linear.clear()
            inner(x)

        with interpreted(inner), torch.no_grad():  # compiled parts would ignore the hooks
            yield run


def measure(
    model: nn.Module, images: Images | tuple[Tensor, Tensor], batch_size: int = 500
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of each channel before each activation, over all images.

    Args:
        model: run in eval mode and left as it was.
        images: in memory, usually the training images.
        batch_size: images in a forward pass.

    Returns:
        A dict from an activation's name to its mean (C,) and standard deviation (C,), in float64
        (float32 on mps).

    Raises:
        UserError: an activation is used twice in a pass, or there are no images.
    """
    model = uncompiled(model)  # compiled code ignores hooks that are added later
    device, images = device_of(model), as_images(images)
    counts: dict[str, int] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, values: Tensor, dim: int) -> None:
        rows = values.to(finest(device)).transpose(0, dim).flatten(1)
        n, mean = rows.shape[1], rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        # Chan et al. 1979: combine the sums of squares of two parts without cancellation.
        if name in found:
            before, (mean_before, squares_before) = counts[name], found[name]
            shift = mean - mean_before
            squares = squares + squares_before + shift**2 * before * n / (before + n)
            mean = mean_before + shift * n / (before + n)
            n += before
        counts[name], found[name] = n, (mean, squares)

    with _watching(model, add) as run:
        for begin in range(0, len(images), batch_size):
            run(images.pixels(slice(begin, begin + batch_size)).to(device))
    return {name: (mean, (sq / counts[name]).sqrt()) for name, (mean, sq) in found.items()}


def insert(model: nn.Module, image: Tensor, threshold: float) -> nn.Module:
    """Insert a ``MeanSparse`` before each activation of a model, in place, and return the model.

    Means and standard deviations are zero, which changes nothing, until weights are loaded or
    ``set_statistics`` is called. For a compiled model, the module inside it is returned.

    Args:
        model: a model whose activations are modules, each used once in a pass.
        image: one image (1, ...), run through the model to find the numbers of channels.
        threshold: in standard deviations.

    Raises:
        UserError: the model has no activation module, or one without channels or used twice, or it
            does not run an inserted layer; it may then have been changed.
    """
    seen: dict[str, tuple[Tensor, int]] = {}
    model = uncompiled(model)  # compiled code would not run the new modules
    with _watching(model, lambda name, values, dim: seen.update({name: (values, dim)})) as run:
        run(image)
    if not seen:
        raise UserError(
            "the model has no activation modules (nn.ReLU and the like) to sparsify before: "
            "activations called as functions cannot be found"
        )
    inserted: dict[str, MeanSparse] = {}
    for name, (values, dim) in seen.items():
        if values.dim() < 2:
            raise UserError(
                f"the input of {name} has shape {tuple(values.shape)}, expected (N, C, ...): give "
                "the model activations whose inputs have channels"
            )
        activation = model.get_submodule(name)
        sparse = MeanSparse(values.shape[dim], threshold, dim).to(values.device)
        both = nn.Sequential(sparse, activation)
        # A module may be registered in several places, any of which the model may call.
        places = [(m, k) for m in model.modules() for k, v in m._modules.items() if v is activation]
        for holder, own in places:
            setattr(holder, own, both)
        inserted[name] = sparse
    _check_run(model, image, inserted)
    return model


def _check_run(model: nn.Module, image: Tensor, inserted: Mapping[str, MeanSparse]) -> None:
    """Refuse a model that leaves inserted layers out of a pass without gradients.

    nn.TransformerEncoderLayer does: its fused path computes the activation itself. Clean images
    would be judged by the model without the layers, and attacks would climb the one with them.
    """
    ran: set[nn.Module] = set()

    def noted(layer: MeanSparse) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            ran.add(layer)
            return MeanSparse.forward(layer, x)

        return forward

    # Hooks would turn the fused path off.
    for layer in inserted.values():
        vars(layer)["forward"] = noted(layer)
    try:
        with attacking(model) as inner, interpreted(inner), torch.no_grad():
            inner(image)
    finally:
        for layer in inserted.values():
            del vars(layer)["forward"]
    left_out = next((name for name, layer in inserted.items() if layer not in ran), None)
    if left_out is not None:
        raise UserError(
            f"the model leaves MeanSparse before {left_out} out of passes without gradients: turn "
            "off torch's fused transformer layers, in the file that makes the model, with "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )


def layers(model: nn.Module) -> list[MeanSparse]:
    """Return the sparsifying layers of a model."""
    return [m for m in model.modules() if isinstance(m, MeanSparse)]


def set_statistics(model: nn.Module, found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy what ``measure`` returned into the layers that ``insert`` added to the same model."""
    for name, (mean, std) in found.items():
        layer = model.get_submodule(f"{name}.0")  # where insert put it
        assert isinstance(layer, MeanSparse)
        layer.mean.copy_(mean)
        layer.std.copy_(std)
