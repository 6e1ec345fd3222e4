"""What two processes do for test_distributed.py, which starts them and reads what they leave.

Usage: torchrun --nproc_per_node 2 two_processes.py CONFTEST FOLDER SETTINGS

CONFTEST has the helpers of this folder, results are left in FOLDER, and SETTINGS is JSON: which
methods keep a state of their own, the settings of the runs that are compared with one process, and
those of the run of each method, with the method's parameters.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from surestep import UserError, files
from surestep.devices import pick_device
from surestep.training import (
    Pick,
    TrainStep,
    checkpoint,
    pick_engine,
    preparing,
    stopping,
    validating,
)
from surestep.training._fit import _accelerator
from surestep.training.memory import Frugal

spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
place = Path(sys.argv[2])
REMEMBER, COMBINED, EACH, PARAMS = json.loads(sys.argv[3])
rank = int(os.environ["RANK"])
train = functools.partial(tiny.train, device="cpu")
os.fsync = lambda _: None  # as in the tests of one process
take = TrainStep.__call__
if rank:
    files.write_atomically = lambda *_: (place / "wrote-1").touch()


def keep(name, result):
    state = {k: v.clone() for k, v in result.model.state_dict().items()}
    best = [row.get("val_worst_case") for row in result.history]
    torch.save({"state": state, "best": best}, place / f"{name}-{rank}.pt")


def crash(name, run, after):
    done = 0

    def step(self, *batch):
        nonlocal done
        if done == after:
            raise tiny.Stopped
        done += 1
        return take(self, *batch)

    TrainStep.__call__ = step
    with contextlib.suppress(tiny.Stopped):
        run(out=place / name)
    TrainStep.__call__ = take


def stopped(name, run, steps):
    keep(name, run(out=place / name))
    for after in steps:
        crash(f"{name}-{after}", run, after)
        keep(f"{name}-{after}", run(out=place / f"{name}-{after}", resume=True))


with tiny.nothing_random():
    for method in tiny.methods.names():
        # Each rank begins with weights of its own: those of rank 0 must win.
        net = tiny.make_net(seed=rank, norm=False)
        made = tiny.make_method(method, **PARAMS.get(method, {}))
        keep(method, train(made, model=net, **EACH[method]))
keep("average", train("fgsm", model=tiny.make_net(seed=rank, norm=False), ema=0.9))
keep("augmented", train("fgsm", model=tiny.make_net(norm=False), augment="crop-flip"))
for name, settings in COMBINED.items():
    keep(name, train("fgsm", model=tiny.make_net(norm=False), **settings))
torch.compile, plain = functools.partial(torch.compile, backend="eager"), torch.compile
keep("compiled", train("fgsm", model=tiny.make_net(norm=False), compile=True))
torch.compile = plain
preparing.fit_into, fit_into = lambda model, *_: Frugal(model, 2), preparing.fit_into
keep("frugal", train("fgsm", model=tiny.make_net(norm=False), max_memory=1.0))
preparing.fit_into = fit_into


def pick(*_):
    # Only the first process measures; what it finds holds for both.
    assert rank == 0
    return Pick("reference", "fp32", {("reference", "fp32"): 1.0}, 10)


preparing.MIN_STEPS, preparing.pick_engine, least = 1, pick, preparing.MIN_STEPS
keep("picked", train("fgsm", model=tiny.make_net(norm=False), engine="auto"))
preparing.MIN_STEPS = least
# The real trial, by the first process alone, of a method whose processes share what they find.
preparing.MIN_STEPS, preparing.pick_engine = 1, pick_engine
for method in ("fgsm-uap", "fgsm-mep"):
    keep(f"tried-{method}", train(method, model=tiny.make_net(norm=False), engine="auto"))
preparing.MIN_STEPS, preparing.pick_engine = least, pick
seen = []
told = {"on_epoch": lambda row, _: seen.append(row["epoch"])}
keep("norm", train("sat-r2", ema=0.9, select="best", **told))
(place / f"told-{rank}").write_text(str(seen))
keep("norm-out", train("sat-r2", out=place / "norm-out"))


def without_norm(**where):
    net = tiny.make_net(norm=False)
    return train("sat-r2", model=net, ema=0.9, checkpoint_every=2, **where)


def with_norm(**where):
    return train("sat-r2", checkpoint_every=2, **where)


def loader(**where):
    pairs = DataLoader(TensorDataset(*tiny.make_data()), 6, shuffle=True)
    net = tiny.make_net(norm=False)
    return train("fgsm", model=net, data=pairs, validation=tiny.make_data(10), **where)


stopped("resumed", without_norm, [9])
stopped("resumed-norm", with_norm, [4, 5, 9])
stopped("resumed-loader", loader, [7])


class Reordered(BatchSampler):
    # Accelerate looks for set_epoch in its .sampler only, and it has none.
    batch_size, epochs = 6, set()

    def __init__(self):
        pass

    def set_epoch(self, epoch):
        self.epochs.add(epoch)

    def __iter__(self):
        return iter(torch.arange(60).view(-1, 6).tolist())

    def __len__(self):
        return 10


class Told(TensorDataset):
    # Accelerate tells it nothing if the sampler has set_epoch.
    epochs = set()

    def set_epoch(self, epoch):
        self.epochs.add(epoch)


class Followed(SequentialSampler):
    def set_epoch(self, epoch):
        pass


reordered = DataLoader(TensorDataset(*tiny.make_data()), batch_sampler=Reordered())
followed = Told(*tiny.make_data())
in_order = BatchSampler(Followed(followed), 6, drop_last=True)
for pairs in (reordered, DataLoader(followed, batch_sampler=in_order)):
    train("fgsm", data=pairs, val_images=0)
(place / f"epochs-{rank}").write_text(f"{Reordered.epochs} {Told.epochs}")


stopping.ASK_EVERY = 4  # an epoch has five or six steps


def asked(name, run, *, resume):
    # The second process alone is asked, in its third step; both stop after the fourth.
    done = 0

    def step(self, *batch):
        nonlocal done
        done += 1
        if done == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *batch)

    TrainStep.__call__ = step
    try:
        run(out=place / name)
    except SystemExit as e:
        (place / f"{name}-{rank}").write_text(f"{e.code} {done}")
    TrainStep.__call__ = take
    if resume:
        run(out=place / name, resume=True)


def asked_validating(**where):
    # The second process alone is asked, while the images of the first epoch are validated.
    evaluate, calls = validating.evaluate, []

    def interrupted(*args, **kwargs):
        if not calls and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return evaluate(*args, **kwargs)

    validating.evaluate = interrupted
    try:
        train("sat-r2", checkpoint_every=2, **where)
    finally:
        validating.evaluate = evaluate


try:
    asked_validating(out=place / "asked-validating")
except SystemExit as e:
    (place / f"asked-validating-{rank}").write_text(str(e.code))
before = sorted(path.name for path in (place / "asked-validating" / "checkpoints").iterdir())
if rank == 0:
    (place / "asked-validating-at").write_text(before[-1])
train("sat-r2", checkpoint_every=2, out=place / "asked-validating", resume=True)


def drawing_nothing(**where):
    return train("fgsm", model=tiny.make_net(norm=False), **where)


asked("asked", with_norm, resume=True)
asked("asked-loader", loader, resume=True)
drawing_nothing(out=place / "left-alone")
asked("left", drawing_nothing, resume=False)
asked("left-loader", loader, resume=False)
keep("alone", drawing_nothing(out=place / "alone", checkpoint_every=2, resume=True))


def dataset(**where):
    return drawing_nothing(data=TensorDataset(*tiny.make_data()), validation=held, **where)


held = tiny.make_data(21)
crash("left-dataset", dataset, 6)
crash("left-dataset-within", functools.partial(dataset, checkpoint_every=2), 5)
crash("left-loader-ended", loader, 6)
keep("alone-dataset", dataset(out=place / "alone-dataset", resume=True))
keep("ended", drawing_nothing(out=place / "ended", epochs=3, on_epoch=lambda *_: True))


class Own(IterableDataset):
    def __init__(self):
        self.yielded = []

    def __iter__(self):
        x, y = tiny.make_data()
        for i in range(rank, 64, 2):
            self.yielded.append(i)
            yield x[i], y[i]


own = DataLoader(Own(), 5)
keep("streams", drawing_nothing(data=own, validation=held, steps_per_epoch=3, epochs=1))
(place / f"streams-{rank}").write_text(str(own.dataset.yielded))
for method in REMEMBER:

    def with_state(method=method, **where):
        net = tiny.make_net(norm=False)
        # One of each kind shows that a validation leaves a state alone.
        judged = {} if method in ("free", "fgsm-mep") else {"val_images": 0}
        return train(method, model=net, checkpoint_every=2, **judged, **where)

    stopped(f"resumed-{method}", with_state, [4])
# 21 images in batches of 5: three batches of the first process, two of the second.
evaluate, found = validating.evaluate, []
kinds = {"images": held, "dataset": TensorDataset(*held)}
kinds["loader"] = DataLoader(TensorDataset(*held), 5)
validating.evaluate = lambda *a, **k: found.append(evaluate(*a, **k)) or found[-1]
for kind, validation in kinds.items():
    drawing_nothing(out=place / f"held-{kind}", validation=validation, val_attacks=("fgsm",))
validating.evaluate = evaluate
torch.save([one.n for one in found], place / f"held-{rank}")
drawing_nothing(out=place / "held-one", validation=tiny.make_data(1), val_attacks=("fgsm",))
idle = torch.nn.Sequential(tiny.make_net(norm=False))
idle.register_parameter("aside", torch.nn.Parameter(torch.zeros(3)))


def refused(name, **settings):
    try:
        train("fgsm", **settings)
    except UserError as e:
        (place / f"{name}-{rank}").write_text(str(e))


refused("idle", model=idle)
# Of the first process alone: its folder cannot be made. Of the second alone: a loss that is NaN.
(place / "no-folder").write_text("")
refused("trouble", out=place / "no-folder" / "run")


def full(*_):
    raise torch.OutOfMemoryError


preparing.MIN_STEPS, preparing.pick_engine = 1, full
refused("trial", engine="auto")
preparing.MIN_STEPS, preparing.pick_engine = least, pick
# The second lacks an image, a held-out image, a file of the run.
refused("lacks", data=tiny.make_data(64 - rank), validation=held)
refused("lacks-held", validation=tiny.make_data(21 - rank))
newest = checkpoint.load_newest
if rank:
    checkpoint.load_newest = lambda *_: None
refused("lacks-run", model=tiny.make_net(norm=False), out=place / "left", resume=True)
checkpoint.load_newest = newest


def callback(*_):
    raise UserError("no such project")


refused("callback", on_epoch=callback)
taken = []


def nan_in_one(self, *batch):
    taken.append(batch)
    result = take(self, *batch)
    return result._replace(loss=result.loss * (torch.nan if rank else 1))


def judged_by_one(*args, **kwargs):
    if rank:
        raise UserError("one of my images cannot be judged")
    return evaluate(*args, **kwargs)


def judged_in_part(*args, progress, **kwargs):
    # Of a loader each judges all images. The second fails after its first batch.
    if rank:
        progress()
        raise UserError("one of my images cannot be judged")
    return evaluate(*args, progress=progress, **kwargs)


def judged_late(*args, **kwargs):
    result = evaluate(*args, **kwargs)
    if rank:
        raise UserError("one of my images cannot be judged")
    return result


# One alone would judge less at a time, so oftener; then there are as many batches in each.
preparing.MOST_JUDGED, most = 5 - 2 * rank, preparing.MOST_JUDGED
validating.evaluate = judged_late
refused("judged-late", epochs=1, validation=held)
preparing.MOST_JUDGED = most
validating.evaluate = judged_by_one
refused("judged", epochs=1)
validating.evaluate = judged_in_part
refused("judged-loader", epochs=1, validation=DataLoader(TensorDataset(*held), 5))
validating.evaluate = evaluate
TrainStep.__call__ = nan_in_one
refused("diverged", epochs=1)
(place / f"taken-{rank}").write_text(str(len(taken)))
TrainStep.__call__ = take
(place / f"world-{rank}").write_text(str(PartialState().num_processes))
# Without naming the device: as a new process would find the others.
AcceleratorState._reset_state(reset_partial_state=True)
unnamed = _accelerator(pick_device(), None)
(place / f"unnamed-{rank}").write_text(str(unnamed.num_processes))
# Left to the interpreter's end, the group's threads may abort a process that is done.
PartialState().destroy_process_group()
