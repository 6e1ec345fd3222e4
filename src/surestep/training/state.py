"""The progress of a run as stored in a checkpoint, and the means of the current epoch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from surestep import processes


def has_stopped(history: Sequence[Mapping[str, Any]]) -> bool:
    """Tell from the rows of a history whether ``on_epoch`` ended the run."""
    return bool(history) and bool(history[-1].get("stopped"))


@dataclass
class RunState:
    """The progress of a run: its counters and history, as in a checkpoint.

    Attributes:
        step: steps taken.
        epoch: epochs finished.
        best_epoch: the epoch whose weights are selected, counted from 1; 0 if none is finished.
        train_seconds: time of the training steps, without validation and checkpoints.
        history: a row for each finished epoch, as in ``metrics.jsonl``.
    """

    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    train_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Worst-case accuracies of the validated epochs."""
        return [row["val_worst_case"] for row in self.history if "val_worst_case" in row]


class EpochMeans:
    """Means over an epoch, summed on the device, which nothing waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.images = 0
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # a step may lack some of the terms
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, number: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Add a step: its number, its number of images, and its losses and other values by name."""
        self.images += images
        for name, value in values.items():
            total = self.totals.get(name)
            self.totals[name] = value.clone() if total is None else total + value
            self.counts[name] = self.counts.get(name, 0) + 1
        bad = ~torch.isfinite(values["loss"]) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, number, self.bad_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint within an epoch must hold."""
        totals = {k: v.cpu() for k, v in self.totals.items()}
        return {"images": self.images, "totals": totals, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.images, self.counts = state["images"], state["counts"]
        self.totals = {k: v.to(self.device) for k, v in state["totals"].items()}

    def restore(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Restore the states that a run's processes saved, perhaps on another number of them."""
        same = len(parts) == processes.world_size()
        self.load_state_dict(parts[processes.rank()] if same else self._shared_out(parts))

    @staticmethod
    def _shared_out(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return an equal share of the states for each of the present processes."""
        totals, counts = {}, {}
        for name in dict.fromkeys(name for part in parts for name in part["totals"]):
            those = [part for part in parts if name in part["totals"]]
            totals[name] = sum(part["totals"][name] for part in those) / len(those)
            counts[name] = statistics.mean(part["counts"][name] for part in those)
        images = round(sum(part["images"] for part in parts) / processes.world_size())
        return {"images": images, "totals": totals, "counts": counts}

    def local(self) -> dict[str, float]:
        """Return the means of this process's steps."""
        return {k: float(v) / self.counts[k] for k, v in self.totals.items()}

    def of_all(self) -> dict[str, float]:
        """Return the means over all processes, which have equal shares of each batch."""
        parts = gather_object([self.local()])
        names = dict.fromkeys(name for part in parts for name in part)
        return {k: statistics.fmean(part[k] for part in parts if k in part) for k in names}
