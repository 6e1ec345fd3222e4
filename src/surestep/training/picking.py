"""Which engine is fastest here, found by trying: what ``engine="auto"`` does."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of, forked_rng
from surestep.devices import out_of_memory
from surestep.methods import Method
from surestep.training.engine import Engine, make_optimizer, make_step

MIN_STEPS = 100
"""Shorter training is over before a measurement pays."""
MARGIN = 1.2
"""How much faster another engine must be than the expected one: near ones would swap by chance,
and two runs of one seed would differ."""
_LONG = 0.1


@dataclass(frozen=True)
class Pick:
    """The engine to take, by the names of the settings.

    Attributes:
        engine: "fast" or "reference".
        precision: "fp32", "bf16" or "fp16".
        seconds: of a step, by engine and precision; those dropped early were tried once.
        images: of the measured steps.
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
    """Time a few steps of copies with each engine, on random images, and return the fastest.

    The expected one (``Engine.choose``) is kept unless another is clearly faster. Model, method
    and random state are left as they were.

    A model that cannot be copied is not tried: then None is returned.

    Args:
        model: in train mode, on its device.
        method: what a step minimises.
        shape: of one image.
        batch_size: of the training steps; slow models are timed on fewer images.
        precision: the only one to try; "auto": the expected one and float32.
    """
    try:
        copy.deepcopy(model)
    except Exception:  # of weight_norm, of models that hold a lock or a tensor of an earlier pass
        return None
    device = device_of(model)
    expected = "fast", Engine.choose("fast", precision, device).precision_name
    precisions = [expected[1]] if precision != "auto" else [expected[1], "fp32"]
    candidates = dict.fromkeys((e, p) for p in precisions for e in ("fast", "reference"))
    # Methods may share what they find between processes, and only this one tries.
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
    """Find a number of images, up to the batch, that a step does not take long for."""
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
    """Return the seconds of a step: the better of two cycles, after one to prepare the kernels."""
    net, chosen = copy.deepcopy(model), Engine.choose(*engine, x.device)
    step = make_step(
        net,
        copy.deepcopy(method),
        make_optimizer("sgd", net.parameters(), lr=0.0),
        chosen,
    )
    best = float("inf")
    for i in range(3):
        start = time.perf_counter()
        for _ in range(method.cycle):
            # Reading a number waits for the device.
            float(step(x, y, torch.arange(len(x), device=x.device)).loss)
        seconds = (time.perf_counter() - start) / method.cycle
        best = min(best, seconds) if i else best
        if i and seconds > give_up:
            break
    return best
