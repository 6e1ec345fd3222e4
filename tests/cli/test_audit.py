"""From a model of any kind to its verdict, and to its accuracies."""

from __future__ import annotations

import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import surestep
from surestep import UserError, evaluation, models, runs, targets
from surestep.data import Images
from surestep.weights import Signature, load_weights, read_signature, save_weights

pytestmark = pytest.mark.usefixtures("small_budget")

MODEL = """
import torch
from surestep import models

def make():
    return models.create("cnn-small", 10)

def plain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

def normalised():
    return torch.nn.Sequential(models.Normalize([0.4], [0.3]), plain())

def broken():
    return 1 / 0

def number():
    return 3

def few():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 4))

def half():
    return plain().bfloat16()

def exits():
    raise SystemExit(0)
"""


DATED = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Settings:
    hidden: int = 16

def make():
    hidden = Settings().hidden
    layers = [torch.nn.Linear(784, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)
"""


@pytest.fixture(scope="module")
def weights(finished, tmp_path_factory):
    """The finished run's weights, as others save them; and the file that makes the model."""
    tmp_path = tmp_path_factory.mktemp("weights")
    model = models.create("cnn-small", 10)
    load_weights(finished / "model.safetensors", model)
    (tmp_path / "net.py").write_text(MODEL)
    save_weights(tmp_path / "w.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(model, tmp_path / "pickled.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:900])
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "rows.pt").write_text("epoch,loss\n1,2.3\n")
    inside = models.create("cnn-small", 10, mean=[0.4], std=[0.3])
    torch.save(inside.state_dict(), tmp_path / "inside.pt")
    (tmp_path / "dated.py").write_text(DATED)
    example = torch.rand(2, 1, 28, 28)
    with warnings.catch_warnings():  # deprecated, and still what people have
        warnings.simplefilter("ignore")
        torch.jit.trace(model.eval(), example).save(str(tmp_path / "script.ts"))
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "exported.pt2")
    return tmp_path


@pytest.fixture
def on(digits):
    return ("--dataset", "npz", "--data", digits, "--eps", "0.3", "--n", "40", "--json", "-")


def test_a_run(cli, finished, tmp_path):
    file = tmp_path / "audit.json"
    result = cli("audit", finished, "--budget", "quick", "--n", "40", "--json", file)
    assert result.code == 0, result.err
    found = json.loads(file.read_text("utf-8"))
    assert found["format"] == "surestep-audit"
    assert found["n"] == 40
    assert found["verdict"] in result.out
    assert [c["number"] for c in found["checks"]] == list(range(1, 21))
    for check in found["checks"]:
        assert check["title"].split()[0] in result.out
    assert "at most about" in result.err
    assert found["command"].startswith("surestep")


def test_every_kind_of_model_gives_the_same(done, finished, weights, on):
    def accuracies(*model):
        return json.loads(done("evaluate", *model, *on, "--attacks", "fgsm,i-fgsm-3"))

    expected = accuracies(finished)
    for model in (
        (f"{weights}/net.py:make", "--weights", weights / "w.safetensors"),
        (f"{weights}/net.py:make", "--weights", weights / "plain.pt"),
        (f"{weights}/net.py:make", "--weights", weights / "wrapped.pth"),
        ("cnn-small", "--weights", weights / "wrapped.pth"),
        (weights / "script.ts",),
        (weights / "exported.pt2",),
    ):
        found = accuracies(*model)
        assert found["robust_accuracy"] == expected["robust_accuracy"], model
        assert found["clean_accuracy"] == expected["clean_accuracy"] > 0.1


def test_an_audit_of_a_file(done, finished, weights, on):
    model = f"{weights}/net.py:make"
    args = ("--weights", weights / "w.safetensors", "--budget", "quick")
    found = json.loads(done("audit", model, *args, *on))
    expected = json.loads(done("evaluate", finished, *on, "--attacks", "fgsm"))
    assert found["clean_accuracy"] == expected["clean_accuracy"] > 0.1
    assert found["claims"]["fgsm"] == expected["robust_accuracy"]["fgsm"]


def test_what_an_audit_is_asked_for(cli, finished, monkeypatch, tmp_path):
    given = {}

    def spy(*_, **options):
        given.update(options)
        raise UserError("seen")

    monkeypatch.setattr(surestep, "audit", spy)
    state = str(tmp_path / "state")
    args = ("--state", state, "--n", "40", "--seed", "3", "--batch-size", "20")
    assert "seen" in cli("audit", finished, "--budget", "quick", *args).err
    expected = {"state": state, "n": 40, "seed": 3, "batch_size": 20, "budget": "quick"}
    assert given == {**given, **expected}


def test_normalisation_outside_is_normalisation_inside(done, weights, on):
    """The file's network has none of its own; MNIST's is in front of one of the two."""

    def told(factory, *more):
        args = ("--attacks", "fgsm,i-fgsm-3", *more)
        found = json.loads(done("evaluate", f"{weights}/net.py:{factory}", *args, *on))
        return {k: v for k, v in found.items() if "accuracy" in k}

    outside = told("plain", "--mean", "0.4", "--std", "0.3")
    assert outside == told("normalised")
    assert outside != told("plain")
    audit = ("--budget", "quick", "--seed", "1")
    one = json.loads(
        done("audit", f"{weights}/net.py:plain", "--mean", "0.4", "--std", "0.3", *audit, *on)
    )
    other = json.loads(done("audit", f"{weights}/net.py:normalised", *audit, *on))
    assert (one["verdict"], one["attacks"]) == (other["verdict"], other["attacks"])


def test_normalisation_outside_of_an_architecture(done, weights, on):
    """As of the same network from a file."""
    how = ("--weights", weights / "plain.pt", "--mean", "0.4", "--std", "0.3", "--attacks", "fgsm")
    one, other = (
        json.loads(done("evaluate", model, *how, *on))
        for model in ("cnn-small", f"{weights}/net.py:make")
    )
    assert one["robust_accuracy"] == other["robust_accuracy"]
    assert one["per_class"] == other["per_class"]


def test_images_of_other_sizes(done, refused, weights, tmp_path):
    for k in range(4):
        for name in "ab":
            place = tmp_path / "test" / name / f"{k}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (30 + k, 40), 20 * k).save(place)
    model = (f"{weights}/net.py:make", "--dataset", f"folder:{tmp_path}", "--eps", "0.1")
    assert "image_size" in refused("evaluate", *model, "--attacks", "fgsm")
    told = done("evaluate", *model, "--attacks", "fgsm", "--image-size", "28", "--json", "-")
    found = json.loads(told)
    assert (found["n"], found["dataset"], found["split"]) == (8, f"folder:{tmp_path}", "test")


def test_a_file_with_dataclasses(done, weights, on):
    found = json.loads(done("evaluate", f"{weights}/dated.py:make", "--attacks", "fgsm", *on))
    assert found["n"] == 40


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        (
            "{0}/net.py:nothing",
            (),
            "has no 'nothing': it has make, plain, normalised, broken, number, few, half, exits",
        ),
        ("{0}/net.py:broken", (), "net.py:broken fails: ZeroDivisionError"),
        ("{0}/net.py:exits", (), "net.py:exits fails: SystemExit"),
        ("{0}/net.py:number", (), "returned a int, expected a torch.nn.Module"),
        ("{0}/net.py", (), "names no factory"),
        ("{0}/missing.py:make", (), "missing.py does not exist"),
        ("{0}/missing.pt", (), "missing.pt does not exist"),
        ("{0}/plain.pt", (), "is not a TorchScript program: if it holds weights only"),
        ("{0}/nothing", (), "nor is it a model: give a run folder"),
        ("lenet+", (), "lenet+ is an architecture without weights: give --weights FILE"),
        ("lenet+", ("--weights", "{0}/plain.pt"), "plain.pt does not fit the model"),
        ("{0}/net.py:make", ("--weights", "{0}/missing.pt"), "missing.pt does not exist"),
        ("{0}/net.py:make", ("--weights", "{0}/pickled.pt"), "could run code"),
        ("{0}/net.py:make", ("--weights", "{0}/torn.pt"), "cannot be read as weights"),
        ("{0}/net.py:make", ("--weights", "{0}/page.pt"), "is not a file of weights"),
        ("{0}/net.py:make", ("--weights", "{0}/rows.pt"), "cannot be read as weights"),
        (
            "cnn-small",
            ("--weights", "{0}/inside.pt", "--mean", "0.4", "--std", "0.3"),
            "inside.pt holds the mean and std that its model normalises with: leave mean and std",
        ),
        ("{0}/script.ts", ("--weights", "{0}/plain.pt"), "has its own weights"),
        ("{0}/net.py:make", ("--mean", "0.1"), "mean and std go together"),
        ("{0}/net.py:make", ("--mean", "a", "--std", "1"), "give numbers, one per channel"),
        ("{0}/net.py:make", ("--mean", "1,2", "--std", "1,2"), "every channel, here 1"),
        ("hf:nothing", ("--mean", "0.5", "--std", "0.2"), "normalises its images itself"),
        ("timm:nothing", ("--mean", "0.5", "--std", "0.2"), "normalises its images itself"),
        ("timm:nothing", (), "timm"),
        ("hf:nothing", (), "transformers"),
    ],
)
def test_refused(refused, weights, on, model, more, said):
    given = [str(m).format(weights) for m in more]
    assert said in refused("evaluate", model.format(weights), *given, *on)


def test_a_run_normalises_inside(refused, finished):
    line = refused("evaluate", finished, "--mean", "0.1", "--std", "0.3", "--attacks", "fgsm")
    assert "normalises its images itself: leave mean and std out" in line


class Pretrained(torch.nn.Module):
    """As timm's and the Hub's models tell of their classes."""

    def __init__(self, names=None, outputs=None):
        super().__init__()
        if names:
            self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        if outputs:
            self.num_classes = outputs


@pytest.mark.parametrize(
    ("told", "note"),
    [
        ({"names": ["cat", "dog"]}, ""),
        ({"names": ["tabby", "hound", "gull"]}, "has 3 classes, the data 2: label"),
        ({"outputs": 1000}, "hf:pets has 1000 classes, the data 2: label k"),
        ({"outputs": 2}, ""),
        ({}, ""),
    ],
)
def test_the_number_of_outputs(told, note):
    images = Images(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), classes=("cat", "dog"))
    for model in (Pretrained(**told), torch.nn.Sequential(torch.nn.Identity(), Pretrained(**told))):
        found = targets._note_on_class_count("hf:pets", model, images)
        assert note in found
        assert bool(found) == bool(note)
        assert targets._class_names(model) == tuple(told.get("names", ()))


@pytest.mark.parametrize(
    ("theirs", "ours", "noted"),
    [
        (("tabby", "hound"), ("cat", "dog"), True),
        (("tabby", "dog"), ("cat", "dog"), False),
        (("0", "1"), ("cat", "dog"), False),
        (("cat", "dog"), None, False),
        ((), ("cat", "dog"), False),
    ],
)
def test_names_of_classes_of_which_none_agrees(monkeypatch, tmp_path, theirs, ours, noted):
    images = Images(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]), classes=ours)
    monkeypatch.setattr(targets.runs, "load_data", lambda *_: images)
    file = tmp_path / "w.safetensors"
    save_weights(file, models.create("cnn-small", 2), Signature(theirs, (1, 28, 28)))
    note = targets.open_target(
        "cnn-small", weights=str(file), dataset="mnist", eps=0.1, device="cpu"
    ).note
    said = "no class name of cnn-small agrees with the data's: label k of the data is taken to be"
    assert (said in note) is noted


@pytest.mark.parametrize(
    ("theirs", "ours", "labels"),
    [
        (("cat", "dog"), ("cat", "dog"), [0, 1, -1]),
        (("dog", "cat"), ("cat", "dog"), [1, 0, -1]),
        (("ape", "bee", "cat", "dog"), ("bee", "dog"), [1, 3, -1]),
        # Names that say nothing of each other.
        ((), ("cat", "dog"), [0, 1, -1]),
        (("tabby", "hound", "gull"), ("cat", "dog"), [0, 1, -1]),
        (("cat", "dog"), None, [0, 1, -1]),
        (("1", "2"), None, [0, 1, -1]),
        (("0", "1", "2"), ("1", "5"), [0, 1, -1]),
        # One is called otherwise, the other stands where it stands.
        (("car", "dog"), ("automobile", "dog"), [0, 1, -1]),
        (("crane", "cat", "crane"), ("cat", "crane"), [0, 1, -1]),
    ],
)
def test_labels_are_numbered_by_the_names_of_the_classes(theirs, ours, labels):
    y = torch.tensor([0, 1, -1])
    images = Images(torch.zeros(3, 3, 8, 8), y, classes=ours)
    found = runs.in_class_order_of("hf:pets", theirs, images)
    assert found.y.tolist() == labels
    assert images.y.tolist() == [0, 1, -1]
    if found is not images:
        assert found.classes == theirs


def test_a_class_that_the_model_was_not_trained_on():
    images = Images(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), classes=("cat", "emu"))
    said = "hf:pets does not know the class 'emu' of the data, but it knows 1 of 2: rename the"
    with pytest.raises(UserError, match=said):
        runs.in_class_order_of("hf:pets", ("dog", "cat"), images)


def test_a_folder_with_some_of_the_classes_that_a_run_was_trained_on(cli, tmp_path):
    """Dark, grey and white; judged on the last two alone."""
    for k, name in enumerate(("dark", "grey", "white")):
        for place in ("all", *(["some"] if k else [])):
            (tmp_path / place / name).mkdir(parents=True)
            for j in range(20):
                pixels = np.full((8, 8, 3), 110 * k + j, np.uint8)
                Image.fromarray(pixels).save(tmp_path / place / name / f"{j}.png")
    model = ("--model", "cnn-small", "--eps", "0.01", "--val-images", "0", "--preset", "none")
    train = ("train", "--method", "standard", "--dataset", "folder", "--data", tmp_path / "all")
    how = ("--lr", "0.02", "--epochs", "30", "--batch-size", "8", "--engine", "reference")
    out = tmp_path / "run"
    assert cli(*train, *model, *how, "--out", out)
    assert read_signature(out / "model.safetensors") == (("dark", "grey", "white"), (3, 8, 8))

    def judged(*place):
        result = cli("evaluate", out, "--attacks", "fgsm", "--json", "-", *place)
        assert result.code == 0, result.err
        return json.loads(result.out), result.err

    whole, said = judged()
    assert "renumbered to the class order of" not in said
    some, said = judged("--data", tmp_path / "some")
    assert "the labels are renumbered to the class order of" in " ".join(said.split())
    assert whole["clean_accuracy"] == some["clean_accuracy"] == 1
    assert [row["label"] for row in some["per_class"]] == [1, 2]


def test_labels_that_the_model_has_not(refused, weights, on):
    model = f"{weights}/net.py:few"
    assert "the model has 4 classes" in refused("audit", model, "--budget", "quick", *on)


def test_preprocessing_that_does_not_fit():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    adapted = evaluation.Adapted(model, models.Normalize((0.5, 0.5), (0.2, 0.2)))
    with pytest.raises(UserError, match="the model fails on one batch of shape"):
        adapted(torch.rand(2, 3, 8, 8))


def test_a_model_trained_in_half_is_judged_in_float32(done, weights, on):
    def told(factory):
        found = done("evaluate", f"{weights}/net.py:{factory}", "--attacks", "fgsm", *on)
        return json.loads(found)["clean_accuracy"]

    model = targets.open_target(
        f"{weights}/net.py:half", dataset="mnist", eps=0.3, device="cpu"
    ).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert abs(told("half") - told("plain")) <= 0.05


def test_data_and_radius_are_needed(refused, weights):
    assert "--dataset and --eps" in refused("audit", f"{weights}/net.py:make")


def test_weights_of_a_run(refused, finished):
    assert "leave --weights out" in refused("audit", finished, "--weights", "w.pt")


def test_a_pickle_is_not_run(refused, weights, on):
    """Loading must not run what a pickle says."""

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(weights / "trap"),))

    torch.save({"state_dict": Trap()}, weights / "trap.pt")
    refused("audit", f"{weights}/net.py:make", "--weights", weights / "trap.pt", *on)
    assert not (weights / "trap").exists()


def test_a_curve(done, finished):
    args = ("--attacks", "i-fgsm-3", "--eps", "0,0.1,3/10", "--n", "40", "--json", "-")
    found = json.loads(done("evaluate", finished, *args))
    assert [row["eps"] for row in found["curve"]] == [0, 0.1, 0.3]
    assert found["threat"]["eps"] == 0.3
    worst = [row["worst_case_accuracy"] for row in found["curve"]]
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] == found["worst_case_accuracy"]


def test_transfer_from_a_run(done, able):
    """Its own gradients find more than those of a substitute."""

    def left(*source):
        args = ("--attacks", "transfer", "--n", "40", "--json", "-", *source)
        return json.loads(done("evaluate", able, *args))["robust_accuracy"]["transfer"]

    assert left("--source", able) < left()


def test_state(done, refused, finished, tmp_path):
    args = ("evaluate", finished, "--attacks", "pgd-3", "--n", "40", "--json", "-")
    state = ("--state", tmp_path / "state")
    first = json.loads(done(*args, *state))
    again = json.loads(done(*args, *state))
    for found in (first, again):
        found.pop("seconds")
    assert again.pop("command")
    assert first.pop("command")
    assert first == again
    assert "other seed" in refused(*args, *state, "--seed", "3")


def test_budgets(done, refused, finished):
    found = json.loads(done("evaluate", finished, "--budget", "quick", "--n", "20", "--json", "-"))
    assert list(found["robust_accuracy"]) == ["fgsm", "noise-20", "pgd-50", "pgd-50-margin"]
    assert "quick" in refused("evaluate", finished, "--budget", "quik")
