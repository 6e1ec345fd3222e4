"""Which device to run on, and what it can do."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from surestep.errors import UserError

_WITHOUT_FLOAT64 = {"mps"}


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of a name; without one an accelerator if there is any, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        _let_segments_grow()
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"device {name!r} cannot be used here ({reason}): give cpu, cuda, cuda:1 or mps, or "
            "leave it out"
        ) from e
    return device


def _let_segments_grow() -> None:
    """Let CUDA's pieces of memory grow, so that passes of changing sizes leave no gaps behind.

    CUDA reads it when it first allocates; what the user has set stays.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def has_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(probe and probe())
    return False


def finest(device: torch.device) -> torch.dtype:
    """Return the most precise floating type of a device: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which forward passes run in a type; float32 needs none."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
