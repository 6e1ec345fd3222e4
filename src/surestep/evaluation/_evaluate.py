"""Accuracy under attack: per sample the worst case, never the smallest mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from surestep.attacks.core import attacking, check_inputs, forward_logits, round_up
from surestep.data import Batches, Images, as_images
from surestep.errors import UserError
from surestep.evaluation import suite
from surestep.threat import ThreatModel

DEFAULT_ATTACKS = ("fgsm", "pgd-100", "pgd-100-margin")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Accuracies are shares in [0, 1].

    Attributes:
        clean_accuracy: share of images classified right as they are.
        robust_accuracy: by attack, the share right both clean and under that attack.
        worst_case_accuracy: share that no attack of the suite broke, taken per image.
        n: number of images.
        intervals: 95% Wilson intervals of these accuracies by name.
        seconds: wall time of the whole.
        attack_seconds: wall time by attack.
        threat: norm, eps and data range in words.
    """

    clean_accuracy: float
    robust_accuracy: dict[str, float]
    worst_case_accuracy: float
    n: int
    intervals: dict[str, tuple[float, float]]
    seconds: float
    attack_seconds: dict[str, float]
    threat: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        values = asdict(self)
        values["intervals"] = {k: list(v) for k, v in self.intervals.items()}
        return values


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95% by default)."""
    if n == 0:
        return (0.0, 1.0)
    p, z2 = right / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def evaluate(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    *,
    batch_size: int = 500,
    n: int | None = None,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    The model is judged in eval mode and left as it was found. An image counts as robust to an
    attack when it is right clean and at the attack's point. Only images that are right clean are
    attacked. The global random state is left as it was.

    Args:
        model: returns logits (N, K) for images in the threat model's range.
        data: a pair of tensors (x, y), a Dataset or a DataLoader of such pairs.
        threat: norm, radius and data range.
        attacks: names, see ``surestep.evaluation.suite``.
        batch_size: of the attacks.
        n: only the first n images; all by default.
        seed: of the random starts.
        precision: bfloat16 or float16 crafts the perturbations under autocast. Whether a point is
            misclassified is decided in float32 in any case.
        progress: called after each batch with images done, images in all (0 if unknown) and the
            worst-case accuracy so far.

    Raises:
        UserError: unknown attack, no data, or images, labels or model that cannot be judged.
    """
    by_name = suite.parse_all(attacks, threat)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches, total = _batches(data, batch_size, n, device)
    right: dict[str, list[Tensor]] = {name: [] for name in ("clean", *by_name)}
    seconds = dict.fromkeys(by_name, 0.0)
    start, done, survived = time.perf_counter(), 0, 0
    cuda = [device.index or 0] if device.type == "cuda" else []
    with attacking(model) as inner, torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        for x, y in batches:
            check_inputs(inner, x, y, threat)
            clean = _right(inner, x, y)
            # Those that are right; others only to fill up to a batch size met before.
            attacked = round_up(int(clean.sum()), len(x))
            rows = clean.int().argsort(descending=True, stable=True)[:attacked]
            worst = clean.clone()
            right["clean"].append(clean)
            for name, attack in by_name.items():
                begin = time.perf_counter()
                ok = clean.clone()
                if len(rows):
                    with _autocast(device, precision):
                        x_adv = attack(inner, x[rows], y[rows])
                    ok[rows] &= _right(inner, x_adv, y[rows])
                right[name].append(ok)
                worst &= ok
                seconds[name] += time.perf_counter() - begin
            done += len(x)
            survived += int(worst.sum())
            if progress:
                progress(done, total, survived / done)
    if not done:
        raise UserError("there is no image to evaluate on")
    counts = {name: int(torch.cat(parts).sum()) for name, parts in right.items()}
    counts["worst case"] = survived
    return Evaluation(
        clean_accuracy=counts["clean"] / done,
        robust_accuracy={name: counts[name] / done for name in by_name},
        worst_case_accuracy=survived / done,
        n=done,
        intervals={name: wilson_interval(c, done) for name, c in counts.items()},
        seconds=time.perf_counter() - start,
        attack_seconds=seconds,
        threat={
            "norm": type(threat).__name__.lower(),
            "eps": threat.eps,
            "bounds": list(threat.bounds),
        },
    )


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return forward_logits(model, x).argmax(1) == y


def _autocast(device: torch.device, dtype: torch.dtype):
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def _batches(
    data: Any, batch_size: int, n: int | None, device: torch.device
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Return the batches on the device, and the number of images if it is known (else 0)."""
    if isinstance(data, Dataset) and not isinstance(data, Images):
        data = DataLoader(data, batch_size)
    if isinstance(data, DataLoader):
        return _first(data, n, device), n or 0
    images = as_images(data)
    images = images if n is None else images.first(n)
    source = Batches(images, batch_size, shuffle=False, device=device)
    return ((x, y) for x, y, _ in source.epoch(0)), len(images)


def _first(
    loader: Iterable[Any], n: int | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    left = math.inf if n is None else n
    for x, y in loader:
        if left <= 0:
            return
        take = int(min(left, len(x)))
        left -= take
        yield x[:take].to(device), y[:take].to(device)
