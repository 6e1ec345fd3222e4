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
    *("free", "pap", "fgsm-mep", "fgsm-cuap", "fgsm-fuap", "elle-a", "converge-smooth", "liet")
]
"""What has a state of its own, one of each kind; in one process all are resumed."""
COMBINED = {
    "ahead": {"awp": 0.05, "clip_grad": 0.1},
    "swa": {"swa": 0.4},
    "fast": {"engine": "fast", "precision": "fp32"},
}
"""Settings under which a step of two processes is that of one."""
EACH = {
    slug: {"augment": "crop-flip", "val_images": 0, "epochs": 2 if slug in remembering() else 1}
    for slug in methods.names()
}
"""The run of each method: memory is read in the second epoch."""
PARAMS = {**merged("APART"), "converge-smooth": {"compare": "batch"}}
"""By epochs converge-smooth compares from the third on, and hardly tells whose mean loss it is."""


def torchrun(script: Path, *args: object) -> None:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", *map(str, (script, *args))]
    families = Path(__file__).parent.parent / "methods"
    path = os.pathsep.join([str(families), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
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
    here, settings = Path(__file__).parent, json.dumps([REMEMBER, COMBINED, EACH, PARAMS])
    torchrun(here / "two_processes.py", here / "conftest.py", place, settings)
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
    ("name", "settings"),
    [
        ("average", {"ema": 0.9}),
        ("augmented", {"augment": "crop-flip"}),
        ("frugal", {}),
        ("picked", {}),
        ("compiled", {}),
        *COMBINED.items(),
    ],
)
def test_two_processes_take_the_step_of_one(tiny, place, name, settings):
    one = tiny.train("fgsm", model=tiny.net(norm=False), **settings)
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
        method = tiny.method(slug, **PARAMS.get(slug, {}))
        one = tiny.train(method, model=tiny.net(norm=False), **EACH[slug])
    initial = tiny.net(norm=False).state_dict()
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(both[0]["state"][key], value, rtol=0, atol=1e-4)
        assert (value - initial[key]).abs().max() > 1e-3, "it must have learnt something"


@pytest.mark.parametrize(
    ("name", "stop"),
    [("resumed", 9), ("resumed-norm", 4), ("resumed-norm", 5), ("resumed-norm", 9)],
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
