"""Checks of a model's inputs (images and labels) and outputs (logits)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surestep.attacks.lending import (
    attacking,
    check_module,
    compiled_whole,
    hooked,
    uncompiled,
    unwrapped,
)
from surestep.errors import UserError
from surestep.randomness import forked_rng
from surestep.threat import ThreatModel


def forward_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Run the model and return its logits (N, K) in float32 (float64 stays).

    A model may also return a tuple or list that begins with the logits, or a dict or Hugging Face
    output with an entry ``logits``.

    Raises:
        UserError: there is no tensor of shape (N, K), K >= 2, in what the model returns.
    """
    returned = model(x)
    logits = returned
    if isinstance(returned, Mapping):
        logits = returned.get("logits")
    elif hasattr(returned, "logits"):
        logits = returned.logits
    elif isinstance(returned, tuple | list) and returned:
        logits = returned[0]
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the model returned a {type(returned).__name__}, expected a tensor of logits (N, K), "
            "a tuple that begins with it or a dict with 'logits': "
            "wrap it in a module that returns the logits"
        )
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise UserError(
            f"the model returned shape {tuple(logits.shape)} for {len(x)} images, "
            "expected logits of shape (N, K) with K >= 2 classes"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        return logits.float()
    # With CUDA graphs (torch.compile's reduce-overhead) the next pass overwrites the output.
    return logits.clone() if compiled_whole(model) else logits


def features_of(model: nn.Module, x: Tensor) -> Tensor:
    """Run the model and return what its last linear layer to run takes (N, D).

    Without such a layer, return the logits. Compiled modules hide theirs: see ``interpreted``.
    """
    features: Tensor | None = None

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal features
        if args and len(args[0]) == len(x):
            features = args[0]

    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    with hooked(module.register_forward_pre_hook(note) for module in linear):
        logits = forward_logits(model, x)
    return (logits if features is None else features).flatten(1)


def check_inputs(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, unlabelled: bool = False
) -> None:
    """Refuse inputs that would silently give wrong numbers, or fail later in a puzzling way.

    Reads the values, so it waits for the device: call it once on entry, not in every step. With
    ``unlabelled`` a label may be -1, for none.

    Raises:
        UserError: the model is no module; x or y is no tensor; x is empty, not floating, not finite
            or outside the data range; y is not an int64 tensor (N,) of labels from 0 to K - 1; the
            model fails on one such image or returns no logits.
    """
    check_module(model)
    for name, value in (("x", x), ("y", y)):
        if isinstance(value, np.ndarray):
            raise UserError(
                f"{name} is a numpy array: pass a tensor, torch.from_numpy({name}), on the model's "
                "device"
            )
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}, expected a tensor")
    low, high = threat.bounds
    if not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        raise UserError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, expected floating point images (N, ...) "
            f"in [{low:g}, {high:g}]: of uint8 images take x.float() / 255"
        )
    low, high = threat.bounds_in(x.dtype)
    lowest, highest = (float(v) for v in torch.aminmax(x.detach()))
    # Written so that NaN is refused, too.
    if not (lowest >= low and highest <= high):
        near = max(low - lowest, highest - high) < 1e-3 * threat.span
        advice = (
            f"if this is rounding, use x.clamp({low:g}, {high:g})"
            if near
            else "scale to the data range and put any normalisation inside the model"
        )
        raise UserError(
            f"x has values in [{lowest:.9g}, {highest:.9g}], expected [{low:g}, {high:g}]: {advice}"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UserError(
            f"y is {y.dtype} of shape {tuple(y.shape)}, expected torch.int64 labels of shape "
            f"({len(x)},)"
        )
    check_labels(y, count_classes(model, x), unlabelled=unlabelled)


def reason_of(error: Exception) -> str:
    """Return the line of a model's exception that tells the cause; empty if there is none.

    TorchScript's exceptions begin with a traceback and end with the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if lines and "TorchScript interpreter" in lines[0] else 0] if lines else ""


def check_labels(y: Tensor, classes: int, *, unlabelled: bool = False) -> None:
    """Refuse labels that are not classes of the model; ``unlabelled`` also allows -1, for none.

    Raises:
        UserError: a label is outside that range.
    """
    lowest, highest = (int(v) for v in torch.aminmax(y))
    if lowest < (-1 if unlabelled else 0) or highest >= classes:
        hint = (
            "; only training with uat takes -1, no label" if lowest == -1 and not unlabelled else ""
        )
        raise UserError(
            f"y has labels from {lowest} to {highest}, but the model has {classes} classes: "
            f"labels must run from 0 to {classes - 1}{hint}"
        )


@torch.no_grad()
def count_classes(model: nn.Module, x: Tensor) -> int:
    """Run the model on the first of the images x (N, ...) and return its number of classes.

    Raises:
        UserError: the model fails on it or returns no logits.
    """
    # Inspecting a model must not change what it draws at random afterwards.
    with attacking(uncompiled(unwrapped(model))) as inner, forked_rng(x.device):
        try:
            return forward_logits(inner, x[:1]).shape[1]
        except (UserError, MemoryError):
            raise
        except Exception as e:  # whatever is wrong in the user's forward
            raise UserError(
                f"the model fails on one image of shape {tuple(x.shape[1:])} and type {x.dtype}: "
                f"{reason_of(e) or type(e).__name__}"
            ) from e
