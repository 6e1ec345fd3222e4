"""Which device to run on, and what it can do."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from surestep.errors import UserError

_KINDS = ("cpu", "cuda", "mps")
_WITHOUT_FLOAT64 = {"mps"}


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device; by default an accelerator if there is one, else the CPU.

    Also limits torch to one thread per core, unless OMP_NUM_THREADS is set.

    Raises:
        UserError: the device cannot be used here, or a numbered GPU is given to several processes.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    name = str(name)
    if name.startswith("cuda"):
        name = _own_device(name)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        # Threads beyond the number of cores spin and delay the others: many times slower.
        torch.set_num_threads(cores())
    try:
        # With its index: "cuda" and "cuda:0" are the same device but do not compare equal.
        device = torch.ones(1, device=name).device
        if device.type not in _KINDS:
            raise NotImplementedError(f"{device.type} is not supported")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"device {name!r} cannot be used here ({reason}): give cpu, cuda, cuda:1 or mps, or "
            "leave it out"
        ) from e
    return device


def _own_device(name: str) -> str:
    """Return this process's own GPU where torchrun started processes on this machine.

    Otherwise all of them would start on the first GPU, and each would hold some of its memory.
    """
    rank, devices = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not rank.isdecimal() or not devices:
        return name
    if name != "cuda":
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            raise UserError(
                f"device {name!r} would be shared by all processes on this machine: give cuda, and "
                "each process uses its own GPU"
            )
        return name
    return f"cuda:{int(rank) % devices}"


def cores() -> int:
    """Return how many cores this process may use, given its affinity and its container's limit."""
    has_affinity = hasattr(os, "sched_getaffinity")
    mine = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(mine, _quota(Path("/sys/fs/cgroup")))))


def _quota(groups: Path) -> float:
    """Return the container's CPU limit in cores (cgroup v2 or v1); infinite if there is none.

    torch does not see this limit: it counts the cores of the host.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((groups / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota.isdecimal() else math.inf  # no limit: "max" or -1
    return math.inf


def has_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(probe and probe())
    return False


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "STATUS_ALLOC_FAILED",
    # cuDNN's errors when it finds no memory for its workspace.
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that the device or the host is out of memory."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in _OUT_OF_MEMORY
    )


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the host into one line with advice.

    Raises:
        UserError: the device or the host ran out of memory in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise UserError(f"out of memory in {what}: {advice}") from e
        raise


def free_cached_memory() -> None:
    """Release the GPU memory that the allocator caches, so that other processes can use it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def finest(device: torch.device) -> torch.dtype:
    """Return the most precise floating type of a device: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to the device without waiting for it, in a dtype that the device supports."""
    if tensor.dtype == torch.float64:
        tensor = tensor.to(finest(device))
    # On other devices a non-blocking copy may read memory that has been freed.
    return tensor.to(device, non_blocking=device.type == "cuda")


def autocasts(device: torch.device) -> bool:
    """Tell whether autocast is on for a device; False where torch has no autocast for it."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def in_fp16(device: torch.device) -> bool:
    """Tell whether passes run in float16, whose smallest positive number is 6e-8."""
    return autocasts(device) and torch.get_autocast_dtype(device.type) == torch.float16


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off, so that operations use their tensors' types."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def rounding(device: torch.device) -> float:
    """Return the gap, relative to the largest logit, at which logits keep their float32 order."""
    if autocasts(device):
        return 0.05
    return 0.01 if _multiplies_in_tf32(device) else 0.0


def _multiplies_in_tf32(device: torch.device) -> bool:
    """Tell whether a GPU multiplies in TF32 (10-bit mantissa), cuDNN's default for convolutions."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return any(getattr(place, name) != off for place, name, off in _tf32_places())


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute decisive results in full float32: without autocast and, on a GPU, without TF32."""
    tf32 = _without_tf32() if device.type == "cuda" else nullcontext()
    with tf32, without_autocast(device):
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    try:
        older = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set the newer switches independently
        older = None
    places = _tf32_places()
    before = [getattr(place, name) for place, name, _ in places]
    # Set the older switches too, and first, because they set the newer ones. If the two disagree,
    # torch refuses to read the older ones, as torch.backends.cudnn.flags and the compiler do.
    if older:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    for place, name, off in places:
        setattr(place, name, off)
    try:
        yield
    finally:
        if older:
            cudnn.allow_tf32 = older[0]
            torch.set_float32_matmul_precision(older[1])
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _tf32_places() -> list[tuple[Any, str, object]]:
    """Return the TF32 switches as (object, attribute, value that turns TF32 off)."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return [(place, "fp32_precision", "ieee") for place in (cudnn.conv, cudnn.rnn, matmul)]
    return [(place, "allow_tf32", False) for place in (cudnn, matmul)]


@functools.cache
def casts_lose_gradients(device: torch.device) -> bool:
    """Tell whether autocast caches the weight casts of a pass without gradients.

    A later pass would get no weight gradient through them. Releases up to 2025 cache them
    (pytorch/pytorch#112583), later ones do not. Call this under autocast.
    """
    weight, x = (torch.zeros(1, 1, device=device) for _ in range(2))
    weight.requires_grad_()
    with torch.no_grad():
        torch.nn.functional.linear(x, weight)
    with torch.enable_grad():
        return not torch.nn.functional.linear(x, weight).requires_grad


def drop_casts_without_gradients(device: torch.device) -> None:
    """Under autocast, drop an attack's cached casts if they would block the update's gradients."""
    if autocasts(device) and casts_lose_gradients(device):
        torch.clear_autocast_cache()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return a context in which forward passes run in ``dtype``; float32 needs no autocast."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


@functools.cache
def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for reuse, once per process; elsewhere do nothing.

    By default it returns each large buffer to the system, and the next step pays for that in page
    faults: a tenth to a third of the time of a step on large batches.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    # glibc up to 2.34 accepts at most 32 MiB, and a refused value changes nothing. If both are
    # refused, setting only the trim threshold would stop the mmap threshold from adapting itself.
    if any(libc.mallopt(m_mmap_threshold, size) for size in (1 << 30, 32 << 20)):
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
