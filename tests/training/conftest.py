from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import merged
from torch import Tensor, nn
from torch.utils.data import DataLoader

import surestep
from surestep import files, methods
from surestep.methods import Method
from surestep.training import FitResult, TrainStep, checkpoint, preparing, validating

TIMES = {"images_per_second", "train_seconds", "val_seconds"}
THREAT = surestep.Linf(0.1)


class Stopped(Exception):
    """Thrown into a run, as a crash would be."""


def make_net(*, seed: int = 0, norm: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a small net with batch statistics, and with weights that have a memory format."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
        if not norm:
            del layers[1]
        return nn.Sequential(*layers).to(dtype)


def make_data(n: int = 64) -> tuple[Tensor, Tensor]:
    """Make noisy stripes of three kinds; no two images are alike."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(n) % 3
    x = torch.rand(n, 1, 8, 8, generator=generator) * 0.5
    for k in range(3):
        x[y == k, :, k::3] += 0.5
    return x, y


def make_method(slug: str, threat: surestep.ThreatModel = THREAT, **params: Any) -> Method:
    """Build a method, small."""
    method = methods.build(slug, threat, {**merged("SMALL").get(slug, {}), **params})
    method.progress = methods.Progress(images=64)
    return method


@contextmanager
def nothing_random() -> Iterator[None]:
    """Let the random draws of a step be constants: two processes draw apart otherwise.

    Those of uniform points differ within a step: between two that are one there is no line.
    """
    take, shares = TrainStep.__call__, itertools.repeat(0.7)

    def step(self: TrainStep, *batch: Any) -> Any:
        nonlocal shares
        shares = itertools.cycle((0.7, 0.1, 0.9))
        try:
            return take(self, *batch)
        finally:
            shares = itertools.repeat(0.7)

    def constant(draw: Callable[..., Tensor], share: float) -> Callable[..., Tensor]:
        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            value = draw(*args, **kwargs)
            return value if "generator" in kwargs else torch.full_like(value, share)

        return drawn

    uniform = Tensor.uniform_

    def constant_uniform(
        self: Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any
    ) -> Tensor:
        # Initial weights are drawn with a generator, if only None.
        if kwargs:
            return uniform(self, low, high, **kwargs)
        return self.fill_(low + next(shares) * (high - low))

    with pytest.MonkeyPatch.context() as patch:
        for name, share in (("randn_like", 0.3), ("rand_like", 0.7), ("randn", 0.3), ("rand", 0.7)):
            patch.setattr(torch, name, constant(getattr(torch, name), share))
        patch.setattr(TrainStep, "__call__", step)
        patch.setattr(Tensor, "uniform_", constant_uniform)
        patch.setattr(Tensor, "bernoulli_", lambda self, p=0.5: self.fill_(1.0))
        for name in ("dropout", "dropout2d"):
            patch.setattr(torch.nn.functional, name, lambda x, *_, **__: 0.9 * x)
        yield


def train(
    method: str | Method = "standard",
    *,
    out: Path | None = None,
    model: nn.Module | None = None,
    data: Any = None,
    **settings: Any,
) -> FitResult:
    """Run ``fit`` on something tiny: 5 steps an epoch, 6 images held out."""
    defaults = {
        "epochs": 2,
        **({} if isinstance(data, DataLoader) else {"batch_size": 10}),
        "lr": 0.05,
        "engine": "reference",
        "val_attacks": ("fgsm", "pgd-2"),
        "select": "last",
        "quiet": True,
    }
    return surestep.fit(
        make_net() if model is None else model,
        make_data() if data is None else data,
        make_method(method) if isinstance(method, str) else method,
        out=out,
        **{**defaults, **settings},
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [without_times(json.loads(line)) for line in lines]


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in TIMES}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def state_of(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint without the times in it."""
    state = files.load_tree(checkpoint.found(folder / "checkpoints")[-1])
    state["progress"] = {k: v for k, v in state["progress"].items() if "seconds" not in k}
    del state["progress"]["history"]
    return state


def equal(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and other values are the same to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an uninterrupted run; each is made once."""
    made: dict[str, Path] = {}

    def run(name: str, train: Callable[..., Any]) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            train(out=made[name])
        return made[name]

    return run


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of this folder, since test modules cannot import from each other."""
    return SimpleNamespace(
        net=make_net,
        data=make_data,
        method=make_method,
        train=train,
        rows=rows,
        without_times=without_times,
        snapshot=snapshot,
        weights=weights,
        same_weights=same_weights,
        state_of=state_of,
        equal=equal,
        threat=THREAT,
        Stopped=Stopped,
        nothing_random=nothing_random,
    )


@pytest.fixture(scope="session")
def stopping() -> Callable[..., None]:
    """Return ``stopping(after, run)``: do ``run`` and crash it once ``after`` steps are done."""

    def stop(after: int, run: Callable[[], object]) -> None:
        done = 0
        take = TrainStep.__call__

        def step(self: TrainStep, *batch: Any) -> Any:
            nonlocal done
            if done == after:
                raise Stopped
            done += 1
            return take(self, *batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainStep, "__call__", step)
            with pytest.raises(Stopped):
                run()

    return stop


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images validation attacks at a time, where there is no room for more."""
    found, evaluate = [], validating.evaluate

    def judge(*args: Any, batch_size: int, **kwargs: Any) -> Any:
        found.append(batch_size)
        return evaluate(*args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(validating, "evaluate", judge)
    monkeypatch.setattr(preparing, "ROOM_TO_JUDGE", 0)
    return found
