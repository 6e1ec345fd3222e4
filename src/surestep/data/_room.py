"""Whether images fit into memory: a process that takes more is killed without a message."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from surestep.errors import UserError

ADVICE = (
    "give a smaller image_size (--image-size), or give surestep.fit a Dataset or DataLoader that "
    "reads images as they are needed (docs/python.md)"
)
"""What to do if they do not."""


def check_room(count: int, shape: tuple[int, ...], held: int) -> None:
    """Refuse images for which this machine lacks memory, if each local process holds them all.

    Args:
        count: number of images.
        shape: (C, H, W) of each, one byte per value.
        held: bytes of them that each process already holds.

    Raises:
        UserError: they take more bytes than are available.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun sets it
    sharing = max(1, int(processes)) if processes.isdecimal() else 1
    needed, room = count * math.prod(shape), available() + sharing * held
    if sharing * needed > room:
        each = f" in each of {sharing} processes" if sharing > 1 else ""
        raise UserError(
            f"{count:,} images of {' x '.join(map(str, shape))} take {_gib(needed)} of "
            f"memory{each}, but {_gib(room)} is available: {ADVICE}"
        )


def available(root: Path = Path("/")) -> float:
    """Return how many bytes of memory the machine and the container's limit leave.

    Files that the system caches count as free. Infinite where the system (not Linux) does not say.
    """
    groups = root / "sys/fs/cgroup"
    return min(
        _of_machine(root / "proc/meminfo"),
        _of_container(groups, "memory.max", "memory.current", ""),
        _of_container(
            groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        ),
    )


def _of_machine(file: Path) -> float:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return int(found[1]) * 1024 if found else math.inf


def _of_container(group: Path, limit: str, usage: str, prefix: str) -> float:
    """Return what a memory limit (cgroup v2 or v1) leaves."""
    try:
        most, used, stat = ((group / name).read_text() for name in (limit, usage, "memory.stat"))
    except OSError:
        return math.inf
    if not most.strip().isdecimal():  # no limit: "max"
        return math.inf
    cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
    return int(most) - int(used) + sum(map(int, cached))


def _gib(size: float) -> str:
    return f"{max(size, 0) / 2**30:.1f} GiB"
