"""Activation checkpointing: training steps that fit into a memory limit.

Most memory of a step is taken by the activations that forward passes keep for backward. ``Frugal``
keeps fewer of them and recomputes the rest. That costs one more forward pass and changes no
result, except for what dropout draws. Where images are independent (eval mode, or train mode
without batch statistics) a pass runs in chunks of images; otherwise it runs block by block over
the whole batch (Chen et al. 2016, arXiv 1604.06174). Where an attack's objective leaves images
independent, too, ``input_gradient`` finishes chunk after chunk and recomputes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking, device_of, uses_batch_statistics
from surestep.errors import UserError
from surestep.methods import Method
from surestep.randomness import forked_rng
from surestep.training.engine import Engine

_BACKWARD = 1.4
"""Memory of a pass relative to the activations that it keeps, since gradients take some, too."""
_PROBE = 4


class Frugal(nn.Module):
    """A model whose passes over many images keep little for backward.

    Args:
        model: the model, which is not changed and keeps its own state.
        images: images per chunk in a pass without batch statistics; a pass with them keeps only
            the inputs of residual blocks.
    """

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__()
        self.module, self.images = model, images
        self.blocks = repeated_blocks(model)

    @property
    def attacked_at_once(self) -> int | None:
        """Images whose gradient fits into memory as one pass, if images are independent."""
        return None if uses_batch_statistics(self.module) else self.images

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model returns for images x (N, ...)."""
        if uses_batch_statistics(self.module):
            with _recomputed(self.blocks):
                return self.module(x)
        if len(x) <= self.images or not torch.is_grad_enabled():
            return self.module(x)
        run = functools.partial(forward_logits, self.module)
        return torch.cat(
            [checkpoint(run, part, use_reentrant=False) for part in x.split(self.images)]
        )


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks: modules with a batch norm child whose class occurs repeatedly.

    ``nn.Sequential`` does not count, since it may hold anything. Of nested blocks only the
    outermost count, so that nothing is computed three times.
    """
    kinds: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        if any(isinstance(part, _BatchNorm) for part in module.children()):
            kinds.setdefault(type(module), []).append(module)
    kinds.pop(nn.Sequential, None)
    found = [m for modules in kinds.values() if len(modules) > 1 for m in modules]
    inside = {id(part) for m in found for part in m.modules() if part is not m}
    return [m for m in found if id(m) not in inside]


@contextmanager
def _recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Let each block keep only its input, and recompute its activations in backward."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=functools.partial(_second_time, block),
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:  # the instance had its own
                block.forward = forward


def _second_time(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _uncounted(block)


@contextmanager
def _uncounted(block: nn.Module) -> Iterator[None]:
    """Let batch norm see a batch a second time without updating its running statistics."""
    counted = [(m, name, b) for m in block.modules() for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in counted:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in counted:
            setattr(module, name, buffer)


def fit_into(
    model: nn.Module,
    method: Method,
    engine: Engine,
    shape: torch.Size | None,
    batch_size: int,
    gibibytes: float,
    copies: int = 0,
) -> nn.Module:
    """Return the model, wrapped in ``Frugal`` if its training steps would exceed a memory limit.

    The memory is estimated from what passes over a few images keep for backward.

    Args:
        model: in train mode, on its device.
        method: what a step minimises.
        engine: how a step is computed.
        shape: shape of one image; None if it cannot be read from the data.
        batch_size: images per step in this process.
        gibibytes: the limit on weights, their gradients and momenta, and activations.
        copies: further tensors as large as the weights that training keeps.

    Raises:
        UserError: even ``Frugal`` would exceed the limit (names what would lower the need), or
            there is no shape.
    """
    if shape is None:
        raise UserError(
            f"max_memory ({gibibytes:g}) needs the shape of an image, which cannot be read "
            "from these data: give a Dataset whose items are pairs of tensors, or a smaller batch "
            "instead"
        )
    limit = gibibytes * 2**30
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    images = method.peak_images(batch_size)
    # 4x the weights: themselves, gradients, momenta, and autocast's copy. 8x the images: what an
    # attack keeps (starts, gradients, signs, points and their clipped copies).
    fixed = (4 + copies) * weights + 8 * images * 4 * math.prod(shape)
    device = device_of(model)
    x = torch.zeros(_PROBE, *shape, device=device)
    each = _BACKWARD * _kept_by_image(model, x, engine)
    if fixed + images * each <= limit:
        return model
    with attacking(model):
        judged = _BACKWARD * _kept_by_image(model, x, engine)
    chunk = int((limit - fixed) / max(judged, 1))
    frugal = Frugal(model, max(chunk, 1))
    if not uses_batch_statistics(model):
        need = fixed + judged
    elif frugal.blocks:
        # One block is recomputed at a time; assume that the largest takes twice the mean.
        least = _kept_by_image(frugal, x, engine)
        need = fixed + images * (least + each / len(frugal.blocks) * 2)
    else:
        need = fixed + images * each
    if need > limit:
        raise UserError(
            f"max_memory {gibibytes:g} GiB is too little: a step of {images} images needs about "
            f"{1.1 * need / 2**30:.2g} GiB at least; lower batch_size ({batch_size}) or take a "
            "smaller model"
        )
    return frugal


def images_within(room: int, model: nn.Module, engine: Engine, shape: torch.Size) -> int:
    """Return for how many images a pass in eval mode keeps ``room`` bytes; 0 if that is unknown.

    Args:
        room: bytes of activations kept for backward.
        model: on its device.
        engine: how a pass is computed.
        shape: shape of one image.
    """
    x = torch.zeros(_PROBE, *shape, device=device_of(model))
    try:
        with attacking(model):
            kept = _kept_by_image(model, x, engine)
    except Exception:  # a model of the user's may refuse images of zeros
        return 0
    return int(room / max(kept, 1))


def _kept_by_image(model: nn.Module, x: Tensor, engine: Engine) -> float:
    """Return the bytes kept per additional image, without what is kept once (casts of weights)."""
    half = len(x) // 2
    return (kept_bytes(model, x, engine) - kept_bytes(model, x[:half], engine)) / (len(x) - half)


def kept_bytes(model: nn.Module, x: Tensor, engine: Engine) -> int:
    """Return the bytes that a forward pass keeps for backward, not counting weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []  # held, so that no two share an address

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        forked_rng(x.device),
        _uncounted(model),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        engine.autocast(x.device),
    ):
        model(engine.place_images(x.detach().requires_grad_()))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in weights)
