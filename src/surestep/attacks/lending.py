"""A model, unwrapped, run eagerly, or lent to an attack and given back as it was.

Modes, ``requires_grad`` flags, ``.grad`` and buffers are left as they were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from surestep.devices import drop_casts_without_gradients
from surestep.errors import UserError

_INSIDE = "_orig_mod"
"""Where torch.compile keeps the module that it wraps."""


def check_module(model: object) -> None:
    """Refuse a model that is no module, such as a state_dict.

    Raises:
        UserError: ``model`` is no ``torch.nn.Module``.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, Mapping):
        raise UserError(
            "the model is a state_dict: build the module, call load_state_dict, and pass the module"
        )
    shown = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
    raise UserError(
        f"the model is {shown}, expected a torch.nn.Module: wrap a function in a module; load a "
        "run folder with surestep.load(RUN).model"
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, or else of its buffers; the CPU if it has none."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside a compiled one, for passes of odd sizes or with hooks."""
    return getattr(model, _INSIDE, model)


def compiled_whole(model: nn.Module) -> bool:
    """Tell whether a model is compiled as one: by ``torch.compile``, or in place."""
    return _INSIDE in model._modules or model._compiled_call_impl is not None


def compiled(model: nn.Module) -> bool:
    """Tell whether a model, or a part of it, is compiled."""
    return any(map(compiled_whole, model.modules()))


def uses_batch_statistics(model: nn.Module) -> bool:
    """Tell whether batch norm, in its present mode, makes the images of a pass interdependent."""
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
    # Without running statistics, batch norm uses the batch's in eval mode, too.
    return any(m.training or m.running_mean is None for m in norms)


@contextmanager
def interpreted(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of a model eagerly: compiled code ignores hooks that are added later."""
    if compiled(model):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks on modules for the block.

    Args:
        handles: what registers the hooks, one after another, as a generator does: if one of them
            cannot be, those before it are taken off, too.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules inside a model that take hooks: TorchScript's do not."""
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel, which may itself be compiled.

    Passes of the inner module do not wait for other processes.
    """
    inner = uncompiled(model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Temporarily set ``requires_grad`` to False on all parameters."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


@torch.no_grad()
def copy_all(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """Copy each tensor into its counterpart: with one kernel per dtype, where the device has it."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for own, other in zip(to, of, strict=True):
        # .data: a graph that holds the tensor may still be differentiated.
        pairs.setdefault(own.dtype, []).append((own.data, other))
    for alike in pairs.values():
        own_ones, others = (list(side) for side in zip(*alike, strict=True))
        torch._foreach_copy_(own_ones, others)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers (batch statistics) on exit, so that passes inside have no effect on them.

    Only those of modules in train mode are restored: in eval mode a forward pass writes none.
    """
    training = [m for m in model.modules() if m.training]
    # Modules may share a buffer; take each once.
    buffers = list({id(b): b for m in training for b in m.buffers(recurse=False)}.values())
    saved = [torch.empty_like(b) for b in buffers]
    copy_all(saved, buffers)
    try:
        yield
    finally:
        copy_all(buffers, saved)


@contextmanager
def attacking(model: nn.Module, *, train_mode: bool = False) -> Iterator[nn.Module]:
    """Lend the unwrapped ``model`` to an attack and give it back as it was.

    Cached autocast copies of the weights are dropped, too, if a later pass would get no gradient
    through them.

    Args:
        model: any module; of a DistributedDataParallel, the module inside is lent, since an attack
            must not take part in gradient synchronisation.
        train_mode: lend it in train mode (batch statistics, dropout) instead of eval mode. A model
            already in train mode keeps the modes of its layers.
    """
    inner = unwrapped(model)
    # Where the model is in train mode, layers that its owner keeps in eval mode stay so.
    as_found = train_mode and inner.training
    modules = list(inner.modules())
    changed = [] if as_found else [m for m in modules if m.training != train_mode]
    for module in changed:
        module.training = train_mode
    try:
        # A compiled backward computes a gradient for every tensor that requires one, so freeze the
        # weights there. Otherwise leave them alone: autocast caches casts only of weights that
        # require a gradient.
        weights = frozen(inner) if any(map(compiled_whole, modules)) else nullcontext()
        # In train mode the attack's passes would enter batch norm's running statistics.
        with weights, buffers_kept(inner) if train_mode else nullcontext():
            yield inner
    finally:
        for module in changed:
            module.training = not train_mode
        drop_casts_without_gradients(device_of(inner))
