"""Find the fastest engine by timing: what ``engine="auto"`` does."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of
from surestep.devices import out_of_memory
from surestep.methods import Method, Progress
from surestep.randomness import forked_rng
from surestep.training.engine import Engine, make_optimizer, make_step

MIN_STEPS = 100
"""Fewest training steps for which the measurement pays off."""
MARGIN = 1.2
"""How many times faster than the expected engine another must be to replace it. Without a margin,
engines of similar speed would swap by chance, and two runs with one seed would differ."""
_LONG = 0.1
_TIMED = {"cuda": 0.2, "mps": 0.2}
"""Seconds to time at least, by kind of device: a step on a GPU may take only a few ms."""


@dataclass(frozen=True)
class Pick:
    """The engine to use, by its names in the settings.

    Attributes:
        engine: "fast" or "reference".
        precision: "fp32", "bf16" or "fp16".
        seconds: seconds per step by (engine, precision); clearly slower ones were timed once.
        images: images per timed step.
    """

    engine: str
    precision: str
    seconds: Mapping[tuple[str, str], float]
    images: int

    def __str__(self) -> str:
        chosen = (self.engine, self.precision)
        others = ", ".join(
            f"{engine} {precision} {s / self.seconds[chosen]:.1f}x"
            for (engine, precision), s in sorted(self.seconds.items(), key=lambda pair: pair[1])
            if (engine, precision) != chosen
        )
        return (
            f"engine: {self.engine} in {self.precision}, {1000 * self.seconds[chosen]:.0f} ms a "
            f"step of {self.images} images" + (f" (others: {others})" if others else "")
        )


def pick_engine(
    model: nn.Module, method: Method, shape: torch.Size, batch_size: int, precision: str = "auto"
) -> Pick | None:
    """Time a few steps with each engine, on copies and random images, and return the fastest.

    The expected engine (``Engine.choose``) is kept unless another is clearly faster. Model, method
    and random state are left as they were. Returns None for a model that cannot be copied.

    Args:
        model: in train mode, on its device.
        method: what a step minimises.
        shape: shape of one image.
        batch_size: images per training step; slow models are timed on fewer.
        precision: the only precision to try; "auto" tries the expected one and float32.
    """
    try:
        copy.deepcopy(model)
    except Exception:  # weight_norm, or a model that holds a lock or a tensor of an earlier pass
        return None
    device = device_of(model)
    expected = "fast", Engine.choose("fast", precision, device).precision_name
    precisions = [expected[1]] if precision != "auto" else [expected[1], "fp32"]
    candidates = dict.fromkeys((e, p) for p in precisions for e in ("fast", "reference"))
    # Only this process runs the trial, so methods must not communicate with others.
    with processes.alone(), forked_rng(device):
        low, _ = method.threat.bounds
        x = low + method.threat.span * torch.rand(batch_size, *shape, device=device)
        y = torch.randint(count_classes(model, x[:1]), (batch_size,), device=device)
        n, seconds = _enough(model, method, x, y, expected)
        tried = {expected: seconds}
        for candidate in candidates:
            if candidate != expected:
                best = min(tried.values())
                try:
                    found = _time(model, method, x[:n], y[:n], candidate, give_up=1.5 * best)
                except (RuntimeError, MemoryError) as e:
                    if not out_of_memory(e):
                        raise
                    continue  # float32 may not fit where the expected engine does
                tried[candidate] = found
    fastest = min(tried, key=lambda c: tried[c])
    chosen = fastest if tried[fastest] * MARGIN < seconds else expected
    return Pick(*chosen, tried, n)


def _enough(
    model: nn.Module, method: Method, x: Tensor, y: Tensor, engine: tuple[str, str]
) -> tuple[int, float]:
    """Return how many images, up to the batch, make a step long enough to time, and its seconds."""
    n = min(4, len(x))
    while True:
        seconds = _time(model, method, x[:n], y[:n], engine)
        if n == len(x) or seconds > _LONG:
            return n, seconds
        n = min(4 * n, len(x))


def _time(
    model: nn.Module,
    method: Method,
    x: Tensor,
    y: Tensor,
    engine: tuple[str, str],
    give_up: float = float("inf"),
) -> float:
    """Return the seconds per step: the best of two cycles or more, after a warm-up cycle."""
    net, chosen = copy.deepcopy(model), Engine.choose(*engine, x.device)
    method = copy.deepcopy(method)
    method.progress = Progress(images=len(x))
    step = make_step(net, method, make_optimizer("sgd", net.parameters(), lr=0.0), chosen)

    def cycle() -> float:
        start = time.perf_counter()
        for _ in range(method.cycle):
            # Reading the loss waits for the device.
            float(step(x, y, torch.arange(len(x), device=x.device)).loss)
        return (time.perf_counter() - start) / method.cycle

    cycle()  # to warm up
    best, timed, cycles = float("inf"), 0.0, 0
    while cycles < 2 or timed < _TIMED.get(x.device.type, 0.0):
        seconds = cycle()
        best, timed, cycles = min(best, seconds), timed + seconds * method.cycle, cycles + 1
        if seconds > give_up:
            break
    return best
