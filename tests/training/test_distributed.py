"""Two processes, started by torchrun once for the whole module; the tests read what they left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import merged, remembering
from torch.utils.data import DataLoader, TensorDataset

from surestep import files, methods, processes
from surestep.errors import UserError
from surestep.training import checkpoint

pytestmark = pytest.mark.slow

REMEMBER = [
    *("tdat", "free", "pap", "fgsm-mep", "fgsm-cuap", "fgsm-fuap", "fgsm-pco"),
    *("elle-a", "converge-smooth", "liet", "iaat"),
]
"""What has a state of its own, of each kind."""
COMBINED = {
    "ahead": {"awp": 0.05, "clip_grad": 0.1},
    "swa": {"swa": 0.4},
    "fast": {"engine": "fast", "precision": "fp32"},
}
"""Settings under which a step of two processes is that of one."""
SCRIPT = (
    f"""
REMEMBER, COMBINED = {REMEMBER}, {COMBINED}
"""
    + """
import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from families import remembering
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data import TensorDataset

from surestep import UserError, files
from surestep.devices import pick_device
from surestep.training import Pick, TrainStep, checkpoint, pick_engine, preparing, stopping
from surestep.training import validating
from surestep.training._fit import _accelerator
from surestep.training.memory import Frugal

spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
place = Path(sys.argv[2])
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
    try:
        run(out=place / name)
    except tiny.Stopped:
        pass
    TrainStep.__call__ = take


def stopped(name, run, steps=(4, 5, 9)):
    keep(name, run(out=place / name))
    for after in steps:
        crash(f"{name}-{after}", run, after)
        keep(f"{name}-{after}", run(out=place / f"{name}-{after}", resume=True))


with tiny.nothing_random():
    for method in tiny.methods.names():
        # Each rank begins with weights of its own: those of rank 0 must win.
        net = tiny.make_net(seed=rank, norm=False)
        made = tiny.make_method(method, **tiny.merged("APART").get(method, {}))
        epochs = 3 if method in remembering() else 2
        keep(method, train(made, model=net, augment="crop-flip", epochs=epochs))
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


stopped("resumed", without_norm)
stopped("resumed-norm", with_norm)
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
        return train(method, model=tiny.make_net(norm=False), checkpoint_every=2, **where)

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
unnamed = _accelerator(pick_device(), None, tensorboard=False)
(place / f"unnamed-{rank}").write_text(str(unnamed.num_processes))
# Left to the interpreter's end, the group's threads may abort a process that is done.
PartialState().destroy_process_group()
"""
)


def torchrun(script: Path, *args: object) -> None:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", *map(str, (script, *args))]
    families = Path(__file__).parent.parent / "methods"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(families)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Any, stopping: Any) -> Path:
    """Run the script and return the folder of its results."""
    place = tmp_path_factory.mktemp("distributed")
    begun = {"model": tiny.net(norm=False), "out": place / "alone", "checkpoint_every": 2}
    stopping(4, lambda: tiny.train("fgsm", **begun))
    pairs = {"data": TensorDataset(*tiny.data()), "validation": tiny.data(21)}
    pairs |= {"model": tiny.net(norm=False), "out": place / "alone-dataset"}
    stopping(6, lambda: tiny.train("fgsm", **pairs))
    script = place / "script.py"
    script.write_text(SCRIPT)
    torchrun(script, Path(__file__).with_name("conftest.py"), place)
    return place


def left(place: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(place / f"{name}-{rank}.pt") for rank in (0, 1)]


def equal(one: dict[str, Any], other: dict[str, Any], keys: Any = None) -> bool:
    return all(torch.equal(one[k], other[k]) for k in keys or one)


@pytest.mark.parametrize("device", ["world", "unnamed"])
def test_there_are_two(place, device):
    assert [(place / f"{device}-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.parametrize(
    "name",
    [
        "standard",
        "fgsm",
        "sat-r2",
        "average",
        "augmented",
        "norm-out",
        "resumed",
        "resumed-9",
        "alone-dataset",
        "ended",
        "streams",
        "norm",
        "tried-fgsm-uap",
        "tried-fgsm-mep",
    ],
)
def test_both_end_with_the_same_weights(place, name):
    one, other = left(place, name)
    assert equal(one["state"], other["state"])
    assert one["best"] == other["best"]


@pytest.mark.parametrize(
    ("name", "params", "settings"),
    [
        ("average", {}, {"ema": 0.9}),
        ("augmented", {}, {"augment": "crop-flip"}),
        ("frugal", {}, {}),
        ("picked", {}, {}),
        ("compiled", {}, {}),
        *((name, {}, settings) for name, settings in COMBINED.items()),
    ],
)
def test_two_processes_take_the_step_of_one(tiny, place, name, params, settings):
    one = tiny.train(tiny.method("fgsm", **params), model=tiny.net(norm=False), **settings)
    both = left(place, name)[0]["state"]
    initial = tiny.net(norm=False).state_dict()
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(both[key], value, rtol=0, atol=1e-6)
        assert (value - initial[key]).abs().max() > 1e-3, "it must have learnt something"


@pytest.mark.parametrize("slug", methods.names())
def test_every_method_on_two_processes(tiny, place, slug):
    """What is random is nothing: then the shares of a batch together are the batch of one.

    Also memory follows its image from process to process, through crop and flip.
    """
    both = left(place, slug)
    assert equal(both[0]["state"], both[1]["state"])
    if reason := merged("COUPLED").get(slug):
        pytest.skip(f"one loss of the whole batch: {reason}")
    with tiny.nothing_random():
        method = tiny.method(slug, **merged("APART").get(slug, {}))
        settings = {"augment": "crop-flip", "epochs": 3 if slug in remembering() else 2}
        one = tiny.train(method, model=tiny.net(norm=False), **settings)
    initial = tiny.net(norm=False).state_dict()
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(both[0]["state"][key], value, rtol=0, atol=1e-4)
        assert (value - initial[key]).abs().max() > 1e-3, "it must have learnt something"


@pytest.mark.parametrize("stop", [4, 5, 9])
@pytest.mark.parametrize(
    "name",
    [
        "resumed",
        "resumed-norm",
    ],
)
def test_resume(place, tiny, name, stop):
    assert tiny.weights(place / f"{name}-{stop}") == tiny.weights(place / name)
    assert tiny.rows(place / f"{name}-{stop}") == tiny.rows(place / name)
    assert equal(left(place, name)[1]["state"], left(place, f"{name}-{stop}")[1]["state"])


def test_resume_with_a_loader(place, tiny):
    assert tiny.weights(place / "resumed-loader-7") == tiny.weights(place / "resumed-loader")


@pytest.mark.parametrize("slug", REMEMBER)
def test_resume_of_what_each_process_keeps_of_its_own(place, tiny, slug):
    name = f"resumed-{slug}"
    assert tiny.weights(place / f"{name}-4") == tiny.weights(place / name)
    assert tiny.rows(place / f"{name}-4") == tiny.rows(place / name)


def test_each_process_has_its_share_of_a_loader(place, tiny):
    """64 images in batches of 6: eleven, of which each process takes every second."""
    assert [row["step"] for row in tiny.rows(place / "resumed-loader")] == [6, 12]


def test_only_the_first_writes(place, tiny):
    folder = place / "resumed"
    assert len(tiny.rows(folder)) == 2
    assert len(checkpoint.found(folder / "checkpoints")) == 2
    state = files.load_tree(checkpoint.found(folder / "checkpoints")[-1])
    first, second = state["rng"]
    assert not torch.equal(first["torch"], second["torch"])
    assert not (place / "wrote-1").exists()


def test_only_the_first_calls_on_epoch(place):
    assert [(place / f"told-{rank}").read_text() for rank in (0, 1)] == ["[1, 2]", "[]"]


def test_the_epoch_is_told_to_batch_samplers_and_data_sets(place):
    assert [(place / f"epochs-{rank}").read_text() for rank in (0, 1)] == ["{0, 1} {0, 1}"] * 2


def test_what_on_epoch_returns_ends_both(place, tiny):
    """The callback of the first process: the other's is not called."""
    assert [row["stopped"] for row in tiny.rows(place / "ended")] == [True]


def test_where_it_fails_the_others_end_too(place):
    said = [(place / f"callback-{rank}").read_text() for rank in (0, 1)]
    assert said == [
        "no such project",
        "on_epoch failed in the first process, whose output says why",
    ]


def test_what_is_not_finite_ends_both_at_their_next_exchange(place):
    assert [(place / f"taken-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]


def test_each_process_reads_its_own_stream(place):
    for rank in (0, 1):
        assert (place / f"streams-{rank}").read_text() == str(list(range(rank, 30, 2)))


def test_a_parameter_without_a_part_in_it_is_named(place):
    for rank in (0, 1):
        said = (place / f"idle-{rank}").read_text()
        assert (
            "to affect the logits, but these do not: aside; freeze them with requires_grad_(False)"
            in said
        )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trouble", "cannot make the run folder"),
        ("diverged", "became NaN or infinite at step 1 "),
        ("judged", "cannot be judged"),
        ("judged-loader", "cannot be judged"),
        ("judged-late", "cannot be judged"),
        ("trial", "out of memory in the trial"),
        ("lacks", "number of training images (or batches), of which one has 63 and another 64"),
        ("lacks-held", "number of held-out images (or batches), of which one has 20 and another"),
        ("lacks-run", "number of finished steps, of which one has 0 and another 4"),
    ],
)
def test_where_one_fails_both_do(place, name, said):
    """A process that leaves alone keeps the others waiting until a time-out."""
    assert [said in (place / f"{name}-{rank}").read_text() for rank in (0, 1)] == [True, True]


def test_nccl_is_given_what_is_on_the_gpu(monkeypatch):
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    monkeypatch.setattr(torch, "device", lambda kind, number: number)  # cuda is not here
    assert processes._sendable(torch.ones(2)).device.type == "meta"
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "gloo")
    assert processes._sendable(torch.ones(2)).device.type == "cpu"


@pytest.mark.parametrize("name", ["asked", "asked-loader", "left", "left-loader"])
def test_one_is_asked_to_stop_and_both_do(place, name):
    assert [(place / f"{name}-{rank}").read_text() for rank in (0, 1)] == ["143 4", "143 4"]


@pytest.mark.parametrize(
    ("name", "whole"), [("asked", "resumed-norm"), ("asked-loader", "resumed-loader")]
)
def test_and_go_on_as_if_nothing_had_been(place, tiny, name, whole):
    assert tiny.weights(place / name) == tiny.weights(place / whole)
    assert tiny.rows(place / name) == tiny.rows(place / whole)


def test_checkpoints_change_nothing(place, tiny):
    """Each attack is made on the first process's batch statistics, not only after a checkpoint."""
    assert tiny.weights(place / "norm-out") == tiny.weights(place / "resumed-norm")


def test_validation_is_left_by_both(place, tiny):
    for rank in (0, 1):
        assert (place / f"asked-validating-{rank}").read_text() == "143"
    assert (place / "asked-validating-at").read_text() == "step-00000005.safetensors"
    assert tiny.weights(place / "asked-validating") == tiny.weights(place / "resumed-norm")
    assert tiny.rows(place / "asked-validating") == tiny.rows(place / "resumed-norm")


def test_the_rows_are_of_all_images(place, tiny):
    """The first process's share of the batches has another loss than the second's."""
    one = tiny.train("fgsm", model=tiny.net(norm=False))
    same_rows(history(place / "left-alone"), one.history)


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def same_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Check the rows of two epochs of five steps of 10 images."""
    before = 0.0
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["adv_accuracy"] == pytest.approx(other["adv_accuracy"], abs=1e-5)
        # Over all processes.
        assert row["images_per_second"] * (row["train_seconds"] - before) == pytest.approx(50)
        before = row["train_seconds"]


@pytest.mark.parametrize("kind", ["images", "dataset", "loader"])
def test_validation_is_shared_and_its_rows_are_of_all_images(place, tiny, kind):
    held = {"validation": tiny.data(21), "val_attacks": ("fgsm",)}
    one = tiny.train("fgsm", model=tiny.net(norm=False), **held)
    for row, whole in zip(tiny.rows(place / f"held-{kind}"), one.history, strict=True):
        assert row["val_n"] == 21
        for name in ("val_clean", "val_fgsm", "val_worst_case"):
            assert row[name] == pytest.approx(whole[name])


def test_fewer_held_out_images_than_processes(place, tiny):
    assert [row["val_n"] for row in tiny.rows(place / "held-one")] == [1, 1]


def test_each_process_judges_its_part_of_the_held_out_images(place):
    """For each of two epochs: of images, of a Dataset, of a loader, which cannot be divided."""
    counts = [torch.load(place / f"held-{rank}") for rank in (0, 1)]
    assert counts == [[11] * 4 + [21] * 2, [10] * 4 + [21] * 2]


def test_a_run_goes_on_in_more_or_fewer_processes(place, tiny, tmp_path, capsys):
    def train(**where: Any) -> Any:
        net = tiny.net(norm=False)
        return tiny.train("fgsm", model=net, quiet=False, **where)

    shutil.copytree(place / "left", tmp_path / "run")
    gone_on = train(out=tmp_path / "run", resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "it was started on 2 processes and resumes on 1, which draw other" in said
    # FGSM draws nothing: each step is that of the same global batch.
    whole, both = train(), left(place, "alone")[0]["state"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(gone_on.model.state_dict()[name], value, rtol=0, atol=1e-4)
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-4)
    same_rows(gone_on.history, whole.history)
    same_rows(history(place / "alone"), whole.history)


def test_so_does_one_on_a_dataset_from_the_end_of_an_epoch(place, tiny, tmp_path, capsys):
    pairs = {"data": TensorDataset(*tiny.data()), "validation": tiny.data(21)}
    for name in ("left-dataset", "left-dataset-within"):
        shutil.copytree(place / name, tmp_path / name)
    both = {"model": tiny.net(norm=False), **pairs, "resume": True, "quiet": False}
    gone_on = tiny.train("fgsm", out=tmp_path / "left-dataset", **both)
    assert "started on 2 processes and resumes on 1" in " ".join(capsys.readouterr().err.split())
    for rows in (gone_on.history, history(place / "alone-dataset")):
        assert [row["step"] for row in rows] == [6, 12]
    said = r"was run on 2 processes and cannot resume on 1, .* same number"
    with pytest.raises(UserError, match=said):
        tiny.train("fgsm", out=tmp_path / "left-dataset-within", checkpoint_every=2, **both)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("left-loader", 6, "was run on 2 processes and cannot resume on 1"),
        ("left-loader-ended", 12, "was run on 2 processes and cannot resume on 1"),
    ],
)
def test_but_not_with_a_loader(place, tiny, tmp_path, name, size, said):
    shutil.copytree(place / name, tmp_path / "run")
    pairs = DataLoader(TensorDataset(*tiny.data()), size, shuffle=True)
    with pytest.raises(UserError, match=said):
        tiny.train(
            "fgsm",
            model=tiny.net(norm=False),
            data=pairs,
            validation=tiny.data(10),
            out=tmp_path / "run",
            resume=True,
        )
