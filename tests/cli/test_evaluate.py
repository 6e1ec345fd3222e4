"""From a run folder to its accuracies."""

from __future__ import annotations

import json
import re
import shutil
import textwrap

import numpy as np
import pytest

import surestep
from surestep import models, runs
from surestep.weights import read_signature, save_weights

ATTACKS = ("--attacks", "fgsm,pgd-3,pgd-3-margin")


def test_end_to_end(done, finished, tmp_path):
    file = tmp_path / "new" / "result.json"
    table = done("evaluate", finished, *ATTACKS, "--json", file)
    result = json.loads(file.read_text("utf-8"))
    assert {
        *("clean_accuracy", "robust_accuracy", "worst_case_accuracy", "n", "seconds", "run")
    } <= result.keys()
    assert result["n"] == 100
    assert list(result["robust_accuracy"]) == ["fgsm", "pgd-3", "pgd-3-margin"]
    assert result["worst_case_accuracy"] <= min(result["robust_accuracy"].values())
    assert max(result["robust_accuracy"].values()) <= result["clean_accuracy"]
    assert result["threat"] == {"norm": "linf", "eps": 0.3, "bounds": [0.0, 1.0]}
    for row, value in (
        ("clean", result["clean_accuracy"]),
        *result["robust_accuracy"].items(),
        ("worst case", result["worst_case_accuracy"]),
    ):
        low, high = result["intervals"][row]
        shown = f"{value:.1%} ({100 * low:.1f}-{100 * high:.1f})"
        assert any(f" {row} " in line and shown in line for line in table.splitlines())
    assert "100 images" in " ".join(table.split())
    weakest = min(result["per_class"], key=lambda one: one["worst_case_accuracy"])
    assert f"weakest class: {weakest['label']}, worst case" in table
    assert f"seconds: fgsm {result['attack_seconds']['fgsm']:.1f}, pgd-3 " in table


def test_json_on_stdout_is_json_only(cli, finished):
    result = cli("evaluate", finished, *ATTACKS, "--n", "10", "--json", "-")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["n"] == 10


def test_the_same_twice_and_in_another_batch_size(done, finished):
    def accuracies(*args):
        found = json.loads(done("evaluate", finished, "--attacks", "pgd-3x2", *args, "--json", "-"))
        return {k: v for k, v in found.items() if "accuracy" in k}

    assert accuracies() == accuracies()
    assert accuracies()["clean_accuracy"] == accuracies("--batch-size", "7")["clean_accuracy"]


def test_eps_of_ones_own(done, finished):
    def found(eps):
        return json.loads(
            done("evaluate", finished, "--attacks", "pgd-3", "--eps", eps, "--json", "-")
        )

    none, some = found("0"), found("8/255")
    assert none["worst_case_accuracy"] == none["clean_accuracy"]
    assert some["threat"]["eps"] == 8 / 255
    assert some["worst_case_accuracy"] <= none["worst_case_accuracy"]


def test_a_run_may_be_moved(done, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert "moved" in done("evaluate", "moved", "--attacks", "fgsm")


def test_data_may_be_moved(done, run, digits):
    config = run / "config.yaml"
    expected = done("evaluate", run, "--attacks", "fgsm", "--n", "20")
    config.write_text(config.read_text("utf-8").replace(str(digits), "gone.npz"), "utf-8")
    given = ("--data", digits, "--attacks", "fgsm", "--n", "20")
    first, again = (text.splitlines()[:5] for text in (expected, done("evaluate", run, *given)))
    assert first == again


def test_other_data_need_none_of_the_runs_place(done, run, tmp_path, digits):
    shutil.copy(digits, tmp_path / "other.npz")
    place = f"npz:{tmp_path / 'other.npz'}"
    assert "fgsm" in done("evaluate", run, "--dataset", place, "--attacks", "fgsm", "--n", "20")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--eps", ","), "holds no radius"),
        (("--eps", ""), "holds no radius"),
        (("--norm", "l2"), "give --eps with --norm l2"),
        (("--attacks", "pgd-5", "--source", "runs/two"), "add transfer to --attacks"),
        (("--attacks", "pgd-5", "--budget", "thorough"), "--attacks and --budget exclude each"),
    ],
)
def test_what_would_be_left_out_silently(refused, finished, args, said):
    assert said in refused("evaluate", finished, *args)


def test_sources_are_where_the_model_is(cli, finished, monkeypatch):
    asked, load = [], runs.load

    def spied(folder, device=None):
        asked.append(device)
        return load(folder, device)

    monkeypatch.setattr(runs, "load", spied)
    args = ("--source", finished, "--n", "20", "--device", "cpu")
    assert cli("evaluate", finished, *args, "--attacks", "transfer").code == 0
    assert asked == ["cpu", "cpu"]
    given = []
    monkeypatch.setattr(surestep, "audit", lambda *_, sources, **__: given.extend(sources) or 1 / 0)
    cli("audit", finished, *args, "--budget", "quick")
    assert asked == ["cpu"] * 4
    assert len(given) == 1


@pytest.mark.filterwarnings("ignore:the worst case .* source 1 of the transfer attack")
def test_sources_of_any_kind(done, refused, able, tmp_path):
    """The points of the model itself break it as its own gradients do; those of another do not."""
    (tmp_path / "net.py").write_text(
        "from surestep import models\n"
        "from surestep.weights import load_weights\n"
        "from pathlib import Path\n"
        "def same():\n"
        "    net = models.create('cnn-small', 10)\n"
        f"    load_weights(Path({str(able / 'model.safetensors')!r}), net)\n"
        "    return net\n"
        "def other():\n"
        "    return models.create('cnn-small', 10)\n"
    )

    def left(*source):
        args = ("evaluate", able, "--attacks", "transfer", "--n", "40", "--json", "-")
        return json.loads(done(*args, *source))["robust_accuracy"]["transfer"]

    same = left("--source", f"{tmp_path}/net.py:same")
    assert same == left("--source", able)
    assert same < left("--source", f"{tmp_path}/net.py:other")
    swapped = shutil.copytree(able, tmp_path / "swapped")
    signature = read_signature(able / "model.safetensors")
    net = models.create("cnn-small", 10)
    classes = (signature.classes[1], signature.classes[0], *signature.classes[2:])
    save_weights(swapped / "model.safetensors", net, signature._replace(classes=classes))
    refusal = refused("evaluate", able, "--attacks", "transfer", "--source", swapped)
    assert "has another class order than the target" in refusal
    refusal = refused("evaluate", able, "--attacks", "transfer", "--source", tmp_path / "none")
    assert "is not a run folder" in refusal


def test_a_curve_is_shown_too(done, finished):
    out = done("evaluate", finished, "--attacks", "fgsm", "--n", "20", "--eps", "0.1,0.2,0.3")
    assert [f"worst case at eps {eps}" in out for eps in (0.1, 0.2, 0.3)] == [True, True, False]
    assert "per image, the strongest of the attacks" in out


def test_data_without_splits_say_what_is_judged(cli, finished, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 28, 28), np.uint8)
    np.savez(tmp_path / "whole.npz", x=x, y=np.arange(60) % 10)
    args = ("--dataset", f"npz:{tmp_path / 'whole.npz'}", "--attacks", "fgsm")
    assert "6 of 60 images" in cli("evaluate", finished, *args).err


def test_a_place_that_may_not_be_entered(refused, finished, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "/root/secret")

    monkeypatch.setattr("surestep.runs.read_config", denied)
    assert "permission denied: /root/secret" in refused("evaluate", finished)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_weights_and_configuration_are_enough(done, run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done("evaluate", run, "--attacks", "fgsm")


def test_a_folder_without_test_images_is_judged_on_its_validation(cli, finished, tmp_path):
    arrays = {}
    for k, part in enumerate(("train", "val")):
        x = np.random.default_rng(k).integers(0, 256, (20, 28, 28), dtype=np.uint8)
        arrays |= {f"x_{part}": x, f"y_{part}": np.arange(20) % 10}
    np.savez(tmp_path / "set.npz", **arrays)
    args = ("evaluate", finished, "--dataset", f"npz:{tmp_path / 'set.npz'}", "--attacks", "fgsm")
    assert cli(*args).code == 2
    code, out, err = cli(*args, "--split", "validation")
    assert code == 0, err
    assert "judged on the validation split, not on test images" in err
    assert "20 images" in " ".join(out.split())


@pytest.mark.filterwarnings("default")
def test_a_doubtful_number_is_said_to_be_one(cli, finished, tmp_path):
    """In one line, in the JSON and in the report, of a model that quantises its input."""
    code = f"""
        from surestep import runs
        from torch import nn
        class Quantised(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = runs.load({str(finished)!r}, "cpu").model
            def forward(self, x):
                return self.net((x * 9).round() / 9)
        make = Quantised
    """
    (tmp_path / "net.py").write_text(textwrap.dedent(code), "utf-8")
    page = tmp_path / "page.html"
    found = cli(
        *("evaluate", f"{tmp_path / 'net.py'}:make", "--dataset", "mnist", "--eps", "0.3"),
        *("--n", "100", "--attacks", "fgsm,pgd-3", "--html", page, "--json", "-"),
    )
    assert found.code == 0, found.err
    (line,) = [line for line in found.err.splitlines() if "too high" in line]
    assert line.startswith("surestep: warning: the worst case of ")
    assert "no gradient reaches " in line
    assert json.loads(found.out)["doubts"] == [line.split("too high: ")[1].split(". An")[0]]
    assert "It may be too high: no gradient reaches" in page.read_text("utf-8")


def test_clean_accuracy_at_chance_is_told(cli, tmp_path):
    code = """
        import torch
        from surestep import models
        def make():
            torch.manual_seed(0)
            return models.create("cnn-small")
    """
    (tmp_path / "net.py").write_text(textwrap.dedent(code), "utf-8")
    options = ("--dataset", "mnist", "--eps", "0.3", "--n", "60", "--attacks", "fgsm")
    found = cli("evaluate", f"{tmp_path / 'net.py'}:make", *options)
    assert found.code == 0
    assert re.search(r"clean accuracy [\d.]+% is at chance: are the weights, --mean", found.err)
    few = cli("evaluate", f"{tmp_path / 'net.py'}:make", *options[:-4], "5", *options[-2:])
    assert "at chance" not in few.err
    right = "--attacks", "fgsm", "--n", "200"
    code = """
        import torch
        from torch import nn
        from surestep import data
        class Knows(nn.Module):
            def forward(self, x):
                return -torch.cdist(x.flatten(1), means)
        digits = data.load("mnist").first(2000)
        x = digits.pixels().flatten(1)
        means = torch.stack([x[digits.y == k].mean(0) for k in range(10)])
    """
    (tmp_path / "good.py").write_text(textwrap.dedent(code), "utf-8")
    good = cli("evaluate", f"{tmp_path / 'good.py'}:Knows", *options[:4], *right)
    assert good.code == 0
    assert "at chance" not in good.err
