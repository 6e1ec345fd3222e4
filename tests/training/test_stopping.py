"""Runs that are asked to stop: they save where they are, and go on as if nothing had been."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from rich.file_proxy import FileProxy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from surestep import UserError
from surestep.training import TrainStep, checkpoint, loaders, loop, stopping, validating

ENDS = {signal.SIGTERM: (SystemExit, "143"), signal.SIGINT: (KeyboardInterrupt, None)}


class Noisy(Dataset):
    """A Dataset that changes its images anew each time, from torch's own random state."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return (x + 0.05 * torch.rand_like(x)).clamp(0, 1), self.y[index]


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return ``asking(after, run)``: do ``run``, which a signal asks to stop in its step ``after``.

    No step must follow it.
    """

    def ask(after: int, run: Callable[[], object], number: int = signal.SIGTERM) -> None:
        done, take = 0, TrainStep.__call__

        def step(self: TrainStep, *batch: Any) -> Any:
            nonlocal done
            done += 1
            assert done <= after
            result = take(self, *batch)
            if done == after:
                os.kill(os.getpid(), number)
            return result

        error, said = ENDS[signal.Signals(number)]
        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", step)
            with pytest.raises(error, match=said):
                run()

    return ask


def same(tiny: Any, out: Path, whole: Path) -> None:
    assert tiny.weights(out) == tiny.weights(whole)
    assert tiny.rows(out) == tiny.rows(whole)
    assert tiny.equal(tiny.state_of(out), tiny.state_of(whole))


# Five steps an epoch: within the first, its last, the first of the second, the last of all.
@pytest.mark.parametrize(
    ("kind", "after"),
    [
        *itertools.product(
            ["images", "average and state", "Dataset", "DataLoader", "replayed"], [1, 3, 5, 6, 10]
        ),
        ("workers", 3),
        ("persistent workers", 7),
    ],
)
def test_a_run_goes_on_where_it_was(tiny, asking, whole, tmp_path, kind, after):
    def train(**place: Any) -> Any:
        data, settings = tiny.data(), {}
        if kind in ("Dataset", "workers"):
            data = Noisy(*tiny.data(58))
            settings["workers"] = 2 * (kind == "workers")
        elif kind == "persistent workers":
            rest = {"num_workers": 1, "persistent_workers": True}
            data = DataLoader(Noisy(*tiny.data(50)), 10, **rest)
        elif kind in ("DataLoader", "replayed"):
            own = torch.Generator().manual_seed(3)
            data = DataLoader(Noisy(*tiny.data(50)), 10, shuffle=True, generator=own)
        elif kind == "average and state":
            settings = {"ema": 0.9, "select": "best", "augment": "crop-flip"}
        if not isinstance(data, tuple):
            settings["validation"] = tiny.data(8)
        method = {"replayed": "free", "average and state": "fgsm-mep"}.get(kind, "sat-r2")
        return tiny.train(method, data=data, **settings, **place)

    asking(after, lambda: train(out=tmp_path / "run"))
    assert checkpoint.found(tmp_path / "run" / "checkpoints")[-1].stem == f"step-{after:08d}"
    train(out=tmp_path / "run", resume=True)
    same(tiny, tmp_path / "run", whole(kind, train))


def test_other_data_than_it_was_begun_with(tiny, asking, tmp_path):
    """Epochs of other lengths: where in one it was would say nothing."""

    def train(images: int, **place: Any) -> Any:
        pairs = DataLoader(Noisy(*tiny.data(images)), 16)
        return tiny.train(data=pairs, validation=tiny.data(8), **place)

    asking(7, lambda: train(64, out=tmp_path / "run"))
    said = "has epochs of 4 steps, but these data give 8: resume with th"
    with pytest.raises(UserError, match=said):
        train(128, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("n", "said"),
    [
        (52, "has 50 training images in memory, but these data give 52: resume with the data"),
        (80, "has epochs of 5 steps, but these data give 8"),
    ],
)
def test_other_images_than_it_was_begun_with(
    tiny, asking, tmp_path, monkeypatch, processes, n, said
):
    """Even where they make as many steps an epoch, or go on in another number of processes."""

    def train(n: int, **place: Any) -> Any:
        return tiny.train(data=tiny.data(n), validation=tiny.data(8), **place)

    asking(2, lambda: train(50, out=tmp_path / "run"))
    load = checkpoint.load_newest

    def of_processes(*args: Any) -> Any:
        state = load(*args)
        return {**state, "rng": state["rng"] * processes}

    monkeypatch.setattr(checkpoint, "load_newest", of_processes)
    with pytest.raises(UserError, match=said):
        train(n, out=tmp_path / "run", resume=True)
    assert len(train(50, out=tmp_path / "run", resume=True).history) == 2


def test_again_and_again(tiny, asking, tmp_path):
    def train(**place: Any) -> Any:
        return tiny.train("sat-r3", data=Noisy(*tiny.data()), validation=tiny.data(8), **place)

    train(out=tmp_path / "whole")
    asking(2, lambda: train(out=tmp_path / "run"))
    for _ in range(3):
        asking(1, lambda: train(out=tmp_path / "run", resume=True))
    train(out=tmp_path / "run", resume=True)
    same(tiny, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("number", ENDS)
def test_during_validation(tiny, whole, tmp_path, monkeypatch, number, epoch):
    def train(**place: Any) -> Any:
        # A partial epoch at the end.
        return tiny.train("sat-r2", epochs=1.4, select="best", **place)

    uninterrupted = whole("validated", train)
    evaluate, calls = validating.evaluate, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == epoch:
            torch.rand(3)
            os.kill(os.getpid(), number)
        return evaluate(*args, **kwargs)

    error, said = ENDS[number]
    with monkeypatch.context() as patch:
        patch.setattr(validating, "evaluate", interrupted)
        with pytest.raises(error, match=said):
            train(out=tmp_path / "run")
    assert calls == epoch
    stopped = checkpoint.found(tmp_path / "run" / "checkpoints")[-1]
    assert stopped.stem == f"step-{(5, 7)[epoch - 1]:08d}"
    train(out=tmp_path / "run", resume=True)
    same(tiny, tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "error",
    [UserError("out of memory in an attack: lower batch_size (10)"), OSError("a drive is gone")],
    ids=["memory", "data"],
)
def test_a_validation_that_fails_loses_no_epoch(tiny, tmp_path, monkeypatch, error):
    """Memory may be enough for the steps, and not for the attacks; data may become unreadable."""
    tiny.train(out=tmp_path / "whole")

    def full(*_: Any, **__: Any) -> Any:
        torch.rand(3)
        raise error

    told: list[dict[str, bool]] = []
    with monkeypatch.context() as patch:
        patch.setattr(validating, "evaluate", full)
        patch.setattr(stopping.StopRequest, "exchange", lambda *_, **what: told.append(what))
        with pytest.raises(type(error), match=str(error)[:10]):
            tiny.train(out=tmp_path / "run")
    assert told == [{"failed": True}]  # other processes would wait
    assert checkpoint.found(tmp_path / "run" / "checkpoints")[-1].stem == f"step-{5:08d}"
    tiny.train(out=tmp_path / "run", resume=True)
    same(tiny, tmp_path / "run", tmp_path / "whole")


def test_what_is_said(tiny, asking, tmp_path, capsys):
    out = tmp_path / "run"
    asking(3, lambda: tiny.train(out=out, quiet=False), signal.SIGINT)
    assert f"stopped at step 3 of 10: {out} is saved" in capsys.readouterr().err


def test_signals_do_what_they_did_before_and_after(tiny, tmp_path, monkeypatch):
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in ENDS]

    before, within, take = handlers(), [], TrainStep.__call__

    def step(self: TrainStep, *batch: Any) -> Any:
        within.append(handlers() != before)
        return take(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", step)
    tiny.train()
    assert not any(within)  # nothing could be saved
    tiny.train(out=tmp_path / "run")
    assert all(within[10:])
    assert handlers() == before


def test_in_a_thread(tiny, tmp_path):
    """Signals are heard by a process's first thread alone."""
    thread = threading.Thread(target=lambda: tiny.train(out=tmp_path / "run"))
    thread.start()
    thread.join()
    assert len(tiny.rows(tmp_path / "run")) == 2


class TestCtrlC:
    def test_a_second_one_interrupts(self, monkeypatch):
        now = [10.0]
        monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
        stop = stopping.StopRequest()
        with stop.handling_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            now[0] += 0.3  # the launcher's copy of the same
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_ignored_signals_stay_ignored(self):
        """As a shell has it for what it runs in the background."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            stop = stopping.StopRequest()
            with stop.handling_signals():
                os.kill(os.getpid(), signal.SIGINT)
                assert stop.number == 0
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_second_signal_does_not_interrupt_the_saving(self):
        stop = stopping.StopRequest()

        def validate() -> None:
            with stop.at_once():
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)

        with stop.handling_signals(), pytest.raises(stopping.StopRequested):
            validate()
        assert stop.number == signal.SIGTERM

    def test_heard_at_the_very_end_it_still_counts(self, tiny, tmp_path, monkeypatch):
        """The run is done and whole; what follows it in a script must not begin."""
        record = loop.Trainer._record

        def late(self, row):
            record(self, row)
            if row["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(loop.Trainer, "_record", late)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(out=tmp_path / "run")
        assert len(tiny.rows(tmp_path / "run")) == 2

    def test_sigterm_after_it_does_not(self):
        stop = stopping.StopRequest()
        with stop.handling_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("kind", ["Dataset", "DataLoader", "validation"])
def test_workers_outlive_a_signal_to_the_whole_group(tiny, tmp_path, kind):
    """As a cluster's manager sends it; each worker tells, after it, that it is still there."""
    begun = tmp_path / "begun"

    class Killing(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if torch.utils.data.get_worker_info() is not None:
                for number in ENDS:
                    os.kill(os.getpid(), number)
            return super().__getitem__(index)

    data, validation = Killing(*tiny.data(40)), tiny.data(8)
    loader = DataLoader(data, 10, num_workers=1, worker_init_fn=lambda _: begun.touch())
    if kind == "DataLoader":
        data = loader
    elif kind == "validation":
        data, validation = tiny.data(40), loader
    result = tiny.train(data=data, validation=validation, epochs=1, workers=2 * (kind == "Dataset"))
    assert result.history[0]["step"] == 4
    assert begun.exists() is (kind != "Dataset")  # the loader's own function is called, too
    assert loader.worker_init_fn.__name__ == "<lambda>"


def test_a_loader_is_told_its_epoch(tiny, asking, tmp_path):
    """Samplers and data sets that shuffle by epoch, as torch's DistributedSampler does."""
    seen: list[int] = []

    class Told(Noisy):
        def set_epoch(self, epoch: int) -> None:
            seen.append(epoch)

    def train(**place: Any) -> Any:
        data, settings = Told(*tiny.data()), {"validation": tiny.data(8), "epochs": 3}
        return tiny.train(data=DataLoader(data, 10), **settings, **place)

    train()
    assert sorted(set(seen)) == [0, 1, 2]
    seen.clear()
    asking(8, lambda: train(out=tmp_path / "run"))
    assert max(seen) == 1
    seen.clear()
    train(out=tmp_path / "run", resume=True)
    assert sorted(set(seen)) == [1, 2]


def test_a_dataset_is_told_its_epoch_though_images_are_held_out(tiny, tmp_path, monkeypatch):
    """Also where a resume begins with validation, whose images may depend on it."""

    class Told(Noisy):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return x / (2 + self.epoch), y

    def train(**place: Any) -> Any:
        return tiny.train(data=Told(*tiny.data()), **place)

    train(out=tmp_path / "whole")
    evaluate, seen = validating.evaluate, []

    def failing(model: Any, held_out: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(held_out.dataset.epoch)
        if len(seen) == 2:
            raise UserError("cannot be judged")
        return evaluate(model, held_out, *args, **kwargs)

    monkeypatch.setattr(validating, "evaluate", failing)
    with pytest.raises(UserError, match="cannot be judged"):
        train(out=tmp_path / "run")
    train(out=tmp_path / "run", resume=True)
    assert seen == [0, 1, 1]
    same(tiny, tmp_path / "run", tmp_path / "whole")


def test_a_worker_prints_past_the_bar(monkeypatch):
    """The bar's lock, if it was held when the worker was forked, is held there for good."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    plain = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, FileProxy(Console(), getattr(sys, name)))
    loaders._begin_worker(None, 0)
    assert (sys.stdout, sys.stderr) == plain
    loaders._begin_worker(None, 0)  # without a bar
    assert (sys.stdout, sys.stderr) == plain


def test_workers_of_a_loader_that_accelerate_has_wrapped(tiny):
    """The loader inside starts them; the user's own stays as it is."""
    inner = DataLoader(Noisy(*tiny.data(20)), 10, num_workers=1, persistent_workers=True)
    inner._iterator = "of the user"
    shard = prepare_data_loader(inner, put_on_device=False)
    copied = loaders.with_workers_of_a_run(shard)
    assert copied.base_dataloader.worker_init_fn.func is loaders._begin_worker
    assert copied.base_dataloader._iterator is None
    assert shard.base_dataloader.worker_init_fn is inner.worker_init_fn is None
    inner._iterator = None
