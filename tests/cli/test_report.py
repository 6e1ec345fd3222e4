"""The pages that commands write: what is in them, and that nothing is lost without them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from surestep.cli._report import write_report

for package in ("altair", "vl_convert", "jinja2"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("small_budget")

FACTORY = """
import torch
from surestep import models

class Detached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = models.create("cnn-small", 10)

    def forward(self, x):
        return self.net(x.detach()).detach()
"""


@pytest.fixture(autouse=True)
def _no_report_of_training():
    """Here there is one."""


def text_of(path):
    return path.read_text("utf-8")


def test_a_trained_run_has_its_report(finished):
    page = text_of(finished / "report.html")
    assert "not judged" in page
    assert "training-loss" in page
    assert "loss-surface-1" in page
    assert "data:image/png;base64," in page
    assert "sat-r3" in page  # among the settings


def test_an_evaluation(done, finished, tmp_path):
    page, plots, result = tmp_path / "new" / "e.html", tmp_path / "plots", tmp_path / "e.json"
    where = ("--html", page, "--plots", plots, "--json", result)
    done("evaluate", finished, "--attacks", "fgsm,pgd-5", "--eps", "0.1,0.3", "--n", 40, *where)
    worst = json.loads(text_of(result))["worst_case_accuracy"]
    assert f"{100 * worst:.1f}% of 40 images remain correctly classified" in text_of(page)
    assert "training-loss" in text_of(page)
    made = {p.name for p in plots.iterdir()}
    assert {"accuracy-by-eps.png", "accuracy-by-eps.svg", "loss-surface-1.png"} <= made


def test_an_audit(done, finished, tmp_path):
    page = tmp_path / "a.html"
    out = done("audit", finished, "--budget", "quick", "--n", 40, "--html", page)
    verdict = out.split("  ")[0].strip()
    assert verdict in ("robust", "pseudo-robust", "not robust", "inconclusive")
    assert f"{verdict}</" in text_of(page)
    assert "Binarization test" in text_of(page)


def test_a_model_without_gradients(done, digits, tmp_path):
    """It has no direction to draw the loss along; the result is told all the same."""
    (tmp_path / "net.py").write_text(FACTORY, "utf-8")
    page = tmp_path / "a.html"
    on = ("--dataset", "npz", "--data", digits, "--eps", "0.3", "--n", 20, "--html", page)
    done("audit", f"{tmp_path / 'net.py'}:Detached", "--budget", "quick", *on)
    assert "Broken gradients" in text_of(page)
    assert "loss-surface-1" not in text_of(page)


def test_declared_preprocessing_is_part_of_the_picture(done, digits, tmp_path, monkeypatch):
    from surestep import report

    seen = []

    def gather(model, x, y, threat, **_):
        seen.append(model(x[:2]))
        return {}

    monkeypatch.setattr(report, "gather", gather)
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
        "    torch.nn.init.constant_(net[1].weight, 1.0)\n"
        "    torch.nn.init.zeros_(net[1].bias)\n"
        "    return net\n",
        "utf-8",
    )
    on = ("--dataset", "npz", "--data", digits, "--eps", "0.3", "--n", 20)
    how = ("--mean", "0.5", "--std", "0.25", "--attacks", "fgsm", "--html", tmp_path / "e.html")
    done("evaluate", f"{tmp_path / 'net.py'}:make", *on, *how)
    from surestep import data

    x = data.load("npz", "test", root=str(digits)).first(2).pixels()
    torch.testing.assert_close(seen[0][:, 0], ((x - 0.5) / 0.25).flatten(1).sum(1))


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_a_place_that_cannot_be_written_to_is_refused_first(
    command, refused, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("worked before asking"))
    assert "it is a folder" in refused(command, finished, "--html", tmp_path)


def test_a_page_goes_where_a_link_leads(tmp_path):
    place, link = tmp_path / "page.html", tmp_path / "latest.html"
    place.write_text("the last page")
    link.symlink_to(place)
    write_report(str(link), None, "a title")
    assert link.is_symlink()
    assert "a title" in text_of(place)
    write_report("/dev/null", None, "a title")
    assert Path("/dev/null").is_char_device()


def test_stdout_is_not_for_pages(refused, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--html -: the result goes to stdout" in refused("evaluate", finished, "--html", "-")
    assert list(tmp_path.iterdir()) == []


def test_plots_into_a_folder_of_somebody_elses(refused, finished, tmp_path, monkeypatch):
    """To root, every folder may be written to."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda p, *a: str(p) != str(tmp_path) and may(p, *a))
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("worked before asking"))
    said = refused("evaluate", finished, "--plots", tmp_path)
    assert f"cannot write to {tmp_path}: permission denied" in said


@pytest.mark.parametrize("command", ["evaluate", "audit", "demo"])
def test_missing_packages_are_told_first(command, refused, finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("worked before asking"))
    target = () if command == "demo" else (finished,)
    said = refused(command, *target, "--html", tmp_path / "x.html")
    assert "pip install 'surestep[report]'" in said


def test_training_does_without_the_packages(cli, finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    config = finished / "config.yaml"
    result = cli("train", "--config", config, "--epochs", 1, "--out", tmp_path / "run", "--quiet")
    assert result.code == 0
    assert "no report.html: the report needs altair" in result.err
    assert not (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "model.safetensors").exists()
